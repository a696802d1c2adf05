package cache

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"sluice/internal/artifact"
)

// buffers recycles the memory of frames and of decoded chunks: a node decodes
// thousands a second when a container starts.
type buffers struct{ pool sync.Pool }

// buffer has room for any frame and any decoded chunk.
type buffer struct {
	mem  []byte
	b    []byte // what it holds, in mem
	refs atomic.Int32
	home *buffers
}

// get returns a buffer whose one reference is the caller's.
func (p *buffers) get() *buffer {
	b, ok := p.pool.Get().(*buffer)
	if !ok {
		b = &buffer{mem: make([]byte, artifact.MaxFrameLength), home: p}
	}
	b.b = b.mem
	b.refs.Store(1)
	return b
}

// release gives a reference back, and with the last one the memory.
func (b *buffer) release() {
	if b.refs.Add(-1) == 0 {
		b.home.pool.Put(b)
	}
}

// flight is a chunk on its way. There's at most one per chunk in
// content.flights, which is what makes fetches single. Its fields but done are
// guarded by content.mu until done is closed, and don't change afterwards.
type flight struct {
	chunk   int
	done    chan struct{} // closed when the outcome is known
	landed  bool
	awaited bool // a Delivery brings it, nobody fetches it
	waiters int

	// The outcome. With neither, look again: the chunk is in data, or nobody
	// is fetching it any more.
	buf *buffer // one reference per waiter, one of content.flights
	err error
}

// join returns the flight of chunk i, starting one if there's none: the caller
// then has to see to it that the flight ends. It returns nil if the chunk is
// present. Whoever joined must call wait or leave, once. mu is held.
func (c *content) join(i int) (f *flight, started bool) {
	if c.has(i) {
		return nil, false
	}
	f = c.flights[i]
	if f == nil {
		f = &flight{chunk: i, done: make(chan struct{})}
		c.flights[i] = f
		started = true
	}
	if f.landed {
		if f.buf != nil {
			f.buf.refs.Add(1)
		}
	} else {
		f.waiters++
	}
	return f, started
}

// end settles a flight's outcome, once. mu is held.
func (c *content) end(f *flight, buf *buffer, err error) {
	if f.landed {
		return
	}
	f.landed = true
	f.err = err
	if buf != nil {
		buf.refs.Add(int32(f.waiters) + 1)
		f.buf = buf
	}
	close(f.done)
}

// forget takes a flight out of flights, with the reference it has. mu is held.
func (c *content) forget(f *flight) {
	if c.flights[f.chunk] != f {
		return
	}
	delete(c.flights, f.chunk)
	if f.buf != nil {
		f.buf.release()
	}
}

// arrive hands verified bytes to those who wait for chunk i. The flight stays
// until land, so that nobody starts another while the bytes are written.
func (c *content) arrive(i int, buf *buffer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.flights[i]; f != nil {
		c.end(f, buf, nil)
	}
}

// land ends chunk i's flight after its bytes were written or could not be. In
// the latter case a few stay in memory, so that reading a file in small pieces
// doesn't fetch each chunk many times.
func (c *content) land(i int, written bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.flights[i]
	if f == nil {
		return
	}
	if !written && f.buf != nil {
		if slices.Contains(c.unstored, f) {
			return
		}
		c.unstored = append(c.unstored, f)
		if len(c.unstored) > maxUnstored {
			c.forget(c.unstored[0])
			c.unstored = slices.Delete(c.unstored, 0, 1)
		}
		return
	}
	c.end(f, nil, nil)
	c.forget(f)
}

// leave gives up a flight that was joined and not waited for.
func (c *content) leave(f *flight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !f.landed {
		f.waiters--
	} else if f.buf != nil {
		f.buf.release()
	}
}

// wait waits for a flight's outcome. The caller releases the buffer if it gets
// one; with neither buffer nor error it looks again.
func (c *content) wait(ctx context.Context, f *flight) (*buffer, error) {
	select {
	case <-f.done:
		return f.buf, f.err
	default:
	}
	select {
	case <-f.done:
		return f.buf, f.err
	case <-ctx.Done():
		c.leave(f)
		return nil, fmt.Errorf("waiting for chunk %d: %w", f.chunk, context.Cause(ctx))
	}
}
