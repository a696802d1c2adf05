package happening

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// added returns a Log of n Events that were called 1, 2, 3 …
func added(capacity, n int) *Log {
	l := NewLog(capacity)
	for i := range n {
		l.Add(Event{Kind: Started, Container: fmt.Sprint(i + 1)})
	}
	return l
}

func names(events []Event) string {
	var all []string
	for _, e := range events {
		all = append(all, e.Container)
	}
	return strings.Join(all, " ")
}

func TestAfter(t *testing.T) {
	few, many, other := added(4, 3), added(4, 10), NewLog(1)
	for _, c := range []struct {
		name   string
		log    *Log
		cursor Cursor
		want   string
		lost   uint64
	}{
		{"empty log", other, Cursor{}, "", 0},
		{"from the oldest", few, Cursor{}, "1 2 3", 0},
		{"in between", few, Cursor{few.epoch, 1}, "2 3", 0},
		{"all seen", few, Cursor{few.epoch, 3}, "", 0},
		{"none seen", few, Cursor{few.epoch, 0}, "1 2 3", 0},
		{"of another epoch", few, Cursor{other.epoch, 2}, "1 2 3", 0},
		{"beyond the newest", few, Cursor{few.epoch, 4}, "1 2 3", 0},
		{"a new reader has lost nothing", many, Cursor{}, "7 8 9 10", 0},
		{"the next is the oldest", many, Cursor{many.epoch, 6}, "7 8 9 10", 0},
		{"one fell out", many, Cursor{many.epoch, 5}, "7 8 9 10", 1},
		{"five fell out", many, Cursor{many.epoch, 1}, "7 8 9 10", 5},
		{"of another epoch, and six fell out", many, Cursor{other.epoch, 900}, "7 8 9 10", 6},
		{"all seen of many", many, Cursor{many.epoch, 10}, "", 0},
		{"as far as can be", many, Cursor{many.epoch, ^uint64(0)}, "7 8 9 10", 6},
	} {
		got, lost := c.log.After(c.cursor)
		if names(got) != c.want || lost != c.lost {
			t.Errorf("%s: %q, lost %d; want %q, lost %d", c.name, names(got), lost, c.want, c.lost)
		}
	}
	events, _ := many.After(Cursor{})
	for i, e := range events {
		if e.Epoch != many.epoch || e.Seq != uint64(7+i) || e.Time.IsZero() || e.Cursor() != (Cursor{many.epoch, e.Seq}) {
			t.Errorf("event %d is %+v", i, e)
		}
	}
	if other.epoch == few.epoch {
		t.Error("two logs have the same epoch")
	}
}

func TestFollowWaits(t *testing.T) {
	l := NewLog(4)
	ctx, cancel := context.WithCancelCause(t.Context())
	over := errors.New("over")
	cancel(over)
	if _, _, err := l.Follow(ctx, Cursor{}); !errors.Is(err, over) {
		t.Errorf("without events, at the context's end: %v", err)
	}
	l.Add(Event{Container: "1"})
	if got, _, err := l.Follow(ctx, Cursor{}); err != nil || names(got) != "1" {
		t.Errorf("what is there comes without waiting: %v, %v", names(got), err)
	}
	got := make(chan string)
	go func() {
		events, _, err := l.Follow(t.Context(), Cursor{l.epoch, 1})
		got <- fmt.Sprint(names(events), err)
	}()
	l.Add(Event{Container: "2"})
	if s := <-got; s != "2<nil>" {
		t.Errorf("what comes later: %s", s)
	}
	go func() {
		_, _, err := l.Follow(t.Context(), Cursor{l.epoch, 2})
		got <- fmt.Sprint(err)
	}()
	l.Close()
	l.Close()
	if s := <-got; s != ErrClosed.Error() {
		t.Errorf("at the log's end: %s", s)
	}
	l.Add(Event{Container: "3"})
	if events, _, err := l.Follow(t.Context(), Cursor{}); err != nil || names(events) != "1 2" {
		t.Errorf("of a closed log: %v, %v", names(events), err)
	}
}

// Readers that are fast enough see all, in order; slow ones are told how much
// they have missed. Run with -race.
func TestReadersAndWriters(t *testing.T) {
	const writers, each = 8, 500
	l := NewLog(64)
	var reading, writing sync.WaitGroup
	for range 4 {
		reading.Go(func() {
			var c Cursor
			var seen, missed uint64
			for {
				events, lost, err := l.Follow(t.Context(), c)
				if errors.Is(err, ErrClosed) {
					break
				}
				if err != nil {
					t.Error(err)
					return
				}
				if first := events[0].Seq; c != (Cursor{}) && first != c.Seq+lost+1 || c == (Cursor{}) && lost > 0 {
					t.Errorf("after %d, %d lost, comes %d", c.Seq, lost, first)
				} else if c == (Cursor{}) {
					missed = first - 1
				}
				for i, e := range events {
					if e.Seq != events[0].Seq+uint64(i) {
						t.Errorf("event %d follows %d", e.Seq, events[0].Seq)
					}
				}
				c = events[len(events)-1].Cursor()
				seen, missed = seen+uint64(len(events)), missed+lost
			}
			if seen+missed != writers*each {
				t.Errorf("saw %d and missed %d of %d", seen, missed, writers*each)
			}
		})
	}
	for range writers {
		writing.Go(func() {
			for range each {
				l.Add(Event{Kind: Started})
			}
		})
	}
	writing.Wait()
	l.Close()
	reading.Wait()
}

func TestTextsAreBounded(t *testing.T) {
	l := NewLog(1)
	long := strings.Repeat("ü\n", 5000)
	l.Add(Event{
		Kind: Started, Pod: Pod{long, long, long}, Container: long, ContainerID: long, Image: long, Reason: long, Message: long, Remedy: long,
	})
	events, _ := l.After(Cursor{})
	b, err := json.Marshal(events[0])
	if err != nil || len(b) > 8<<10 || !utf8.Valid(b) || strings.ContainsRune(string(b), utf8.RuneError) {
		t.Errorf("%d bytes, %v: %.300s", len(b), err, b)
	}
	for s, want := range map[string]string{"": "", "short": "short", "a\r\nb\n": "a; b", "exactly.8": "exact…", "1234567ü": "12345…", "1234ü678": "1234…"} {
		if got := clip(s, 8); got != want {
			t.Errorf("%q is cut to %q, want %q", s, got, want)
		}
	}
}

func TestCursorIsText(t *testing.T) {
	for _, c := range []Cursor{{}, {"0123456789abcdef", 0}, {"x", ^uint64(0)}} {
		if got, err := ParseCursor(c.String()); err != nil || got != c {
			t.Errorf("%q is read as %+v, %v", c, got, err)
		}
	}
	for _, s := range []string{":", "x", "x:", ":1", "x:-1", "x:1:1", "x:18446744073709551616", "x: 1", strings.Repeat("x", 65) + ":1"} {
		if c, err := ParseCursor(s); err == nil || c != (Cursor{}) {
			t.Errorf("%q is read as %+v", s, c)
		}
	}
}

// TestEventIsJSON holds the form on the wire: other programs read it.
func TestEventIsJSON(t *testing.T) {
	e := Event{
		Epoch: "0123456789abcdef", Seq: 7, Time: time.Date(2026, 11, 29, 21, 0, 0, 0, time.UTC), Kind: Started,
		Pod: Pod{"default", "web-0", "1-2-3"}, Container: "main", ContainerID: "c1", Attempt: 2,
		Image: "registry.test/app:1", Digest: "sha256:00", Streamed: true, Reason: "R", Message: "M", Remedy: "D",
		Duration: time.Second, Present: true, BytesHere: 1, BytesTotal: 2,
	}
	const want = `{"epoch":"0123456789abcdef","seq":7,"time":"2026-11-29T21:00:00Z","kind":"started",` +
		`"pod":{"namespace":"default","name":"web-0","uid":"1-2-3"},"container":"main","containerID":"c1","attempt":2,` +
		`"image":"registry.test/app:1","digest":"sha256:00","streamed":true,"reason":"R","message":"M","remedy":"D",` +
		`"duration":1000000000,"present":true,"bytesHere":1,"bytesTotal":2}`
	b, err := json.Marshal(e)
	if err != nil || string(b) != want {
		t.Errorf("%s, %v\nwant %s", b, err, want)
	}
	var back Event
	if err := json.Unmarshal(b, &back); err != nil || !reflect.DeepEqual(back, e) {
		t.Errorf("read back: %+v, %v", back, err)
	}
	if b, _ = json.Marshal(Event{}); string(b) != `{"epoch":"","seq":0,"time":"0001-01-01T00:00:00Z","kind":"","image":"","streamed":false}` {
		t.Errorf("an event of nothing is %s", b)
	}
}
