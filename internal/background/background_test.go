package background_test

import (
	"context"
	"sync/atomic"
	"testing"

	"sluice/internal/background"
)

func TestStopEndsAllOfIt(t *testing.T) {
	w := background.New()
	var ended atomic.Int32
	begun := make(chan struct{})
	for range 3 {
		w.Go(func(ctx context.Context) {
			begun <- struct{}{}
			<-ctx.Done()
			ended.Add(1)
		})
		<-begun
	}
	w.Stop()
	if n := ended.Load(); n != 3 {
		t.Errorf("%d of 3 have ended when Stop returns", n)
	}
	w.Go(func(context.Context) { t.Error("work after Stop") })
	w.Stop() // waits for it, if there were any
}
