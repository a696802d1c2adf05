package cache

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Usage is what a cache holds.
type Usage struct {
	Bytes    int64 // of disk
	Quota    int64 // 0: none
	Layers   int   // on disk
	Acquired int   // of Layers: in use, so never evicted
}

// Usage returns what the cache holds now. Bytes lags behind by what was
// written in the last Options.FlushInterval.
func (c *Cache) Usage() Usage {
	c.mu.Lock()
	defer c.mu.Unlock()
	u := Usage{Quota: c.opts.Quota}
	for _, s := range c.slots {
		n := s.size()
		u.Bytes += n
		if s.refs > 0 {
			u.Acquired++
		}
		if s.refs > 0 || n > 0 {
			u.Layers++
		}
	}
	return u
}

// size is the slot's disk usage. Cache.mu is held.
func (s *slot) size() int64 {
	if s.content != nil {
		return s.content.stored.Load() + s.content.fileSize()
	}
	return s.bytes
}

// Prune removes all layers that nobody has acquired, also quarantined ones,
// and returns how many bytes of disk that gave back.
func (c *Cache) Prune() int64 { return c.evict(0) }

// makeRoom evicts what the quota asks for, and one layer if the disk is full.
func (c *Cache) makeRoom() {
	used, quota := c.Usage().Bytes, c.opts.Quota
	var n int64
	if quota > 0 && used > quota {
		n = c.evict(quota)
	}
	if c.full.Swap(false) && n == 0 {
		n = c.evict(max(used-1, 1))
	}
	if n > 0 {
		c.log.Info("evicted layers that nobody uses, to make room", "bytes", n, "quota", quota)
	}
}

// evict removes layers that nobody has acquired, least recently used first,
// until no more than target bytes are used. It returns the bytes removed.
func (c *Cache) evict(target int64) int64 {
	type candidate struct {
		slot *slot
		used time.Time
	}
	var idle []candidate
	var total int64
	c.mu.Lock()
	for _, s := range c.slots {
		total += s.size()
		if s.refs == 0 {
			idle = append(idle, candidate{s, s.used})
		}
	}
	c.mu.Unlock()
	slices.SortFunc(idle, func(a, b candidate) int { return cmp.Or(a.used.Compare(b.used), cmp.Compare(a.slot.key, b.slot.key)) })
	var freed int64
	for _, cand := range idle {
		if target > 0 && total-freed <= target {
			break
		}
		freed += c.remove(cand.slot)
	}
	return freed
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
	n, inUse := s.bytes, s.refs > 0 || s.content != nil
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
	s.bytes = 0
	if s.refs == 0 {
		delete(c.slots, s.key)
	}
	return n
}

// room returns ErrQuota if n more bytes don't fit, after evicting what can be.
func (c *Cache) room(n int64) error {
	if c.opts.Quota <= 0 || c.Usage().Bytes+n <= c.opts.Quota {
		return nil
	}
	c.evict(max(c.opts.Quota-n, 1))
	if c.Usage().Bytes+n <= c.opts.Quota {
		return nil
	}
	return ErrQuota
}

// diskUsage returns how many bytes of disk the files of a layer have.
func diskUsage(dir string) int64 {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	var n int64
	for _, e := range entries {
		var st unix.Stat_t
		if unix.Lstat(filepath.Join(dir, e.Name()), &st) == nil {
			n += st.Blocks * 512
		}
	}
	return n
}
