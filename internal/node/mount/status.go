package mount

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"sluice/internal/blob"
	"sluice/internal/node/cache"
	"sluice/oci"
)

// Status is what a node's operator may want to know.
type Status struct {
	Images []ImageStatus `json:"images"` // by reference
	Claims []Claim       `json:"claims"` // by creation
	Pulls  []Outcome     `json:"pulls"`  // the last ones, oldest first
	Switch Switch        `json:"switch"`

	// NotStreaming are the images that didn't stream when they were last
	// pulled, as far as Pulls goes back, by reference.
	NotStreaming []NotStreamed `json:"notStreaming"`

	Counts  []PullCount `json:"counts"` // of all pulls since the start, by reason
	Traffic Traffic     `json:"traffic"`
	Cache   CacheStatus `json:"cache"`
}

// NotStreamed is an image that was pulled the ordinary way, and why.
type NotStreamed struct {
	Reference string     `json:"reference"`
	Manifest  oci.Digest `json:"manifest,omitempty"`
	Time      time.Time  `json:"time"`
	Reason    Reason     `json:"reason"`
	Meaning   string     `json:"meaning"` // of the reason, for people
	Message   string     `json:"message"` // what happened
	Remedy    string     `json:"remedy"`  // what to do
}

// State is how an image on this node fares.
type State string

// The states. Metrics and status output spell them like this.
const (
	// StateStreaming: content is missing, and comes when it's read or in the
	// background.
	StateStreaming State = "streaming"
	// StateComplete: all of it is here, no registry is needed.
	StateComplete State = "complete"
	// StateQuarantined: a layer isn't what the image's config says. Reads of
	// it fail.
	StateQuarantined State = "quarantined"
	// StateBroken: what the disk has of the image's own files can't be used.
	// It's fetched again when the image is mounted.
	StateBroken State = "broken"
)

// Remedy says, for people, what to do about an image in that state; "" where
// nothing has to be.
func (s State) Remedy() string {
	switch s {
	case StateQuarantined:
		return "convert the image again and remove the layer (sluice node prune); if it stays, distrust the registry"
	case StateBroken:
		return "look at the disk; pull the image again"
	}
	return ""
}

// ImageStatus is the status of one image.
type ImageStatus struct {
	Artifact  oci.Digest   `json:"artifact"`
	State     State        `json:"state"`
	Plane     string       `json:"plane,omitempty"` // what the kernel asks for content: a plane, "files" if nobody; empty: not mounted
	Reference string       `json:"reference"`
	Manifest  oci.Digest   `json:"manifest"`
	Layers    int          `json:"layers"`
	Size      int64        `json:"size"`     // bytes of content, decoded
	Cached    int64        `json:"cached"`   // of which are here, about
	Percent   float64      `json:"percent"`  // that is
	Complete  bool         `json:"complete"` // no registry is needed
	Created   time.Time    `json:"created"`
	Holders   int          `json:"holders"`
	Mounts    []PartStatus `json:"mounts"`
	Problem   string       `json:"problem,omitempty"` // why the rest doesn't come
	Remedy    string       `json:"remedy,omitempty"`  // what to do about it, or about the state
	Traffic   Traffic      `json:"traffic"`           // since the daemon's start
	Reads     Reads        `json:"reads"`             // likewise
}

// Reads is what reading an image's content cost since the daemon's start.
type Reads struct {
	Faults   int64            `json:"faults"`   // reads that waited for content, Failures included
	Failures int64            `json:"failures"` // reads that failed
	Wait     time.Duration    `json:"wait"`     // how long all of them waited, added up
	Latency  []int64          `json:"latency"`  // of Faults, by how long they waited; see cache.LatencyBounds
	Bytes    map[string]int64 `json:"bytes"`    // of layers' blobs that came, by why (cache.Origin)
}

func reads(m cache.Metered) Reads {
	r := Reads{Faults: m.Faults, Failures: m.Failures, Wait: m.Wait, Latency: m.Latency[:], Bytes: make(map[string]int64)}
	for o, n := range m.Bytes {
		r.Bytes[cache.Origin(o).String()] = n
	}
	return r
}

func traffic(c *blob.Counter) Traffic {
	return Traffic{Requests: c.Requests.Load(), Failures: c.Failures.Load(), Bytes: c.Bytes.Load()}
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
	pulls, counts := m.ledger.Pulls()
	m.mu.Lock()
	turned := m.switched()
	m.mu.Unlock()

	usage, stats := m.opts.Cache.Usage(), m.opts.Cache.Stats()
	s := Status{
		Images: []ImageStatus{}, Switch: turned,
		Pulls: pulls, NotStreaming: NotStreamedOf(pulls, Reason.Meaning, Reason.Remedy), Counts: counts,
		Claims:  m.Claims(),
		Traffic: traffic(&m.counter),
		Cache:   CacheStatus{Bytes: usage.Bytes, Quota: usage.High, Layers: usage.Layers, Faults: stats.Faults, Corrupt: stats.Corrupt},
	}
	for _, img := range m.list() {
		s.Images = append(s.Images, m.imageStatus(ctx, img))
	}
	slices.SortFunc(s.Images, func(a, b ImageStatus) int {
		return strings.Compare(a.Reference+a.Artifact.String(), b.Reference+b.Artifact.String())
	})
	slices.SortFunc(s.Claims, func(a, b Claim) int { return a.Created.Compare(b.Created) })
	return s
}

func (m *Manager) imageStatus(ctx context.Context, img *image) ImageStatus {
	s := ImageStatus{
		Artifact: img.id, State: StateStreaming, Layers: len(img.manifest.Layers), Percent: 100, Mounts: []PartStatus{},
		Traffic: traffic(&img.counter), Reads: reads(img.meter.Read()),
	}
	whole := false
	if table, err := m.openTable(ctx, img); err == nil {
		whole = true
		for _, dev := range table.Devices {
			u, _ := m.opts.Cache.Layer(dev.Key)
			s.Size += dev.ContentSize
			// A sparse file's blocks can be a little more than its content.
			s.Cached += min(u.Content, dev.ContentSize)
			whole = whole && u.Complete
			if u.Quarantined {
				s.State = StateQuarantined
			}
		}
	} else {
		s.State, s.Problem = StateBroken, err.Error()
	}
	if s.Size > 0 {
		s.Percent = 100 * float64(s.Cached) / float64(s.Size)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p := img.public()
	s.Reference, s.Manifest, s.Created = p.Reference, p.Manifest, img.created
	s.Complete, s.Holders = img.filled && whole, len(img.holders)
	if s.Complete && s.State == StateStreaming {
		s.State, s.Percent = StateComplete, 100 // sparse files have less than their size
	}
	s.Remedy = s.State.Remedy()
	if img.problem != nil {
		s.Problem = img.problem.Error()
		if s.Remedy == "" {
			s.Remedy = ReasonOf(registryError("", img.problem)).Remedy()
		}
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
		if s.Plane == "" || p.part == Merged {
			s.Plane = m.opts.PlaneName
			if p.direct {
				s.Plane = "files"
			}
		}
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
