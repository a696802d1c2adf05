package mount

import (
	"cmp"
	"context"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"sluice/oci"
)

// DiskUsage is what images have on this node's disk, in bytes.
type DiskUsage struct {
	Images []ImageUsage `json:"images"` // by reference
	Cache  int64        `json:"cache"`  // content of all layers
	Layers int          `json:"layers"`
	// Unneeded is what no image has any more.
	Unneeded int64 `json:"unneeded"`
	// Above High layers are evicted until there's no more than Low. 0: no
	// bound.
	High     int64 `json:"high,omitempty"`
	Low      int64 `json:"low,omitempty"`
	DiskSize int64 `json:"diskSize"`
	DiskFree int64 `json:"diskFree"`
}

// ImageUsage is what one image has on the disk.
type ImageUsage struct {
	Artifact  oci.Digest `json:"artifact"`
	Reference string     `json:"reference"`
	Size      int64      `json:"size"`     // of its content, decoded
	Here      int64      `json:"here"`     // of disk, metadata included
	Shared    int64      `json:"shared"`   // of Here: of layers that other images have, too
	Own       int64      `json:"own"`      // the rest: what removing the image gives back
	Complete  bool       `json:"complete"` // all content is here
	Pinned    bool       `json:"pinned"`
	InUse     bool       `json:"inUse"` // somebody has it mounted
	Used      time.Time  `json:"used"`  // the last time
}

// DiskUsage looks up what is on the disk. It opens no layers.
func (m *Manager) DiskUsage(ctx context.Context) DiskUsage {
	images := m.list()
	keys := make([][]oci.Digest, len(images))
	users := make(map[oci.Digest]int)
	for i, img := range images {
		keys[i] = slices.Compact(slices.Sorted(slices.Values(m.keys(ctx, img)))) // an image can have a layer twice
		for _, key := range keys[i] {
			users[key]++
		}
	}
	u := m.opts.Cache.Usage()
	du := DiskUsage{
		Images: []ImageUsage{}, Cache: u.Bytes, Layers: u.Layers,
		High: u.High, Low: u.Low, DiskSize: u.DiskSize, DiskFree: u.DiskFree,
	}
	for _, l := range m.opts.Cache.Layers() {
		if users[l.Key] == 0 {
			du.Unneeded += l.Bytes
		}
	}
	for i, img := range images {
		du.Images = append(du.Images, m.imageUsage(ctx, img, keys[i], users))
	}
	slices.SortFunc(du.Images, func(a, b ImageUsage) int {
		return cmp.Or(strings.Compare(a.Reference, b.Reference), cmp.Compare(a.Artifact, b.Artifact))
	})
	return du
}

// imageUsage adds up an image with the given layers, each of which has so many
// users.
func (m *Manager) imageUsage(ctx context.Context, img *image, keys []oci.Digest, users map[oci.Digest]int) ImageUsage {
	m.mu.Lock()
	u := ImageUsage{Artifact: img.id, Reference: img.public().Reference, Used: img.created}
	for _, p := range img.points {
		u.InUse = u.InUse || len(p.owners) > 0
	}
	m.mu.Unlock()
	u.Pinned = img.pinned()
	u.Own = dirUsage(img.dir)
	u.Complete = len(keys) > 0
	for _, key := range keys {
		l, _ := m.opts.Cache.Layer(key)
		u.Complete = u.Complete && l.Complete
		if l.Used.After(u.Used) {
			u.Used = l.Used
		}
		if users[key] > 1 {
			u.Shared += l.Bytes
		} else {
			u.Own += l.Bytes
		}
	}
	u.Here = u.Shared + u.Own
	if table, err := m.openTable(ctx, img); err == nil {
		for _, dev := range table.Devices {
			u.Size += dev.ContentSize
		}
	}
	if u.InUse {
		u.Used = time.Now()
	}
	return u
}

// dirUsage returns the bytes of disk that the files in a directory have.
func dirUsage(dir string) (n int64) {
	entries, _ := os.ReadDir(dir) // an image that is just being removed has none
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			continue
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			n += st.Blocks * 512
		}
	}
	return n
}
