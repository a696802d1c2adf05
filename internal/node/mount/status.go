package mount

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

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
	whole := false
	if table, err := m.openTable(ctx, img); err == nil {
		whole = true
		for _, dev := range table.Devices {
			u, _ := m.opts.Cache.Layer(dev.Key)
			s.Size += dev.ContentSize
			// A sparse file's blocks can be a little more than its content.
			s.Cached += min(u.Content, dev.ContentSize)
			whole = whole && u.Complete
		}
	} else {
		s.Problem = err.Error()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p := img.public()
	s.Reference, s.Manifest, s.Created = p.Reference, p.Manifest, img.created
	s.Complete, s.Holders = img.filled && whole, len(img.holders)
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

// stored returns how much of a device is on the disk.
func (m *Manager) stored(ctx context.Context, img *image, device int) (int64, error) {
	table, err := m.openTable(ctx, img)
	if err != nil {
		return 0, err
	}
	u, _ := m.opts.Cache.Layer(table.Devices[device].Key)
	return u.Content, nil
}
