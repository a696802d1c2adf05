package disks

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sluice/internal/durable"
	"sluice/internal/node/mount"
	"sluice/oci"
)

// image is an image of this node.
type image struct {
	id     oci.Digest
	record record  // never changes
	disks  []*disk // of the layers, the lowest first; never changes

	// What follows is guarded by Manager.mu.
	created time.Time
	origins []origin       // where it was found, the newest first
	holders map[string]int // how many layers, from the lowest on, an owner holds
	used    time.Time
	removed bool // it, or some of its layers, was held and isn't any more
	kept    int  // who were told that it's here, and haven't used that yet
}

// record says what an image is. Its digest is the image's ID.
type record struct {
	Manifest oci.Digest    `json:"manifest"`
	Layers   []layerRecord `json:"layers"` // the lowest first
}

// layerRecord is a layer of a record.
type layerRecord struct {
	Digest oci.Digest `json:"digest"` // of the layer's blob
	DiffID oci.Digest `json:"diffID"`
	Disk   content    `json:"disk"`
}

// id returns the digest of a record.
func (r record) id() oci.Digest {
	doc, err := json.Marshal(r)
	if err != nil {
		panic(err) // strings and numbers only
	}
	return oci.DigestOf(doc)
}

// origin is where an image was found.
type origin struct {
	Reference  string   `json:"reference"`
	Registry   string   `json:"registry"`
	Repository string   `json:"repository"`
	Paths      []string `json:"paths"` // of the layers' disks in the repository's share
}

func (o origin) repo() repoName { return repoName{o.Registry, o.Repository} }

// maxOrigins bounds the places that are remembered of an image.
const maxOrigins = 8

// stored is what an image's file has.
type stored struct {
	Record  record    `json:"record"`
	Created time.Time `json:"created"`
	Origins []origin  `json:"origins"`
}

// maxStored bounds an image's file, in bytes.
const maxStored = 8 << 20

// newImage returns an image of a record, whose disks it gets from the caller.
func newImage(r record, disks []*disk) *image {
	return &image{id: r.id(), record: r, disks: disks, holders: make(map[string]int), used: time.Now()}
}

// public returns what callers see of img. The caller has Manager.mu.
func (img *image) public() mount.Image {
	p := mount.Image{ID: img.id, Manifest: img.record.Manifest, Layered: true}
	if len(img.origins) > 0 {
		p.Reference = img.origins[0].Reference
	}
	for _, l := range img.record.Layers {
		p.DiffIDs = append(p.DiffIDs, l.DiffID)
	}
	return p
}

// held is how many of the layers, from the lowest on, somebody holds. The caller has
// Manager.mu.
func (img *image) held() (n int) {
	for _, layers := range img.holders {
		n = max(n, layers)
	}
	return n
}

// needed is how many of the layers, from the lowest on, somebody may read: all, unless
// another image begins with layers that came with this one, and this one was removed.
// The caller has Manager.mu.
func (img *image) needed() int {
	n := img.held()
	for i, d := range img.disks {
		if d.ownedFor(img.id) {
			n = max(n, i+1)
		}
	}
	if n == 0 && !img.removed { // nobody has come for it yet
		return len(img.disks)
	}
	return n
}

// addOrigin remembers o as the newest origin, and reports whether that's new. The
// caller has Manager.mu.
func (img *image) addOrigin(o origin) bool {
	same := func(p origin) bool {
		return p.Reference == o.Reference && p.repo() == o.repo() && slices.Equal(p.Paths, o.Paths)
	}
	if slices.ContainsFunc(img.origins, same) {
		return false
	}
	img.origins = append([]origin{o}, img.origins...)
	img.origins = img.origins[:min(len(img.origins), maxOrigins)]
	return true
}

// fileName returns the name of one of an image's files.
func (m *Manager) fileName(id oci.Digest, suffix string) string {
	return filepath.Join(m.imagesDir(), id.Encoded()+suffix)
}

// The suffixes of an image's files.
const (
	recordSuffix   = ".json"
	manifestSuffix = ".manifest"
	configSuffix   = ".config"
)

// save writes an image's file.
func (m *Manager) save(img *image) error {
	m.mu.Lock()
	doc, err := json.MarshalIndent(stored{img.record, img.created, img.origins}, "", "  ")
	m.mu.Unlock()
	if err != nil {
		return err
	}
	return durable.WriteFile(m.fileName(img.id, recordSuffix), doc, 0o600)
}

// load reads all images at the start. One that isn't whole is reported: it's pulled
// again when somebody wants it.
func (m *Manager) load() error {
	for _, dir := range []string{m.imagesDir(), m.disksDir()} {
		if err := removeTemp(dir); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(m.imagesDir())
	if err != nil {
		return err
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if !ok {
			continue
		}
		if err := m.loadImage(oci.Digest("sha256:" + name)); err != nil {
			m.log.Error("an image's state can't be used: it is pulled again when it is needed", "image", name, "error", err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.disks, func(_ content, d *disk) bool { return !m.isNeeded(d) }) // of images that aren't whole
	return nil
}

// loadImage reads one image.
func (m *Manager) loadImage(id oci.Digest) error {
	doc, err := durable.ReadFile(m.fileName(id, recordSuffix), maxStored)
	if err != nil {
		return err
	}
	var s stored
	if err := json.Unmarshal(doc, &s); err != nil {
		return err
	}
	if s.Record.id() != id {
		return fmt.Errorf("its record has digest %s", s.Record.id())
	}
	if len(s.Record.Layers) == 0 {
		return errors.New("it has no layers")
	}
	m.mu.Lock() // which nobody else wants yet
	defer m.mu.Unlock()
	var disks []*disk
	for i, l := range s.Record.Layers {
		d := m.diskOf(l.Disk)
		if d.device == nil {
			if d.device, err = d.load(); err != nil {
				return fmt.Errorf("disk of layer %d: %w", i, err)
			}
		}
		disks = append(disks, d)
	}
	img := newImage(s.Record, disks)
	img.created = s.Created
	for _, o := range slices.Backward(s.Origins) {
		if len(o.Paths) == len(disks) {
			img.addOrigin(o)
		}
	}
	m.enter(img)
	return nil
}

// enter makes an image known. The caller has m.mu.
func (m *Manager) enter(img *image) {
	m.images[img.id] = img
	for _, o := range slices.Backward(img.origins) {
		m.known[subject{registry: o.Registry, repository: o.Repository, digest: img.record.Manifest}] = img.id
		for i, d := range img.disks {
			d.addPlace(place{m.repoOf(o.repo()), o.Paths[i]})
		}
	}
}

// forget makes an image unknown. The caller has m.mu.
func (m *Manager) forget(img *image) {
	delete(m.images, img.id)
	for s, id := range m.known {
		if id == img.id {
			delete(m.known, s)
		}
	}
}

// removeTemp removes what a crash left half made in dir.
func removeTemp(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if durable.IsTemp(e.Name()) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}
