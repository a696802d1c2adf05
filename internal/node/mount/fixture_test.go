package mount_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"sluice/internal/blob"
	"sluice/internal/convert"
	"sluice/internal/node/cache"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/plane/planetest"
	"sluice/oci"
	"sluice/oci/ocimem"
)

// The test binary is also the FUSE plane's holder.
const roleVariable = "SLUICE_TEST_ROLE"

func TestMain(m *testing.M) {
	if os.Getenv(roleVariable) == "holder" {
		if err := fuse.RunHolder(context.Background(), os.Args[len(os.Args)-1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

const (
	testHost = "registry.test"
	testRepo = "app/web"
)

// faulty is a registry at the end of an unreliable wire.
type faulty struct {
	*ocimem.Registry
	down      atomic.Bool // answers nothing
	denied    atomic.Bool
	hang      atomic.Bool // never answers
	listings  atomic.Int64
	requests  atomic.Int64
	mu        sync.Mutex
	corrupt   map[oci.Digest]bool // blobs whose last byte is another
	referrers func([]oci.Descriptor) []oci.Descriptor
	asked     func(context.Context, oci.Digest) // before a blob is answered
}

func (f *faulty) fault(ctx context.Context) error {
	f.requests.Add(1)
	switch {
	case f.hang.Load():
		<-ctx.Done()
		return ctx.Err()
	case f.down.Load():
		return errors.New("connection refused")
	case f.denied.Load():
		return oci.ErrUnauthorized
	}
	return nil
}

func (f *faulty) GetManifest(ctx context.Context, repo, ref string) (oci.Manifest, error) {
	if err := f.fault(ctx); err != nil {
		return oci.Manifest{}, err
	}
	m, err := f.Registry.GetManifest(ctx, repo, ref)
	if f.isCorrupt(m.Descriptor.Digest) {
		m.Content = slices.Clone(m.Content)
		m.Content[len(m.Content)-1] ^= 1
	}
	return m, err
}

func (f *faulty) ResolveManifest(ctx context.Context, repo, ref string) (oci.Descriptor, error) {
	if err := f.fault(ctx); err != nil {
		return oci.Descriptor{}, err
	}
	return f.Registry.ResolveManifest(ctx, repo, ref)
}

func (f *faulty) GetBlob(ctx context.Context, repo string, d oci.Digest) (oci.BlobReader, error) {
	return f.GetBlobRange(ctx, repo, d, 0, -1)
}

func (f *faulty) GetBlobRange(ctx context.Context, repo string, d oci.Digest, off, n int64) (oci.BlobReader, error) {
	if err := f.fault(ctx); err != nil {
		return nil, err
	}
	f.mu.Lock()
	asked := f.asked
	f.mu.Unlock()
	if asked != nil {
		asked(ctx, d)
	}
	r, err := f.Registry.GetBlobRange(ctx, repo, d, off, n)
	if err != nil || !f.isCorrupt(d) {
		return r, err
	}
	content, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	content[len(content)-1] ^= 1
	return changed{bytes.NewReader(content), r}, nil
}

type changed struct {
	io.Reader
	oci.BlobReader
}

func (c changed) Read(p []byte) (int, error) { return c.Reader.Read(p) }

func (f *faulty) Referrers(ctx context.Context, repo string, subject oci.Digest, kind string) iter.Seq2[oci.Descriptor, error] {
	f.listings.Add(1)
	return func(yield func(oci.Descriptor, error) bool) {
		if err := f.fault(ctx); err != nil {
			yield(oci.Descriptor{}, err)
			return
		}
		var list []oci.Descriptor
		for d, err := range f.Registry.Referrers(ctx, repo, subject, kind) {
			if err != nil {
				yield(d, err)
				return
			}
			list = append(list, d)
		}
		f.mu.Lock()
		change := f.referrers
		f.mu.Unlock()
		if change != nil {
			list = change(list)
		}
		for _, d := range list {
			if !yield(d, nil) {
				return
			}
		}
	}
}

func (f *faulty) isCorrupt(d oci.Digest) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.corrupt[d]
}

func (f *faulty) setCorrupt(d oci.Digest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.corrupt[d] = true
}

// node is a registry and a node daemon's parts, which can be stopped and
// started again on the same directories.
type node struct {
	t     *testing.T
	root  string
	reg   *faulty
	opts  mount.Options // what start adds nothing to
	m     *mount.Manager
	cache *cache.Cache
	plane *fuse.Plane
}

func newNode(t *testing.T) *node {
	t.Helper()
	t.Parallel() // a node waits a lot
	if os.Getuid() != 0 {
		t.Skip("mounting EROFS and FUSE needs root")
	}
	n := &node{t: t, root: t.TempDir(), reg: &faulty{Registry: ocimem.New(), corrupt: make(map[oci.Digest]bool)}}
	n.opts = mount.Options{NoFill: true, Retry: blob.RetryOptions{Attempts: 2, MinBackoff: time.Millisecond, MaxBackoff: time.Millisecond}}
	t.Cleanup(n.tearDown)
	return n
}

// start is the start of the daemon.
func (n *node) start() *mount.Manager {
	n.t.Helper()
	ctx := context.Background() // a clean-up starts it too
	log := slog.New(slog.NewTextHandler(testWriter{n.t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var err error
	if n.cache, err = cache.Open(ctx, cache.Options{Dir: filepath.Join(n.root, "cache"), FaultTimeout: time.Minute, Log: log}); err != nil {
		n.t.Fatal(err)
	}
	n.plane, err = fuse.Open(ctx, fuse.Options{
		Dir:           filepath.Join(n.root, "plane"),
		HolderCommand: []string{"/usr/bin/env", roleVariable + "=holder", os.Args[0]},
		Log:           log,
	})
	var unsupported *plane.UnsupportedError
	if errors.As(err, &unsupported) {
		n.t.Skip(err)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	opts := n.opts
	if opts.Root == "" {
		opts.Root = filepath.Join(n.root, "node")
	}
	opts.Cache, opts.Plane, opts.Log = n.cache, n.plane, log
	opts.Registry = func(host, _ string) (mount.Registry, error) {
		if host != testHost {
			return nil, fmt.Errorf("no such host %s", host)
		}
		return n.reg, nil
	}
	if n.m, err = mount.Open(ctx, opts); err != nil {
		n.t.Fatal(err)
	}
	return n.m
}

// stop is the orderly end of the daemon. Mounts stay.
func (n *node) stop() {
	n.t.Helper()
	if n.m == nil {
		return
	}
	if err := errors.Join(n.plane.Close(), n.m.Close(), n.cache.Close()); err != nil {
		n.t.Error(err)
	}
	n.m = nil
}

// reboot is a stop after which no mount is there.
func (n *node) reboot() {
	n.t.Helper()
	n.unmountAll()
	n.end()
	n.m = nil
	if err := os.RemoveAll(filepath.Join(n.root, "plane")); err != nil {
		n.t.Error(err)
	}
}

func (n *node) tearDown() {
	if n.plane == nil {
		return // never started
	}
	n.unmountAll()
	if n.m == nil {
		n.m = n.start() // to end the holder
		n.unmountAll()
	}
	n.end()
}

// end ends everything, the holder and the FUSE mount too.
func (n *node) end() {
	if err := n.m.Close(); err != nil {
		n.t.Error(err)
	}
	if err := errors.Join(planetest.Shutdown(n.plane, filepath.Join(n.root, "plane")), n.cache.Close()); err != nil {
		n.t.Error(err)
	}
}

// unmountAll unmounts everything beneath the node's root but the plane's own
// mount.
func (n *node) unmountAll() {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.root))
	if err != nil {
		n.t.Error(err)
	}
	slices.Reverse(mounts)
	for _, m := range mounts {
		if strings.HasPrefix(m.Mountpoint, filepath.Join(n.root, "plane")) {
			continue
		}
		if n.plane != nil && n.m != nil && m.FSType == "erofs" && strings.HasPrefix(m.Mountpoint, filepath.Join(n.root, "node", "m")) {
			if n.plane.Detach(context.Background(), m.Mountpoint) == nil {
				continue
			}
		}
		if err := plane.Unmount(m.Mountpoint, true); err != nil {
			n.t.Error(err)
		}
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	if w.t.Context().Err() == nil { // a test that is over takes no logs
		w.t.Log(strings.TrimSpace(string(p)))
	}
	return len(p), nil
}

// file is a file of a test image.
type file struct {
	name    string
	content []byte
	kind    byte   // 0: regular
	link    string // of links
}

// tarOf makes a layer.
func tarOf(t *testing.T, files []file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.content)), Typeflag: tar.TypeReg, Linkname: f.link, ModTime: time.Unix(1700000000, 0)}
		if f.kind != 0 {
			h.Typeflag = f.kind
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// noise returns n bytes that don't compress, the same for the same seed.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, seed))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// testLayers are three layers: the second changes a file of the first and
// removes one, the third adds a file.
func testLayers() [][]file {
	return [][]file{
		{
			{name: "etc/", kind: tar.TypeDir},
			{name: "etc/hello", content: []byte("first")},
			{name: "etc/gone", content: []byte("removed by the second layer")},
			{name: "big", content: noise(1, 3<<20)},
			{name: "bin/", kind: tar.TypeDir},
			{name: "bin/true", content: program()},
		},
		{
			{name: "etc/", kind: tar.TypeDir},
			{name: "etc/hello", content: []byte("second")},
			{name: "etc/.wh.gone"},
		},
		{
			{name: "top", content: noise(2, 700_000)},
			{name: "link", kind: tar.TypeSymlink, link: "top"},
		},
	}
}

// program is some program of this machine, so that there's a boot pack.
func program() []byte {
	content, err := os.ReadFile("/bin/true")
	if err != nil {
		return nil // then there is none
	}
	return content
}

// push pushes an image and, for each platform, its manifest; with more than
// one platform an index too. It returns the descriptors of the manifests, and
// last that of the index.
func (n *node) push(repo, tag string, layers [][]file, platforms ...oci.Platform) []oci.Descriptor {
	n.t.Helper()
	var descs []oci.Descriptor
	for _, p := range platforms {
		descs = append(descs, n.pushOne(repo, tag+"-"+p.Architecture, layers, p))
	}
	if len(platforms) == 1 {
		n.pushManifest(repo, tag, descs[0].MediaType, n.manifest(repo, descs[0].Digest))
		return descs
	}
	index := oci.Index{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex}
	for i, d := range descs {
		d.Platform = &platforms[i]
		index.Manifests = append(index.Manifests, d)
	}
	content, err := json.Marshal(index)
	if err != nil {
		n.t.Fatal(err)
	}
	return append(descs, n.pushManifest(repo, tag, oci.MediaTypeIndex, content))
}

func (n *node) pushOne(repo, tag string, layers [][]file, p oci.Platform) oci.Descriptor {
	config := oci.ImageConfig{Platform: p}
	config.Config.Cmd = []string{"/bin/true"}
	config.RootFS.Type = "layers"
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest}
	for _, files := range layers {
		content := tarOf(n.t, files)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf(content))
		m.Layers = append(m.Layers, n.pushBlob(repo, oci.MediaTypeLayer, content))
	}
	content, err := json.Marshal(config)
	if err != nil {
		n.t.Fatal(err)
	}
	m.Config = n.pushBlob(repo, oci.MediaTypeImageConfig, content)
	if content, err = json.Marshal(m); err != nil {
		n.t.Fatal(err)
	}
	return n.pushManifest(repo, tag, oci.MediaTypeImageManifest, content)
}

func (n *node) pushBlob(repo, mediaType string, content []byte) oci.Descriptor {
	n.t.Helper()
	desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
	if _, err := n.reg.PushBlob(n.t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
		n.t.Fatal(err)
	}
	return desc
}

func (n *node) pushManifest(repo, ref, mediaType string, content []byte) oci.Descriptor {
	n.t.Helper()
	desc, err := n.reg.PushManifest(n.t.Context(), repo, ref, mediaType, content)
	if err != nil {
		n.t.Fatal(err)
	}
	return desc
}

func (n *node) manifest(repo string, d oci.Digest) []byte {
	n.t.Helper()
	m, err := n.reg.Registry.GetManifest(n.t.Context(), repo, d.String())
	if err != nil {
		n.t.Fatal(err)
	}
	return m.Content
}

// convert makes the streaming artifacts of an image.
func (n *node) convert(repo, tag string) convert.Result {
	n.t.Helper()
	result, err := convert.Convert(n.t.Context(), n.reg.Registry, repo, tag, convert.Options{})
	if err != nil {
		n.t.Fatal(err)
	}
	return result
}

var here = oci.Platform{OS: "linux", Architecture: "amd64"}

// prepared returns a node with a converted image, and the image's manifest.
func prepared(t *testing.T) (*node, oci.Digest) {
	t.Helper()
	n := newNode(t)
	n.opts.Platform = here
	desc := n.push(testRepo, "v1", testLayers(), here)[0]
	n.convert(testRepo, "v1")
	return n, desc.Digest
}

// unembed publishes the image's artifact again, with nothing in its manifest
// that a node would otherwise have to fetch, as with big images.
func (n *node) unembed(image oci.Digest) {
	n.t.Helper()
	old := n.artifactOf(image)
	var m oci.ImageManifest
	if err := json.Unmarshal(n.manifest(testRepo, old.Digest), &m); err != nil {
		n.t.Fatal(err)
	}
	for i := range m.Layers {
		m.Layers[i].Data = nil
	}
	m.Config.Data = nil
	content, err := json.Marshal(m)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.reg.DeleteManifest(n.t.Context(), testRepo, old.Digest); err != nil {
		n.t.Fatal(err)
	}
	n.pushManifest(testRepo, oci.DigestOf(content).String(), oci.MediaTypeImageManifest, content)
}

const testRef = testHost + "/" + testRepo + ":v1"

// checkImage compares a mounted test image with its layers. Meanwhile no other test
// starts a process, which would have the files open, too, until it has its own program.
func checkImage(t *testing.T, dir string) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	for name, want := range map[string][]byte{"etc/hello": []byte("second"), "big": noise(1, 3<<20), "top": noise(2, 700_000), "link": noise(2, 700_000)} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		} else if !bytes.Equal(got, want) {
			t.Errorf("%s differs from the layer's", name)
		}
	}
	if _, err := os.Lstat(filepath.Join(dir, "etc/gone")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a removed file: %v", err)
	}
}

// pulled pulls and attaches the test image.
func (n *node) pulled(manifest oci.Digest, owner string) (mount.Image, string) {
	n.t.Helper()
	img, err := n.m.Pull(n.t.Context(), testRef, manifest)
	if err != nil {
		n.t.Fatal(err)
	}
	dir, err := n.m.Attach(n.t.Context(), img.ID, mount.Merged, owner)
	if err != nil {
		n.t.Fatal(err)
	}
	return img, dir
}

// unmount ends a claim whose files have been closed. A process that another test
// starts at that moment has them too, until it has its own program.
func unmount(t *testing.T, m *mount.Manager, name string) {
	t.Helper()
	eventually(t, name+" is unmounted", func() bool {
		err := m.Unmount(t.Context(), name)
		if err != nil && !errors.Is(err, plane.ErrBusy) {
			t.Fatal(err)
		}
		return err == nil
	})
}

// eventually waits for a condition that background work brings about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came about that %s", what)
		}
	}
}
