package pulled_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"sluice/internal/node/plane"
	"sluice/internal/node/pulled"
	"sluice/oci"
	"sluice/oci/ocimem"
)

const (
	host = "registry.test"
	repo = "team/app"
)

// registry is a registry at the end of a wire that can be cut.
type registry struct {
	*ocimem.Registry
	t       testing.TB
	down    atomic.Bool
	cuts    atomic.Int64 // how many of the next answers with blobs break off halfway
	damaged oci.Digest   // a blob that arrives with a byte changed

	mu    sync.Mutex
	blobs map[oci.Digest]int // how often each was asked for
}

func newRegistry(t testing.TB) *registry {
	return &registry{Registry: ocimem.New(), t: t, blobs: make(map[oci.Digest]int)}
}

func (r *registry) GetManifest(ctx context.Context, repo, reference string) (oci.Manifest, error) {
	if r.down.Load() {
		return oci.Manifest{}, syscall.ECONNREFUSED
	}
	return r.Registry.GetManifest(ctx, repo, reference)
}

func (r *registry) GetBlobRange(ctx context.Context, repo string, digest oci.Digest, offset, length int64) (oci.BlobReader, error) {
	if r.down.Load() {
		return nil, syscall.ECONNREFUSED
	}
	r.mu.Lock()
	r.blobs[digest]++
	r.mu.Unlock()
	b, err := r.Registry.GetBlobRange(ctx, repo, digest, offset, length)
	switch {
	case err != nil:
		return nil, err
	case digest == r.damaged:
		return &damaged{BlobReader: b}, nil
	case r.cuts.Add(-1) >= 0:
		return &cut{b, length / 2}, nil
	}
	return b, nil
}

func (r *registry) asked(digest oci.Digest) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.blobs[digest]
}

// cut is a blob whose connection breaks.
type cut struct {
	oci.BlobReader
	left int64
}

func (c *cut) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, syscall.ECONNRESET
	}
	n, err := c.BlobReader.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	return n, err
}

// damaged is a blob whose last bytes change on the way.
type damaged struct {
	oci.BlobReader
}

func (d *damaged) Read(p []byte) (int, error) {
	n, err := d.BlobReader.Read(p)
	if n > 0 {
		p[n-1] ^= 1
	}
	return n, err
}

func (r *registry) blob(mediaType string, content []byte) oci.Descriptor {
	r.t.Helper()
	desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
	if _, err := r.PushBlob(r.t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
		r.t.Fatal(err)
	}
	return desc
}

func (r *registry) manifest(reference, mediaType string, doc any) oci.Descriptor {
	r.t.Helper()
	content, err := json.Marshal(doc)
	if err != nil {
		r.t.Fatal(err)
	}
	if reference == "" {
		reference = oci.DigestOf(content).String()
	}
	desc, err := r.PushManifest(r.t.Context(), repo, reference, mediaType, content)
	if err != nil {
		r.t.Fatal(err)
	}
	desc.MediaType = mediaType
	return desc
}

// image pushes an image for linux/arch, whose layers are gzip, zstd and plain tars
// in turn. change may do harm.
func (r *registry) image(tag, arch string, docker bool, change func(*oci.ImageManifest, *oci.ImageConfig), tars ...[]byte) oci.Descriptor {
	r.t.Helper()
	config := oci.ImageConfig{}
	config.OS, config.Architecture = "linux", arch
	config.RootFS.Type = "layers"
	m := oci.ImageManifest{MediaType: oci.MediaTypeImageManifest}
	m.SchemaVersion = 2
	types, configType := []string{oci.MediaTypeLayerGzip, oci.MediaTypeLayerZstd, oci.MediaTypeLayer}, oci.MediaTypeImageConfig
	if docker {
		m.MediaType = oci.MediaTypeDockerManifest
		types, configType = []string{oci.MediaTypeDockerLayerGzip, oci.MediaTypeDockerLayerZstd, oci.MediaTypeDockerLayer}, oci.MediaTypeDockerConfig
	}
	for i, content := range tars {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf(content))
		stored := [][]byte{gzipped(r.t, content), zstded(r.t, content), content}[i%3]
		m.Layers = append(m.Layers, r.blob(types[i%3], stored))
	}
	if change != nil {
		change(&m, &config)
	}
	content, err := json.Marshal(config)
	if err != nil {
		r.t.Fatal(err)
	}
	m.Config = r.blob(configType, content)
	return r.manifest(tag, m.MediaType, m)
}

func gzipped(t testing.TB, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zstded(t testing.TB, content []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(content, nil)
}

// tarOf makes a tar with a file for each name and content, in order.
func tarOf(t testing.TB, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		h := &tar.Header{Name: files[i], Size: int64(len(files[i+1])), Mode: 0o755, ModTime: time.Unix(1e9, 0)}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// sparseTar is a layer with a file of which most is a hole, by tar(1).
func sparseTar(t testing.TB) []byte {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off, text := range map[int64]string{0: "head", 1<<20 - 4: "tail"} {
		if _, err := f.WriteAt([]byte(text), off); err != nil {
			t.Fatal(err)
		}
	}
	content, err := exec.Command("tar", "-C", dir, "--sparse", "--format=pax", "-cf", "-", "sparse").Output()
	if err != nil {
		t.Skipf("tar(1) makes no sparse members: %v", err)
	}
	return content
}

// open opens a store that is closed, with nothing mounted, when the test ends.
func open(t testing.TB, root string, reg oci.Registry, opts pulled.Options) *pulled.Store {
	t.Helper()
	opts.Root = root
	opts.Registry = func(h, r string) (oci.Registry, error) { return reg, nil }
	opts.Platform = oci.Platform{OS: "linux", Architecture: "amd64"}
	if opts.KeepFree == 0 {
		opts.KeepFree = -1
	}
	s, err := pulled.Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		below, err := plane.MountsBelow(root)
		for _, dir := range below {
			t.Errorf("%s is still mounted", dir)
			plane.Unmount(dir, true)
		}
		s.Close()
		if err != nil {
			t.Error(err)
		}
	})
	return s
}

func pull(t testing.TB, s *pulled.Store, reference, owner string) pulled.Image {
	t.Helper()
	img, err := s.Pull(t.Context(), reference, owner, nil)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// show mounts an image and returns what it has: names and content of files.
func show(t testing.TB, s *pulled.Store, id oci.Digest) map[string]string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dirs, err := s.Stack(t.Context(), id, "show")
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	err = fs.WalkDir(os.DirFS(dirs[0]), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(filepath.Join(dirs[0], name))
		files[name] = string(content)
		return err
	})
	if err != nil || len(dirs) != 1 {
		t.Errorf("%d directories, %v", len(dirs), err)
	}
	if err := s.Release(t.Context(), "show"); err != nil {
		t.Error(err)
	}
	return files
}

// left lists what a store has on the disk of layers and images.
func left(t testing.TB, root string) string {
	t.Helper()
	var names []string
	for _, pattern := range []string{"layers/*", "layers/.*", "images/*", "images/.*"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			names = append(names, strings.TrimPrefix(f, root+"/"))
		}
	}
	return strings.Join(names, " ")
}
