package cache

import (
	"errors"
	"io"
	"sync"
	"time"

	"sluice/internal/artifact"
)

const (
	// stallTrips is for how many round trips a Delivery may bring nothing
	// before readers fetch for themselves, minStall and maxStall bound what
	// that comes to: schedulers are late, too, and clocks are odd.
	stallTrips = 4
	minStall   = 50 * time.Millisecond
	maxStall   = 2 * time.Second

	// maxDetour is for how long a reader waits for a chunk behind others of a
	// Delivery that is on its way at full speed.
	maxDetour = 2 * time.Second
)

// errUndelivered ends the wait for a chunk that a Delivery doesn't bring in
// time. The reader then fetches it.
var errUndelivered = errors.New("the delivery that should bring the chunk doesn't get on")

// Delivery is chunks of some Layers on their way by another request than
// theirs: a boot pack. Readers of chunks that Layer.Expect announced wait for
// PutFrame to bring them, instead of fetching them a second time, as long as
// the delivery gets on: not when it has stalled, and not for chunks that are
// more than 2 s away at its pace. A Delivery that goes on after a stall is
// waited for again. It may be used concurrently; Close ends it.
type Delivery struct {
	traffic  *traffic // in which it counts: Fill stands back for it
	patience time.Duration

	// mu is a leaf lock, but content.mu may be held when it's taken.
	mu      sync.Mutex
	began   time.Time // when the first byte came
	got     int64     // bytes that came
	stalled bool
	closed  bool
	parts   []*content
}

// NewDelivery returns a delivery whose source takes about roundTrip to answer,
// which decides how long a pause is a stall.
func (c *Cache) NewDelivery(roundTrip time.Duration) *Delivery {
	c.traffic.enter()
	return &Delivery{traffic: c.traffic, patience: min(max(stallTrips*roundTrip, minStall), maxStall)}
}

// Reader returns r, watched: what is read from it is the delivery's progress,
// a Read that takes too long is a stall. The time between Reads doesn't count.
func (d *Delivery) Reader(r io.Reader) io.Reader { return &deliveryReader{r: r, d: d} }

type deliveryReader struct {
	r io.Reader
	d *Delivery
}

func (r *deliveryReader) Read(p []byte) (int, error) {
	watch := time.AfterFunc(r.d.patience, r.d.stall)
	n, err := r.r.Read(p)
	watch.Stop()
	if n > 0 {
		r.d.progress(n)
	}
	return n, err
}

func (d *Delivery) progress(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.began.IsZero() {
		d.began = time.Now()
	}
	d.got += int64(n)
	d.stalled = false
}

// stall lets those who wait help themselves.
func (d *Delivery) stall() {
	d.mu.Lock()
	d.stalled = true
	parts := d.parts
	d.mu.Unlock()
	for _, c := range parts {
		c.giveUp(d, false)
	}
}

// Close ends the delivery: what it hasn't brought isn't expected any more, and
// is fetched by those who wait for it. Only the first call does anything.
func (d *Delivery) Close() {
	d.mu.Lock()
	closed, parts := d.closed, d.parts
	d.closed, d.parts = true, nil
	d.mu.Unlock()
	if closed {
		return
	}
	d.traffic.leave()
	for _, c := range parts {
		c.giveUp(d, true)
	}
}

// worth reports whether a chunk that begins at byte at of the delivery is to
// be waited for.
func (d *Delivery) worth(at int64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.stalled {
		return false
	}
	ahead := at - d.got
	if ahead <= 0 || d.got == 0 {
		return true
	}
	pace := float64(d.got) / max(time.Since(d.began).Seconds(), 1e-3)
	return float64(ahead) < pace*maxDetour.Seconds()
}

// join makes c known to those who end the delivery; false if it has ended.
func (d *Delivery) join(c *content) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed {
		d.parts = append(d.parts, c)
	}
	return !d.closed
}

// expected is where in a Delivery a chunk is.
type expected struct {
	from *Delivery
	at   int64
}

// Expect announces that d will bring some of the layer's chunks: chunks[k] is
// about at[k] bytes behind the delivery's beginning. What isn't a chunk of the
// layer is ignored.
func (l *Layer) Expect(d *Delivery, chunks []int, at []int64) {
	c := l.content
	c.mu.Lock()
	defer c.mu.Unlock()
	if !d.join(c) {
		return
	}
	if c.expected == nil {
		c.expected = make(map[int]expected, len(chunks))
	}
	for k, i := range chunks {
		if i >= 0 && i < c.count && !c.has(i) {
			c.expected[i] = expected{from: d, at: at[k]}
		}
	}
}

// awaited reports whether chunk i, which is missing, is being delivered: its
// flight is then the delivery's to end. mu is held.
func (c *content) awaited(i int) bool {
	e, ok := c.expected[i]
	return ok && e.from.worth(e.at)
}

// deliver puts chunk i's frame as put does, for those who expect it and those
// who will read it one day.
func (c *content) deliver(i int, ch artifact.Chunk, frame []byte) error {
	c.mu.Lock()
	if c.flights[i] == nil && !c.has(i) {
		c.chunks[i].Or(mark)
	}
	c.mu.Unlock()
	err := c.put(i, ch, frame)
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.expected, i)
	if f := c.flights[i]; f != nil && f.awaited && !f.landed { // it was something else
		c.end(f, nil, errUndelivered)
		c.forget(f)
	}
	return err
}

// giveUp ends the flights of chunks that d would have brought, and forgets
// that it would if it has come to its end.
func (c *content) giveUp(d *Delivery, end bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, e := range c.expected {
		if e.from != d {
			continue
		}
		if end {
			delete(c.expected, i)
		}
		if f := c.flights[i]; f != nil && f.awaited && !f.landed {
			c.end(f, nil, errUndelivered)
			c.forget(f)
		}
	}
}
