package cache

import (
	"os"
	"sync"
	"testing"
	"time"
)

// TestFlightEnds: a chunk that comes into the data file another way while a
// reader begins to wait for it ends the wait, whoever brings it.
func TestFlightEnds(t *testing.T) {
	f := newFixture(t, 1, 100_000, 20_000)
	l := acquire(t, openCache(t, Options{}), f, f.source())
	c, ch := l.content, f.chunks[0]
	c.mu.Lock()
	flight, started := c.join(0)
	c.mu.Unlock()
	if !started {
		t.Fatal("a missing chunk has a flight already")
	}
	if err := c.store(0, ch, f.content[:ch.Length]); err != nil {
		t.Fatal(err)
	}
	if err := c.put(0, ch, f.frame(0)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-flight.done:
	default:
		t.Fatal("the flight of a chunk that is there never ended")
	}
	if len(c.flights) != 0 {
		t.Errorf("%d flights are left", len(c.flights))
	}
	mustRead(t, l, f, 0, 1000)
}

// TestBufferReferences: a buffer goes back to the pool exactly when the last
// who waited for it has copied, or left.
func TestBufferReferences(t *testing.T) {
	f := newFixture(t, 1, 100_000, 20_000)
	l := acquire(t, openCache(t, Options{}), f, f.source())
	c := l.content
	var flights []*flight
	c.mu.Lock()
	for range 3 {
		fl, _ := c.join(0)
		flights = append(flights, fl)
	}
	c.mu.Unlock()
	c.leave(flights[0]) // before it lands
	if err := c.put(0, f.chunks[0], f.frame(0)); err != nil {
		t.Fatal(err)
	}
	buf, err := c.wait(t.Context(), flights[1])
	if err != nil || buf == nil {
		t.Fatalf("no buffer: %v", err)
	}
	if n := buf.refs.Load(); n != 2 {
		t.Errorf("%d references with two readers left, want 2", n)
	}
	buf.release()
	c.leave(flights[2]) // after it landed
	if n := buf.refs.Load(); n != 0 {
		t.Errorf("%d references with no reader left, want 0", n)
	}

	// What is fetched ahead has nobody waiting.
	if err := l.dev.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	w, ok := l.foresee(2)
	var run []want
	if ok {
		run = append(run, l.launch(w))
	}
	c.mu.Unlock()
	if len(run) != 1 {
		t.Fatalf("reading ahead: %d chunks, want 1", len(run))
	}
	if n := run[0].flight.waiters; n != 0 {
		t.Errorf("reading ahead: %d waiters, want none", n)
	}
	l.abort(run, ErrClosed)
}

// TestRemoveInUse: whatever evict or Release believed a moment ago, a layer
// that has been acquired since is neither removed nor closed.
func TestRemoveInUse(t *testing.T) {
	f := newFixture(t, 1, 100_000, 20_000)
	c := openCache(t, Options{})
	l := acquire(t, c, f, f.source())
	for _, s := range []*slot{l.slot, {key: l.slot.key, disk: onDisk{bytes: 1}}} { // the second: of an earlier life
		if n := c.remove(s); n != 0 {
			t.Errorf("removed %d bytes of a layer in use", n)
		}
	}
	if _, err := os.Stat(l.Path()); err != nil {
		t.Error(err)
	}
	c.closeIdle(l.slot) // as a Release does that was overtaken by an Acquire
	mustRead(t, l, f, 0, 1000)
	if n := c.Usage().Acquired; n != 1 || l.slot.content == nil {
		t.Errorf("%d layers acquired, want 1, and that open", n)
	}
}

// TestReleaseMeetsAcquire: the last Release and a new Acquire at once, in
// either order.
func TestReleaseMeetsAcquire(t *testing.T) {
	f := newFixture(t, 1, 100_000, 20_000)
	c := openCache(t, Options{})
	old := acquire(t, c, f, f.source())
	mustRead(t, old, f, 0, 100_000)
	for range 50 {
		slot := old.slot
		slot.mu.Lock()
		var wg sync.WaitGroup
		wg.Go(old.Release)
		var l *Layer
		wg.Go(func() { l = acquire(t, c, f, f.source()) })
		time.Sleep(time.Millisecond) // both wait for the slot
		slot.mu.Unlock()
		wg.Wait()
		mustRead(t, l, f, 0, 100_000)
		old = l
	}
}
