package mount

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"sluice/internal/node/cache"
	"sluice/oci"
)

// PruneOptions say what Prune removes. The zero value is content that no image
// has.
type PruneOptions struct {
	All       bool          `json:"all,omitempty"`       // also of images that aren't mounted
	OlderThan time.Duration `json:"olderThan,omitempty"` // only what wasn't used for so long, in nanoseconds
	Keep      int64         `json:"keep,omitempty"`      // stop when the cache has no more bytes
	DryRun    bool          `json:"dryRun,omitempty"`
}

// Pruned is what Prune did, or would do.
type Pruned struct {
	Freed   int64         `json:"freed"` // bytes of disk
	Left    int64         `json:"left"`  // what the cache still has
	Removed []PrunedLayer `json:"removed"`
	Kept    []PrunedLayer `json:"kept"`
	DryRun  bool          `json:"dryRun,omitempty"`
}

// PrunedLayer is a layer that was removed or kept, and then why.
type PrunedLayer struct {
	Key    oci.Digest `json:"key"`
	Images []string   `json:"images"` // that have it, by reference
	Bytes  int64      `json:"bytes"`
	Used   time.Time  `json:"used"`
	Why    string     `json:"why,omitempty"`
}

// Prune removes content that nobody uses: never of what is mounted or pinned.
// Images whose content went stay usable; it comes again when it is read, and
// in the background once they are mounted.
func (m *Manager) Prune(ctx context.Context, opts PruneOptions) (Pruned, error) {
	o := cache.PruneOptions{All: opts.All, Keep: opts.Keep, DryRun: opts.DryRun}
	before := time.Now()
	if opts.OlderThan > 0 {
		before = before.Add(-opts.OlderThan)
		o.Before = before
	}
	switch {
	case opts.All && opts.DryRun:
		o.Without = m.lingering(unusedSince(before))
	case opts.All:
		m.SweepMounts(ctx, before)
	}
	names := make(map[oci.Digest]map[string]bool)
	for _, img := range m.list() {
		m.mu.Lock()
		name := img.public().Reference
		m.mu.Unlock()
		for _, key := range m.keys(ctx, img) {
			if names[key] == nil {
				names[key] = make(map[string]bool)
			}
			names[key][name] = true
		}
	}
	done, err := m.opts.Cache.Prune(ctx, o)
	p := Pruned{DryRun: opts.DryRun, Removed: []PrunedLayer{}, Kept: []PrunedLayer{}}
	layer := func(u cache.LayerUsage, why string) PrunedLayer {
		images := slices.Sorted(maps.Keys(names[u.Key]))
		return PrunedLayer{Key: u.Key, Images: append([]string{}, images...), Bytes: u.Bytes, Used: u.Used, Why: why}
	}
	for _, u := range done.Removed {
		p.Freed += u.Bytes
		p.Removed = append(p.Removed, layer(u, ""))
	}
	for _, k := range done.Kept {
		p.Left += k.Bytes
		p.Kept = append(p.Kept, layer(k.LayerUsage, k.Why))
	}
	if !opts.DryRun {
		m.noteEvicted(ctx)
	}
	if err != nil {
		return p, fmt.Errorf("prune, having freed %d bytes: %w", p.Freed, err)
	}
	if p.Freed > 0 && !p.DryRun {
		m.log.InfoContext(ctx, "content that nobody uses was removed on request", "layers", len(p.Removed), "bytes", p.Freed)
	}
	return p, nil
}
