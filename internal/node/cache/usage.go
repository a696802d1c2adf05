package cache

import (
	"cmp"
	"context"
	"math"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"sluice/oci"
)

// Usage is what a cache holds, and may.
type Usage struct {
	Bytes    int64 // of disk
	High     int64 // above it layers are evicted; 0: no bound
	Low      int64 // down to it
	Layers   int   // on disk
	Acquired int   // of Layers: in use, so never evicted

	DiskSize, DiskFree int64 // of the file system; 0: can't be told
}

// Usage returns what the cache holds now. Bytes lags behind by what was
// written in the last Options.FlushInterval.
func (c *Cache) Usage() Usage {
	m := c.marks()
	u := Usage{Bytes: m.used}
	if m.high < math.MaxInt64 {
		u.High, u.Low = m.high, m.low
	}
	if d, err := diskOf(c.opts.Dir); err == nil {
		u.DiskSize, u.DiskFree = d.total, d.free
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.slots {
		if s.refs > 0 {
			u.Acquired++
		}
		if s.refs > 0 || s.size() > 0 {
			u.Layers++
		}
	}
	return u
}

// LayerUsage is what a cache has of one layer.
type LayerUsage struct {
	Key         oci.Digest
	Bytes       int64 // of disk
	Content     int64 // of Bytes: of the device's own content, about
	Size        int64 // of the whole device; 0: not known, or quarantined
	Complete    bool  // all of it is here
	Quarantined bool  // it isn't what its digest says, and kept only as a warning
	InUse       bool  // somebody has acquired it
	Used        time.Time
}

// Layers returns all layers in the cache, by key.
func (c *Cache) Layers() []LayerUsage {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]LayerUsage, 0, len(c.slots))
	for _, s := range c.slots {
		all = append(all, s.usage())
	}
	slices.SortFunc(all, func(a, b LayerUsage) int { return cmp.Compare(a.Key, b.Key) })
	return all
}

// Layer returns what the cache has of one layer, without opening its files.
func (c *Cache) Layer(key oci.Digest) (u LayerUsage, found bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.slots[key]
	if s == nil {
		return LayerUsage{Key: key}, false
	}
	return s.usage(), true
}

// usage describes the slot. Cache.mu is held.
func (s *slot) usage() LayerUsage {
	u := LayerUsage{
		Key: s.key, Bytes: s.size(), Content: s.disk.content, Size: s.disk.size, Complete: s.disk.complete, Quarantined: s.disk.quarantined,
		InUse: s.refs > 0, Used: s.used,
	}
	if c := s.content; c != nil {
		u.Content, u.Size = c.stored.Load(), c.size
		u.Complete, u.Quarantined = c.complete.Load(), c.bad.Load() != nil
	}
	if u.InUse {
		u.Used = time.Now()
	}
	return u
}

// size is the slot's disk usage. Cache.mu is held.
func (s *slot) size() int64 {
	if s.content != nil {
		return s.content.stored.Load() + s.content.fileSize()
	}
	return s.disk.bytes
}

// onDisk is what the files of a layer say without being opened.
type onDisk struct {
	bytes, content        int64 // of disk that all of them have, and data
	size                  int64 // of the device
	complete, quarantined bool
}

// inspect looks at the files in a layer's directory.
func inspect(dir string) (d onDisk) {
	f, err := os.Open(dir)
	if err != nil {
		return d
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1) // what can't be listed has no files of ours
	for _, name := range names {
		var st unix.Stat_t
		if unix.Fstatat(int(f.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
			continue
		}
		d.bytes += st.Blocks * 512
		switch name {
		case dataFile:
			d.size, d.content = st.Size, st.Blocks*512
		case completeFile:
			d.complete = true
		case quarantineFile:
			d.quarantined = true
		}
	}
	return d
}

// PruneOptions say what Prune removes. The zero value is all layers that no
// image has.
type PruneOptions struct {
	All    bool      // also layers of images, unless somebody has acquired them
	Keep   int64     // stop when the cache has no more bytes than this
	Before time.Time // only layers that were last used before then; zero: any
	DryRun bool      // remove nothing

	// Without is for a dry run: what would be if these, of which the caller
	// knows that nobody needs them, were released first.
	Without []*Layer
}

// Why Prune kept a layer.
const (
	KeptInUse  = "in use"
	KeptPinned = "pinned"
	KeptNeeded = "an image has it"
	KeptRecent = "used recently"
	KeptRoom   = "there is room"
	KeptFailed = "can't be removed, see the log"
)

// Pruned is what Prune did, or would do.
type Pruned struct {
	Removed []LayerUsage
	Kept    []KeptLayer
}

// KeptLayer is a layer and why it was kept.
type KeptLayer struct {
	LayerUsage
	Why string
}

// Prune removes layers that nobody has acquired and no image needs, least
// recently used first, also quarantined ones. Before Settled it removes nothing,
// and returns ErrUnsettled. When ctx ends, Prune does too, with ctx's error and
// what it did.
func (c *Cache) Prune(ctx context.Context, opts PruneOptions) (p Pruned, err error) {
	needs := c.needs.Load()
	if needs == nil {
		return p, ErrUnsettled
	}
	without := make(map[*slot]int)
	if opts.DryRun {
		for _, l := range opts.Without {
			without[l.slot]++
		}
	}
	idle, total := c.idle((*needs)(), without)
	candidates := make(map[oci.Digest]bool, len(idle))
	for _, cand := range idle {
		candidates[cand.slot.key] = true
	}
	for _, u := range c.Layers() {
		if u.InUse && !candidates[u.Key] {
			p.Kept = append(p.Kept, KeptLayer{u, KeptInUse})
		}
	}
	for _, cand := range idle {
		if err := ctx.Err(); err != nil {
			return p, err
		}
		c.mu.Lock()
		u := cand.slot.usage()
		c.mu.Unlock()
		why := ""
		switch {
		case cand.need == Pinned:
			why = KeptPinned
		case cand.need == Needed && !opts.All:
			why = KeptNeeded
		case !opts.Before.IsZero() && !cand.used.Before(opts.Before):
			why = KeptRecent
		case total <= opts.Keep:
			why = KeptRoom
		case !opts.DryRun && c.remove(cand.slot) == 0 && u.Bytes > 0:
			why = KeptFailed
			if now, _ := c.Layer(u.Key); now.InUse {
				why = KeptInUse
			}
		}
		if why != "" {
			p.Kept = append(p.Kept, KeptLayer{u, why})
			continue
		}
		p.Removed = append(p.Removed, u)
		total -= u.Bytes
	}
	return p, nil
}

// Remove removes a layer from disk, unless it is acquired, and returns how many
// bytes that gave back: for content that no image of the node has any more.
func (c *Cache) Remove(key oci.Digest) int64 {
	c.mu.Lock()
	s := c.slots[key]
	c.mu.Unlock()
	if s == nil {
		return 0
	}
	return c.remove(s)
}

// touch records when a layer was used, for eviction after a restart. It may get
// lost: it's a hint.
func touch(dir string, used time.Time) {
	_ = os.Chtimes(dir, used, used)
}
