package supply

import (
	"context"
	"sync"
	"time"
)

// readContext is the context of one read: base with a deadline. Making a
// context.WithDeadline for each costs three allocations and a timer; nearly all
// reads are answered from a local file without anybody looking at Done. So the
// real context is made when Done is first called.
type readContext struct {
	base     context.Context // the plane's; this is a context itself
	deadline time.Time

	mu     sync.Mutex      // of what follows
	real   context.Context // what this one stands for, made from base when needed
	cancel context.CancelFunc
}

func (c *readContext) Deadline() (time.Time, bool) { return c.deadline, true }

func (c *readContext) make() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.real == nil {
		c.real, c.cancel = context.WithDeadline(c.base, c.deadline)
	}
	return c.real
}

func (c *readContext) Done() <-chan struct{} { return c.make().Done() }

func (c *readContext) Err() error {
	c.mu.Lock()
	real := c.real
	c.mu.Unlock()
	if real != nil {
		return real.Err()
	}
	if err := c.base.Err(); err != nil {
		return err
	}
	if time.Now().After(c.deadline) {
		return context.DeadlineExceeded
	}
	return nil
}

// Value goes to the real context, so that contexts derived from c hang on it
// directly and need no goroutine.
func (c *readContext) Value(key any) any { return c.make().Value(key) }

// finish ends the context. It reports whether c may be used for another read:
// only if nobody can still be waiting on it.
func (c *readContext) finish() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.real == nil {
		return true
	}
	c.cancel()
	return false
}
