package mount

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"sluice/internal/node/cache"
	"sluice/oci"
)

// Status is what a node's operator may want to know.
type Status struct {
	Images  []ImageStatus `json:"images"` // by reference
	Claims  []Claim       `json:"claims"` // by creation
	Pulls   []Outcome     `json:"pulls"`  // the last ones, oldest first
	Traffic Traffic       `json:"traffic"`
	Cache   CacheStatus   `json:"cache"`
}

// ImageStatus is the status of one image.
type ImageStatus struct {
	Artifact  oci.Digest   `json:"artifact"`
	Reference string       `json:"reference"`
	Manifest  oci.Digest   `json:"manifest"`
	Layers    int          `json:"layers"`
	Size      int64        `json:"size"`     // bytes of content, decoded
	Cached    int64        `json:"cached"`   // of which are here, about
	Complete  bool         `json:"complete"` // no registry is needed
	Created   time.Time    `json:"created"`
	Holders   int          `json:"holders"`
	Mounts    []PartStatus `json:"mounts"`
	Problem   string       `json:"problem,omitempty"` // why the rest doesn't come
}

// PartStatus is the status of one mounted part of an image.
type PartStatus struct {
	Part   string   `json:"part"`
	Path   string   `json:"path"`
	Owners []string `json:"owners"`
}

// Traffic is what was asked of registries since the start, boot packs and
// metadata included.
type Traffic struct {
	Requests int64 `json:"requests"`
	Failures int64 `json:"failures"`
	Bytes    int64 `json:"bytes"`
}

// CacheStatus is the cache's usage.
type CacheStatus struct {
	Bytes   int64 `json:"bytes"`
	Quota   int64 `json:"quota,omitempty"`
	Layers  int   `json:"layers"`
	Faults  int64 `json:"faults"`  // reads that had to wait for content
	Corrupt int64 `json:"corrupt"` // chunks that arrived damaged
}

// Status returns the present status.
func (m *Manager) Status(ctx context.Context) Status {
	m.mu.Lock()
	list := make([]*image, 0, len(m.images))
	for _, img := range m.images {
		list = append(list, img)
	}
	pulls := append([]Outcome{}, m.recent...)
	m.mu.Unlock()

	usage, stats := m.opts.Cache.Usage(), m.opts.Cache.Stats()
	s := Status{
		Images:  []ImageStatus{},
		Pulls:   pulls,
		Claims:  m.Claims(),
		Traffic: Traffic{Requests: m.counter.Requests.Load(), Failures: m.counter.Failures.Load(), Bytes: m.counter.Bytes.Load()},
		Cache:   CacheStatus{Bytes: usage.Bytes, Quota: usage.High, Layers: usage.Layers, Faults: stats.Faults, Corrupt: stats.Corrupt},
	}
	for _, img := range list {
		s.Images = append(s.Images, m.imageStatus(ctx, img))
	}
	slices.SortFunc(s.Images, func(a, b ImageStatus) int {
		return strings.Compare(a.Reference+a.Artifact.String(), b.Reference+b.Artifact.String())
	})
	slices.SortFunc(s.Claims, func(a, b Claim) int { return a.Created.Compare(b.Created) })
	return s
}

func (m *Manager) imageStatus(ctx context.Context, img *image) ImageStatus {
	s := ImageStatus{Artifact: img.id, Layers: len(img.manifest.Layers), Mounts: []PartStatus{}}
	if table, err := m.openTable(ctx, img); err == nil {
		for n, dev := range table.Devices {
			s.Size += dev.ContentSize
			if stored, err := m.stored(ctx, img, n); err == nil {
				// A sparse file's blocks can be a little more than its content.
				s.Cached += min(stored, dev.ContentSize)
			}
		}
	} else {
		s.Problem = err.Error()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p := img.public()
	s.Reference, s.Manifest, s.Created = p.Reference, p.Manifest, img.created
	s.Complete, s.Holders = img.filled, len(img.holders)
	if img.problem != nil {
		s.Problem = img.problem.Error()
	}
	for _, p := range img.points {
		if !p.attached {
			continue
		}
		owners := make([]string, 0, len(p.owners))
		for o := range p.owners {
			owners = append(owners, o)
		}
		slices.Sort(owners)
		s.Mounts = append(s.Mounts, PartStatus{Part: p.part.String(), Path: p.dir, Owners: owners})
	}
	slices.SortFunc(s.Mounts, func(a, b PartStatus) int { return strings.Compare(a.Part, b.Part) })
	return s
}

// Usage returns how many bytes of one layer's content are on the disk.
func (m *Manager) Usage(ctx context.Context, id oci.Digest, layer int) (int64, error) {
	img := m.lookup(id)
	if img == nil {
		return 0, fmt.Errorf("image %s: %w", id, ErrUnknownImage)
	}
	if layer < 0 || layer >= len(img.manifest.Layers) {
		return 0, fmt.Errorf("image %s has no layer %d", id, layer)
	}
	tar, sparse := img.manifest.LayerDevices(layer)
	total, err := m.stored(ctx, img, tar)
	if err == nil && sparse >= 0 {
		var n int64
		n, err = m.stored(ctx, img, sparse)
		total += n
	}
	return total, err
}

// stored returns how much of a device is on the disk. That of a device which
// isn't mounted is remembered, because containerd asks for all, all the time.
func (m *Manager) stored(ctx context.Context, img *image, device int) (int64, error) {
	m.mu.Lock()
	if p := img.points[Merged]; p != nil && device < len(p.layers) {
		n := p.layers[device].Stored() // the merged part has all devices in order
		m.remembered(img)[device] = n
		m.mu.Unlock()
		return n, nil
	}
	if n := m.remembered(img)[device]; n >= 0 && !img.filling {
		m.mu.Unlock()
		return n, nil
	}
	m.mu.Unlock()
	table, err := m.openTable(ctx, img)
	if err != nil {
		return 0, err
	}
	dev := table.Devices[device]
	var l *cache.Layer
	if l, err = m.opts.Cache.Acquire(ctx, dev, m.source(img, dev.Blob), nil); err != nil {
		return 0, err
	}
	defer l.Release()
	m.mu.Lock()
	defer m.mu.Unlock()
	n := l.Stored()
	m.remembered(img)[device] = n
	return n, nil
}

// remembered returns the image's sizes on disk by device, -1 for unknown. The
// caller has m.mu.
func (m *Manager) remembered(img *image) []int64 {
	if img.stored == nil {
		img.stored = make([]int64, img.manifest.Devices())
		for i := range img.stored {
			img.stored[i] = -1
		}
	}
	return img.stored
}
