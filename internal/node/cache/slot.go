package cache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/oci"
)

// slot is the place of one device key, open or only on disk.
type slot struct {
	key oci.Digest

	// mu is held while the layer's files are opened, closed or removed.
	mu sync.Mutex

	// Guarded by Cache.mu. content changes only with slot.mu held too.
	content *content // nil unless open
	refs    int      // Layers, and calls of Acquire under way
	disk    onDisk   // when it was last closed
	used    time.Time
}

// Acquire opens the layer that dev describes, for reading through src, which
// must be its blob (dev.Blob). The layer stays in the cache at least until
// the Layer is released. Several Layers of one key share everything but dev
// and src, and each fetches through its own. meter, unless it's nil, counts
// what that costs.
//
// An *IntegrityError means that the layer was quarantined. src should be
// patient by itself (blob.Retry): the cache asks again only for content that
// arrived damaged, or that it was waiting for through another Layer's source.
func (c *Cache) Acquire(ctx context.Context, dev *artifact.Device, src blob.Source, meter *Meter) (*Layer, error) {
	shape, err := shapeOf(dev)
	if err != nil {
		return nil, err
	}
	if src.Size() != dev.Blob.Size {
		return nil, fmt.Errorf("layer %s: its source has %d bytes, its blob %d", dev.Key, src.Size(), dev.Blob.Size)
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, ErrClosed
	}
	s := c.slots[dev.Key]
	if s == nil {
		s = &slot{key: dev.Key, used: time.Now()}
		c.slots[dev.Key] = s
	}
	s.refs++
	c.mu.Unlock()

	content, err := c.open(s, shape)
	if err != nil {
		c.release(s, false)
		return nil, err
	}
	return newLayer(ctx, c, s, content, dev, src, meter), nil
}

// open returns the slot's content, opening its files if they aren't.
func (c *Cache) open(s *slot, shape shape) (*content, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if have := c.contentOf(s); have != nil {
		if bad := have.bad.Load(); bad != nil {
			return nil, bad
		}
		if have.shape != shape {
			return nil, fmt.Errorf("layer %s: two devices of the same key differ in size", s.key)
		}
		return have, nil
	}
	dir := c.dirOf(s.key)
	env := environment{
		buffers: c.buffers, stats: c.stats, log: c.log.With("layer", s.key), boot: c.boot,
		dirtied: c.dirtied, wake: c.wake, writeErrors: &c.writeErrors,
	}
	opened, err := openContent(dir, shape, env)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	closed := c.closed // and then Close doesn't know of opened
	if !closed {
		s.content = opened
	}
	c.mu.Unlock()
	if closed {
		return nil, errors.Join(ErrClosed, opened.close())
	}
	return opened, nil
}

func (c *Cache) contentOf(s *slot) *content {
	c.mu.Lock()
	defer c.mu.Unlock()
	return s.content
}

// release gives up one reference to the slot, and with the last one its
// files. used tells that the layer was wanted, not merely filled.
func (c *Cache) release(s *slot, used bool) {
	c.mu.Lock()
	s.refs--
	if used {
		s.used = time.Now()
	}
	last := s.refs == 0
	if last && s.content == nil && s.disk == (onDisk{}) {
		delete(c.slots, s.key) // an Acquire that failed
	}
	c.mu.Unlock()
	if last {
		c.closeIdle(s)
	}
}

// closeIdle closes the slot's files unless it has been acquired meanwhile.
func (c *Cache) closeIdle(s *slot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.mu.Lock()
	open := s.content
	if s.refs > 0 {
		open = nil
	}
	if open != nil {
		s.content = nil
	}
	c.mu.Unlock()
	if open == nil {
		return
	}
	if err := open.close(); err != nil {
		c.log.Warn("closing a cached layer", "error", err)
	}
	found := inspect(open.dir)
	c.mu.Lock()
	s.disk = found
	used := s.used
	if s.refs == 0 && found == (onDisk{}) {
		delete(c.slots, s.key) // the disk has taken nothing of it
	}
	c.mu.Unlock()
	touch(open.dir, used)
}
