package supply

import (
	"context"
	"errors"
	"testing"
	"time"
)

func TestReadContext(t *testing.T) {
	base, cancel := context.WithCancel(t.Context())
	c := &readContext{base: base, deadline: time.Now().Add(time.Hour)}
	if c.Err() != nil || !c.finish() {
		t.Error("a context that nobody looked at is not reusable")
	}
	child, stop := context.WithCancel(c)
	defer stop()
	if c.finish() {
		t.Error("a context that somebody waits on is reusable")
	}
	<-child.Done()
	c = &readContext{base: base, deadline: time.Now().Add(time.Millisecond)}
	<-c.Done()
	if !errors.Is(c.Err(), context.DeadlineExceeded) {
		t.Errorf("got %v", c.Err())
	}
	c = &readContext{base: base, deadline: time.Now().Add(-time.Second)}
	if !errors.Is(c.Err(), context.DeadlineExceeded) {
		t.Errorf("got %v", c.Err())
	}
	c = &readContext{base: base, deadline: time.Now().Add(time.Hour)}
	cancel()
	if !errors.Is(c.Err(), context.Canceled) {
		t.Errorf("got %v", c.Err())
	}
}
