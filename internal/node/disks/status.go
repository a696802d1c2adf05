package disks

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"sluice/internal/node/cache"
	"sluice/internal/node/mount"
	"sluice/oci"
)

// Status is what a node's operator may want to know.
type Status struct {
	Images []ImageStatus `json:"images"` // by reference
	Disks  []DiskStatus  `json:"disks"`  // of all images, each once, by digest
	Shares []ShareStatus `json:"shares"` // by registry and repository

	Pulls    []mount.Outcome   `json:"pulls"`  // the last ones, oldest first
	Counts   []mount.PullCount `json:"counts"` // of all pulls since the start, by reason
	Attaches Attaches          `json:"attaches"`
	Traffic  mount.Traffic     `json:"traffic"`
	Cache    mount.CacheStatus `json:"cache"`
}

// ImageStatus is the status of one image.
type ImageStatus struct {
	ID        oci.Digest    `json:"id"`
	Reference string        `json:"reference"`
	Manifest  oci.Digest    `json:"manifest"`
	Created   time.Time     `json:"created"`
	Holders   int           `json:"holders"`
	Layers    []LayerStatus `json:"layers"` // the lowest first
}

// LayerStatus says which disk a layer of an image is.
type LayerStatus struct {
	Digest oci.Digest `json:"digest"` // of the layer's blob
	DiffID oci.Digest `json:"diffID"`
	Disk   oci.Digest `json:"disk"`
}

// DiskStatus is the status of one disk.
type DiskStatus struct {
	Digest  oci.Digest `json:"digest"`
	Size    int64      `json:"size"`           // of the VHD, in bytes
	Cached  int64      `json:"cached"`         // of which are here, about
	Path    string     `json:"path,omitempty"` // where it is mounted; empty: it isn't
	Owners  []string   `json:"owners"`
	Problem string     `json:"problem,omitempty"` // why it couldn't be mounted the last time

	Faults   int64         `json:"faults"`   // reads that waited for the share since the start, Failures included
	Failures int64         `json:"failures"` // reads that failed
	Wait     time.Duration `json:"wait"`     // how long all of them waited, added up
	Latency  []int64       `json:"latency"`  // of Faults, by how long they waited; see cache.LatencyBounds
	Bytes    int64         `json:"bytes"`    // that came from the share
}

// ShareStatus is the status of one repository's share.
type ShareStatus struct {
	Registry   string    `json:"registry"`
	Repository string    `json:"repository"`
	Share      string    `json:"share,omitempty"` // HOST[:PORT]/SHARE, as the registry said last; empty: it hasn't been asked since the start
	Expires    time.Time `json:"expires,omitzero"`
	Problem    string    `json:"problem,omitempty"` // of the last read, or of asking for a credential; empty: it works
}

// Status returns the present status.
func (m *Manager) Status(context.Context) Status {
	usage, stats := m.opts.Cache.Usage(), m.opts.Cache.Stats()
	s := Status{
		Images: []ImageStatus{}, Disks: []DiskStatus{}, Shares: []ShareStatus{},
		Traffic: mount.Traffic{Requests: m.counter.Requests.Load(), Failures: m.counter.Failures.Load(), Bytes: m.counter.Bytes.Load()},
		Cache:   mount.CacheStatus{Bytes: usage.Bytes, Quota: usage.High, Layers: usage.Layers, Faults: stats.Faults, Corrupt: stats.Corrupt},
	}
	s.Pulls, s.Counts = m.ledger.Pulls()
	m.mu.Lock()
	defer m.mu.Unlock()
	s.Attaches = m.attaches
	s.Attaches.Latency = slices.Clone(s.Attaches.Latency)
	for _, img := range m.images {
		p := img.public()
		is := ImageStatus{ID: img.id, Reference: p.Reference, Manifest: p.Manifest, Created: img.created, Holders: len(img.holders), Layers: []LayerStatus{}}
		for _, l := range img.record.Layers {
			is.Layers = append(is.Layers, LayerStatus{l.Digest, l.DiffID, l.Disk.Digest})
		}
		s.Images = append(s.Images, is)
	}
	for _, d := range m.disks {
		if d.device != nil {
			s.Disks = append(s.Disks, m.diskStatus(d))
		}
	}
	for _, r := range m.repos {
		s.Shares = append(s.Shares, r.status())
	}
	slices.SortFunc(s.Images, func(a, b ImageStatus) int {
		return strings.Compare(a.Reference+a.ID.String(), b.Reference+b.ID.String())
	})
	slices.SortFunc(s.Disks, func(a, b DiskStatus) int { return cmp.Or(cmp.Compare(a.Digest, b.Digest), cmp.Compare(a.Path, b.Path)) })
	slices.SortFunc(s.Shares, func(a, b ShareStatus) int {
		return cmp.Or(cmp.Compare(a.Registry, b.Registry), cmp.Compare(a.Repository, b.Repository))
	})
	return s
}

// diskStatus describes a disk whose files are here. The caller has m.mu.
func (m *Manager) diskStatus(d *disk) DiskStatus {
	u, _ := m.opts.Cache.Layer(d.device.Key)
	reads := d.meter.Read()
	s := DiskStatus{
		Digest: d.Digest, Size: d.Size, Cached: min(u.Content, d.Size), Owners: []string{},
		Faults: reads.Faults, Failures: reads.Failures, Wait: reads.Wait, Latency: reads.Latency[:],
	}
	for _, n := range reads.Bytes {
		s.Bytes += n
	}
	if d.attached {
		s.Path = d.point
	}
	for o := range d.owners {
		s.Owners = append(s.Owners, o.name)
	}
	slices.Sort(s.Owners)
	s.Owners = slices.Compact(s.Owners)
	if d.problem != nil {
		s.Problem = d.problem.Error()
	}
	return s
}

// status describes a repository.
func (r *repo) status() ShareStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := ShareStatus{Registry: r.registry, Repository: r.repository, Share: r.server, Expires: r.expires}
	if r.problem != nil {
		s.Problem = r.problem.Error()
	}
	return s
}

// Usage returns how many bytes of one layer's disk are here.
func (m *Manager) Usage(_ context.Context, id oci.Digest, layer int) (int64, error) {
	img, err := m.lookup(id)
	if err != nil {
		return 0, err
	}
	if layer < 0 || layer >= len(img.disks) {
		return 0, fmt.Errorf("image %s has no layer %d", id, layer)
	}
	return m.cachedOf(img.disks[layer]).Content, nil
}

// cachedOf returns what the cache has of a disk.
func (m *Manager) cachedOf(d *disk) cache.LayerUsage {
	m.mu.Lock()
	dev := d.device
	m.mu.Unlock()
	if dev == nil {
		return cache.LayerUsage{}
	}
	u, _ := m.opts.Cache.Layer(dev.Key)
	return u
}

// Arrived is an image with how much of its disks is here, about, in bytes. It needs
// no registry.
func (m *Manager) Arrived(_ context.Context, id oci.Digest) (_ mount.Image, here, size int64, err error) {
	img, err := m.lookup(id)
	if err != nil {
		return mount.Image{}, 0, 0, err
	}
	for _, d := range img.disks {
		size += d.Size
		here += min(m.cachedOf(d).Content, d.Size)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return img.public(), here, size, nil
}
