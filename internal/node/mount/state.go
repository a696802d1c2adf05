package mount

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/internal/durable"
	"sluice/internal/node/cache"
	"sluice/oci"
)

// image is an image of this node.
type image struct {
	id       oci.Digest
	dir      string
	mount    string             // how the names of its mounts' directories begin
	manifest *artifact.Manifest // never changes

	meter   cache.Meter  // what reading its content costs
	counter blob.Counter // what was asked of registries for it
	watch   atomic.Pointer[watch]

	// opening guards table. It is held while the table is read.
	opening sync.Mutex
	table   *artifact.Table
	tables  *tableSource

	// mending is held while what the disk lost is fetched again, before
	// opening.
	mending sync.Mutex

	// What follows is guarded by Manager.mu.
	origins []origin
	created time.Time
	holders map[string]int // how many layers, from the lowest on, each holds
	points  map[Part]*point
	sound   map[Part]bool // whose metadata is on the disk as it should be
	used    time.Time     // the last Pull, Attach or Release
	removed bool          // somebody held all of it, and nobody does any more
	filling bool
	filled  bool  // all content is here
	problem error // why background work stopped, nil when it didn't

	// gone is closed when the node has the image no more, or after all won't
	// have it: background work for it ends.
	gone chan struct{}
}

// origin is where an image was found.
type origin struct {
	Reference  string     `json:"reference"`
	Registry   string     `json:"registry"`
	Repository string     `json:"repository"`
	Subject    oci.Digest `json:"subject"`
}

// maxOrigins bounds the repositories that an image remembers.
const maxOrigins = 16

func (o origin) subject() subject {
	return subject{registry: o.Registry, repository: o.Repository, digest: o.Subject}
}

// stored is image.json.
type stored struct {
	Artifact oci.Digest `json:"artifact"`
	Mount    string     `json:"mount,omitempty"` // empty: dirName
	Created  time.Time  `json:"created"`
	Origins  []origin   `json:"origins"`
}

// Names in an image's directory.
const (
	fileImage    = "image.json"
	fileManifest = "manifest.json"
	fileTable    = "table"
	fileRoot     = "root"
	fileMerged   = "merged.erofs"
)

// metadataFile is the name of a part's metadata in the image's directory.
func metadataFile(part Part) string { return part.String() + ".erofs" }

// dirName names an image's directory. The digest's first 128 bits tell any two
// of a node's images apart.
func dirName(id oci.Digest) string { return id.Encoded()[:32] }

// shortName is how many digits of its digest the names of an image's mounts
// have at the least.
const shortName = 8

// mountName is how the names of an image's mounts begin: like its digest, and
// like those of no other image here. They are short because overlayfs takes
// them in one page of mount options, and layers of an image may have to be
// mounted one by one, up to 127 of them.
func (m *Manager) mountName(id oci.Digest) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	taken := make(map[string]bool)
	for _, img := range m.images {
		taken[img.mount] = img.id != id
	}
	for n := shortName; n < len(dirName(id)); n++ {
		if name := id.Encoded()[:n]; !taken[name] {
			return name
		}
	}
	return dirName(id)
}

func newImage(id oci.Digest, dir string, manifest *artifact.Manifest) *image {
	return &image{
		id: id, dir: dir, mount: dirName(id), manifest: manifest,
		holders: make(map[string]int), points: make(map[Part]*point), sound: make(map[Part]bool), used: time.Now(),
		gone: make(chan struct{}),
	}
}

// public returns what callers see of img. The caller has m.mu.
func (img *image) public() Image {
	p := Image{ID: img.id}
	if len(img.origins) > 0 {
		p.Reference, p.Manifest = img.origins[0].Reference, img.origins[0].Subject
	}
	for _, l := range img.manifest.Layers {
		p.DiffIDs = append(p.DiffIDs, l.DiffID)
	}
	return p
}

// revive says that somebody wants the image, again. The caller has m.mu.
func (img *image) revive() {
	img.used = time.Now()
	img.filled = img.filled && !img.removed // it may have lost content since
	img.removed = false
}

// held is how many of the layers, from the lowest on, somebody holds. The caller
// has m.mu.
func (img *image) held() (n int) {
	for _, layers := range img.holders {
		n = max(n, layers)
	}
	return n
}

// needed is how many of the layers, from the lowest on, somebody may read. That
// isn't all of them when another image in containerd begins with layers that
// came with this one, and this one is removed. The caller has m.mu.
func (img *image) needed() int {
	n := img.held()
	for part, p := range img.points {
		switch {
		case !p.attached && len(p.owners) == 0 && len(p.lock) > 0:
		case part == Merged:
			return len(img.manifest.Layers)
		default:
			n = max(n, int(part)+1)
		}
	}
	if n == 0 { // nobody has come for it yet
		return len(img.manifest.Layers)
	}
	return n
}

// addOrigin remembers o as the newest origin. It reports whether that's new.
func (img *image) addOrigin(o origin) bool {
	if slices.Contains(img.origins, o) {
		return false
	}
	img.origins = append([]origin{o}, img.origins...)
	if len(img.origins) > maxOrigins {
		img.origins = img.origins[:maxOrigins]
	}
	return true
}

// storedJSON returns the content of image.json. The caller has m.mu.
func (img *image) storedJSON() ([]byte, error) {
	return json.MarshalIndent(stored{Artifact: img.id, Mount: img.mount, Created: img.created, Origins: img.origins}, "", "  ")
}

// load reads all images at the start. A directory that isn't a whole image is
// reported and left alone: somebody may want to look at it, and the next pull
// of the image replaces it.
func (m *Manager) load() error {
	if err := errors.Join(removeTemp(m.imagesDir()), removeTemp(m.claimsDir())); err != nil {
		return err
	}
	entries, err := os.ReadDir(m.imagesDir())
	if err != nil {
		return err
	}
	for _, e := range entries {
		img, err := loadImage(filepath.Join(m.imagesDir(), e.Name()))
		if err != nil {
			m.log.Error("an image's state can't be read: it will be fetched again when it is pulled", "directory", e.Name(), "error", err)
			continue
		}
		if err := removeTemp(img.dir); err != nil {
			m.log.Warn("what a crash left half made stays", "image", img.id, "error", err)
		}
		m.images[img.id] = img
		for _, o := range img.origins {
			m.known[o.subject()] = img.id
		}
	}
	return nil
}

// loadImage reads one image's directory.
func loadImage(dir string) (*image, error) {
	var s stored
	content, err := durable.ReadFile(filepath.Join(dir, fileImage), oci.MaxManifestSize)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(content, &s); err != nil {
		return nil, fmt.Errorf("%s: %w", fileImage, err)
	}
	if content, err = durable.ReadFile(filepath.Join(dir, fileManifest), oci.MaxManifestSize); err != nil {
		return nil, err
	}
	if _, err := oci.ParseDigest(s.Artifact.String()); err != nil || dirName(s.Artifact) != filepath.Base(dir) {
		return nil, fmt.Errorf("%s names %q, which doesn't belong here", fileImage, s.Artifact)
	}
	if got := s.Artifact.Algorithm().FromBytes(content); got != s.Artifact {
		return nil, fmt.Errorf("%s has digest %s, not %s", fileManifest, got, s.Artifact)
	}
	manifest, err := artifact.ParseManifest(content)
	if err != nil {
		return nil, err
	}
	img := newImage(s.Artifact, dir, manifest)
	img.created = s.Created
	if s.Mount != "" {
		if len(s.Mount) < shortName || !strings.HasPrefix(dirName(img.id), s.Mount) {
			return nil, fmt.Errorf("%s names the mounts %q, which doesn't belong here", fileImage, s.Mount)
		}
		img.mount = s.Mount
	}
	for _, o := range s.Origins {
		img.addOrigin(o)
	}
	slices.Reverse(img.origins)
	return img, nil
}

// saveOrigins writes image.json again.
func (m *Manager) saveOrigins(img *image) error {
	m.mu.Lock()
	content, err := img.storedJSON()
	m.mu.Unlock()
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(img.dir, fileImage), content, 0o600)
}

// pointOf splits the name of a mount directory.
func pointOf(name string) (dir string, part Part, ok bool) {
	dir, number, ok := strings.Cut(name, ".")
	if !ok {
		return "", 0, false
	}
	if number == Merged.String() {
		return dir, Merged, true
	}
	var n int
	if _, err := fmt.Sscanf(number, "%d", &n); err != nil || Part(n).String() != number || n < 0 {
		return "", 0, false
	}
	return dir, Part(n), true
}

// exists reports whether a file is there.
func exists(name string) bool {
	_, err := os.Stat(name)
	return !errors.Is(err, os.ErrNotExist)
}
