package cache

import (
	"cmp"
	"math"
	"slices"
	"time"

	"sluice/oci"
)

// Eviction: when the cache has more than its high mark, which follows from
// Options.Quota and Options.Free, whole layers are removed until it is down to
// the low mark. Layers in use are never touched, not even the parts of them
// that nobody has read for long: warm reads end in the kernel's page cache, so
// what is cold can't be told from here; and the kernel, or a reader that has
// just seen that a chunk is present, may be reading the very file, where a
// hole reads as zeros.

// Need is what the images of a node want of a layer.
type Need int

// Layers are evicted in this order.
const (
	Unneeded Need = iota // no image has it
	Needed               // an image has it
	Pinned               // an image has it that must stay whole; never evicted
)

// Settled tells the cache that everybody who had acquired layers before a
// restart has acquired them again. Nothing is evicted before, not even from a
// full disk, because what is in use isn't known. needs returns what the node's
// images want of the layers that they have; nil is of none. It is called
// without locks, when room has to be made.
func (c *Cache) Settled(needs func() map[oci.Digest]Need) {
	if needs == nil {
		needs = func() map[oci.Digest]Need { return nil }
	}
	c.needs.Store(&needs)
	c.wake(false)
}

// marks are the bounds of what the cache has on disk, in bytes.
type marks struct {
	used int64
	high int64 // above it layers are evicted; math.MaxInt64: none
	low  int64 // until no more than this is used; at most high
}

func (c *Cache) marks() marks {
	m := marks{used: c.used(), high: math.MaxInt64, low: math.MaxInt64}
	if c.opts.Quota == (Space{}) && c.opts.Free == (Space{}) {
		return m
	}
	d, err := diskOf(c.opts.Dir)
	if err != nil {
		c.diskErrors.Do(func() { c.log.Error("how full the disk is can't be told; only a quota in bytes counts", "error", err) })
	}
	if q := c.opts.Quota.of(d.total); q > 0 {
		m.high = q
	}
	if f := c.opts.Free.of(d.total); f > 0 && err == nil {
		m.high = min(m.high, max(m.used+d.free-f, 0))
	}
	if m.high < math.MaxInt64 {
		m.low = int64(float64(m.high) * c.opts.Low / 100)
	}
	return m
}

// used is how many bytes of disk the cache has.
func (c *Cache) used() (n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.slots {
		n += s.size()
	}
	return n
}

// makeRoom evicts what the marks ask for, and if the disk is full in any case
// as much as if the cache had come to its high mark.
func (c *Cache) makeRoom() {
	m := c.marks()
	full := c.full.Swap(false)
	if m.used <= m.high && !full {
		return
	}
	if full {
		m.low = min(m.low, int64(float64(m.used)*c.opts.Low/100))
	}
	if n := c.evict(m.low, time.Time{}); n > 0 {
		c.log.Info("evicted layers that nobody uses, to make room", "bytes", n, "used", m.used, "low", m.low)
	} else if m.used > m.low {
		c.inUse.Do(func() {
			c.log.Warn("the cache is larger than it may be, and no layer can be evicted: all are in use or pinned; raise the quota or free disk",
				"used", m.used, "high", m.high)
		})
	}
}

// room returns ErrQuota if n more bytes of a layer that is being filled don't
// fit, after evicting what was used less recently. A layer that only Fill has
// acquired has room up to the low mark: otherwise it would come back as soon as
// it has been evicted.
func (c *Cache) room(s *slot, n int64) error {
	m := c.marks()
	c.mu.Lock()
	bound, than := m.low, s.used
	if s.refs > 1 {
		bound, than = m.high, time.Time{}
	}
	c.mu.Unlock()
	if m.used+n <= bound || bound == math.MaxInt64 {
		return nil
	}
	c.evict(min(m.low, bound-n), than)
	if c.used()+n > bound { // looked at anew: others evict, too
		return ErrQuota
	}
	return nil
}

// candidate is a layer that could be removed.
type candidate struct {
	slot *slot
	need Need
	used time.Time
}

// evict removes layers that nobody has acquired and none that is pinned: first
// those that no image has, then the least recently used, until no more than
// target bytes are used. If than isn't zero, only such that were used before
// then. It returns the bytes removed.
func (c *Cache) evict(target int64, than time.Time) (freed int64) {
	needs := c.needs.Load()
	if needs == nil {
		return 0
	}
	c.evicting.Lock() // or two would evict as much each
	defer c.evicting.Unlock()
	idle, total := c.idle((*needs)(), nil)
	for _, cand := range idle {
		if total-freed <= target {
			break
		}
		if cand.need < Pinned && (cand.need == Unneeded || than.IsZero() || cand.used.Before(than)) {
			freed += c.remove(cand.slot)
		}
	}
	return freed
}

// idle returns the layers that nobody has acquired more often than without says,
// in the order in which they are to be removed, and the bytes of all layers.
func (c *Cache) idle(needs map[oci.Digest]Need, without map[*slot]int) (idle []candidate, total int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, s := range c.slots {
		total += s.size()
		if s.refs <= without[s] {
			idle = append(idle, candidate{s, needs[key], s.usage().Used})
		}
	}
	slices.SortFunc(idle, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.need, b.need), a.used.Compare(b.used), cmp.Compare(a.slot.key, b.slot.key))
	})
	return idle, total
}

// remove removes a layer from disk unless it is in use, and returns its size.
func (c *Cache) remove(s *slot) int64 {
	// Not waited for: whoever has it is opening or removing it, and our
	// caller may itself be opening another.
	if !s.mu.TryLock() {
		return 0
	}
	defer s.mu.Unlock()
	c.mu.Lock()
	n, inUse := s.disk.bytes, s.refs > 0 || s.content != nil
	stale := c.slots[s.key] != s // removed by another, and perhaps there anew
	c.mu.Unlock()
	if inUse || stale {
		return 0
	}
	// An Acquire from here on waits for slot.mu, and finds nothing.
	if err := discard(c.dirOf(s.key)); err != nil {
		c.log.Error("cannot remove a cached layer", "layer", s.key, "error", err)
		return 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.disk = onDisk{}
	if s.refs == 0 {
		delete(c.slots, s.key)
	}
	return n
}
