package mount

import (
	"context"

	"sluice/internal/artifact"
	"sluice/internal/node/cache"
	"sluice/oci"
)

// needs returns what this node's images want of the cache's layers.
func (m *Manager) needs() map[oci.Digest]cache.Need {
	needs := make(map[oci.Digest]cache.Need)
	for _, img := range m.list() {
		need := cache.Needed
		if img.pinned() {
			need = cache.Pinned
		}
		for _, key := range m.keys(context.Background(), img) {
			needs[key] = max(needs[key], need)
		}
	}
	return needs
}

// list returns all images.
func (m *Manager) list() []*image {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]*image, 0, len(m.images))
	for _, img := range m.images {
		all = append(all, img)
	}
	return all
}

// needed is how many of an image's layers, from the lowest on, somebody may read
// or wants here.
func (m *Manager) needed(img *image) int {
	if img.pinned() {
		return len(img.manifest.Layers)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return img.needed()
}

// devices returns those of an image's devices that somebody may read, or wants
// here.
func (m *Manager) devices(img *image, table *artifact.Table) []*artifact.Device {
	n := m.needed(img)
	if n == len(img.manifest.Layers) {
		return table.Devices
	}
	next, _ := img.manifest.LayerDevices(n)
	return table.Devices[:next]
}

// keys returns the keys of an image's devices that somebody may read, none if
// its chunk table can't be read.
func (m *Manager) keys(ctx context.Context, img *image) []oci.Digest {
	table, err := m.openTable(ctx, img)
	if err != nil {
		return nil
	}
	var keys []oci.Digest
	for _, dev := range m.devices(img, table) {
		keys = append(keys, dev.Key)
	}
	return keys
}

// here looks up an image's layers in the cache: whether all are complete, and
// whether one isn't there at all, as it always is after the first mount until
// it's evicted.
func (m *Manager) here(ctx context.Context, img *image) (complete, evicted bool) {
	complete = true
	for _, key := range m.keys(ctx, img) {
		u, found := m.opts.Cache.Layer(key)
		complete = complete && u.Complete
		evicted = evicted || !found
	}
	return complete, evicted
}

// noteEvicted lets images be filled again that have lost content since they
// were.
func (m *Manager) noteEvicted(ctx context.Context) {
	for _, img := range m.list() {
		complete, _ := m.here(ctx, img)
		m.mu.Lock()
		img.filled = img.filled && complete
		m.mu.Unlock()
	}
}
