package cache

import (
	"context"
	"errors"
	"sync"
	"time"
)

const (
	// maxReadAheads and maxFills bound the requests of these kinds at a time.
	maxReadAheads = 2
	maxFills      = 2

	// minReadAhead is the size of a request for read-ahead on a way that holds
	// less than that, or of which nothing is known.
	minReadAhead = 256 << 10

	// maxYield is how long a Fill stands back for faults before it takes the
	// next chunk all the same: a node that always faults must get complete,
	// too.
	maxYield = time.Second

	// minPause keeps a Fill that waits for what others bring from turning in
	// circles.
	minPause = 10 * time.Millisecond
)

// errDisturbed ends a request of Fill because somebody waits for content.
var errDisturbed = errors.New("somebody waits for content")

// traffic decides who may use the network. Faults always may; read-ahead if
// there's not much of it yet; Fill when nobody waits.
type traffic struct {
	readAheads chan struct{} // a token for each that runs
	fills      chan struct{} // likewise
	pace       pace

	mu     sync.Mutex    // a leaf lock
	active int           // fetches for faults and read-ahead, and deliveries
	quiet  chan struct{} // closed when active is 0

	disturb map[int]func() // who wants to know when active isn't 0 any more
	serial  int
}

func newTraffic() *traffic {
	t := &traffic{
		readAheads: make(chan struct{}, maxReadAheads),
		fills:      make(chan struct{}, maxFills),
		quiet:      make(chan struct{}),
		disturb:    map[int]func(){},
	}
	close(t.quiet)
	return t
}

func (t *traffic) enter() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.active++; t.active > 1 {
		return
	}
	t.quiet = make(chan struct{})
	for _, f := range t.disturb {
		f()
	}
}

func (t *traffic) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.active--; t.active == 0 {
		close(t.quiet)
	}
}

func (t *traffic) tryReadAhead() bool {
	select {
	case t.readAheads <- struct{}{}:
		return true
	default:
		return false
	}
}

func (t *traffic) endReadAhead() { <-t.readAheads }

// readAheadSize is how many bytes one request that nobody waits for may have,
// at most: about what the way to the source holds, so that a few of them keep
// it busy and none is long in the way.
func (t *traffic) readAheadSize(most int64) int64 {
	return min(max(t.pace.product(), minReadAhead), most)
}

// fill waits for a turn to make a request for Fill; endFill gives it back.
func (t *traffic) fill(ctx context.Context) error {
	select {
	case t.fills <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t *traffic) endFill() { <-t.fills }

// yield waits while somebody waits for content, but maxYield at most. It
// reports whether nobody does now.
func (t *traffic) yield(ctx context.Context) bool {
	t.mu.Lock()
	quiet := t.quiet
	t.mu.Unlock()
	select {
	case <-quiet:
		return true
	default:
	}
	timer := time.NewTimer(maxYield)
	defer timer.Stop()
	select {
	case <-quiet:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

// pause waits for what others are bringing: while somebody waits, as yield
// does, and a moment in any case.
func (t *traffic) pause(ctx context.Context) {
	t.yield(ctx)
	timer := time.NewTimer(minPause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// untilBusy returns a context that ends with errDisturbed when somebody waits
// for content. done must be called.
func (t *traffic) untilBusy(ctx context.Context) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.active > 0 {
		cancel(errDisturbed)
		return ctx, func() {}
	}
	id := t.serial
	t.serial++
	t.disturb[id] = func() { cancel(errDisturbed) }
	return ctx, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.disturb, id)
		cancel(nil)
	}
}
