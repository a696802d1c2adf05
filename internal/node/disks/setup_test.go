package disks

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/internal/layer"
	"sluice/internal/node/cache"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/plane/planetest"
	"sluice/internal/node/smb"
	"sluice/internal/node/smb/smbmem"
	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/internal/teleport/mountapi"
	"sluice/internal/vhd"
	"sluice/oci"
	"sluice/oci/ocimem"
)

// The tests run this binary as the plane's holder.
const roleVariable = "SLUICE_DISKS_TEST_ROLE"

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

const testRepo = "team/app"

// blockSize is the registry's.
const blockSize = 256 << 10

// site is a registry, with the API, and its file server.
type site struct {
	t      testing.TB
	reg    *ocimem.Registry
	files  *smbmem.Server
	server *httptest.Server
	asked  atomic.Int64 // questions to the API

	mu       sync.Mutex
	mounts   map[string]mountapi.Mount           // by repository and reference, with a space between
	password int                                 // of the credential that is given out
	life     time.Duration                       // of that
	answer   func(http.ResponseWriter) (by bool) // instead of the API
}

func newSite(t testing.TB) *site {
	t.Helper()
	s := &site{t: t, reg: ocimem.New(), files: smbmem.New(nil), mounts: make(map[string]mountapi.Mount), life: time.Hour}
	mux := http.NewServeMux()
	mux.Handle("/v2/", registry.NewHandler(s.reg, registry.Options{}))
	mux.HandleFunc(mountapi.Prefix, s.serve)
	s.server = httptest.NewServer(mux)
	t.Cleanup(s.server.Close)
	return s
}

func (s *site) host() string { return strings.TrimPrefix(s.server.URL, "http://") }

func (s *site) serve(w http.ResponseWriter, r *http.Request) {
	s.asked.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.answer != nil && s.answer(w) {
		return
	}
	repo, reference, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, mountapi.Prefix), "/_manifests/")
	m, ok := s.mounts[repo+" "+reference]
	if !ok {
		refuse(w, http.StatusNotFound, mountapi.CodeNotEnabled)
		return
	}
	if m.Format == mountapi.FormatVHD {
		m.SMB = &mountapi.SMB{Server: "files.test", Share: repo, Username: "u", Password: fmt.Sprint("password ", s.password), Expires: time.Now().Add(s.life)}
	}
	if err := json.NewEncoder(w).Encode(m); err != nil {
		s.t.Error(err)
	}
}

// refuse answers with an error.
func refuse(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"no"}]}`, code)
}

// change has the API answer differently about an image.
func (s *site) change(repo, reference string, change func(m *mountapi.Mount)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.mounts[repo+" "+reference]
	m.Layers = slices.Clone(m.Layers)
	for i, l := range m.Layers {
		if l.Sums != nil {
			sums := *l.Sums
			m.Layers[i].Sums = &sums
		}
	}
	change(&m)
	s.mounts[repo+" "+reference] = m
}

// instead has f answer instead of the API; nil: nobody.
func (s *site) instead(f func(http.ResponseWriter)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = func(w http.ResponseWriter) bool { f(w); return true }
	if f == nil {
		s.answer = nil
	}
}

// nextPassword gives out another password; only it is accepted.
func (s *site) nextPassword() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.password++
	s.files.Accept(fmt.Sprint("password ", s.password))
}

// reconnect ends all connections to the file server.
func (s *site) reconnect() {
	s.files.Down()
	s.files.Up()
}

// file is a file of a test image.
type file struct {
	name    string
	content []byte
	kind    byte // 0: regular
}

// tarOf makes a layer.
func tarOf(t testing.TB, files []file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.content)), Typeflag: tar.TypeReg, ModTime: time.Unix(1700000000, 0)}
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

// noise returns n bytes, the same for the same seed.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, seed))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// diskOfTar makes a layer's disk as the registry does.
func diskOfTar(t testing.TB, content []byte) []byte {
	t.Helper()
	tree, err := layer.Read(t.Context(), bytes.NewReader(content), layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	meta, err := artifact.DiskMetadata([]*layer.Tree{tree}, oci.DigestOf(content))
	if err != nil {
		t.Fatal(err)
	}
	return sealed(t, oci.DigestOf(content), append(meta, content...))
}

// sealed makes a VHD of what a disk has.
func sealed(t testing.TB, id oci.Digest, content []byte) []byte {
	t.Helper()
	footer := vhd.Footer{Size: vhd.Capacity(int64(len(content))), ID: vhd.ID(id)}
	sector, err := footer.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return append(append(content, make([]byte, footer.Size-int64(len(content)))...), sector...)
}

func sumsOf(content []byte, size int) (sums []byte) {
	for block := range slices.Chunk(content, size) {
		sum := sha256.Sum256(block)
		sums = append(sums, sum[:]...)
	}
	return sums
}

// share puts a disk on the file server and returns what the API says of it.
func (s *site) share(tar, disk []byte) mountapi.Layer {
	name := "_layers/sha256-" + oci.DigestOf(tar).Encoded()
	sums := sumsOf(disk, blockSize)
	s.files.Put(name+".vhd", disk)
	s.files.Put(name+".sums", sums)
	return mountapi.Layer{
		Digest: oci.DigestOf(tar), DiffID: oci.DigestOf(tar), Size: int64(len(disk)), Path: name + ".vhd", VHDDigest: oci.DigestOf(disk),
		Sums: &mountapi.Sums{Path: name + ".sums", Digest: oci.DigestOf(sums), BlockSize: blockSize},
	}
}

// push pushes an image of layers and shares their disks.
func (s *site) push(repo, tag string, layers ...[]file) oci.Digest {
	s.t.Helper()
	put := func(mediaType string, content []byte) oci.Descriptor {
		desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
		if _, err := s.reg.PushBlob(s.t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
			s.t.Fatal(err)
		}
		return desc
	}
	config := oci.ImageConfig{Platform: oci.Platform{OS: "linux", Architecture: runtime.GOARCH}}
	config.RootFS.Type = "layers"
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest}
	api := mountapi.Mount{Repository: repo, Platform: config.Platform, Format: mountapi.FormatVHD}
	for _, files := range layers {
		content := tarOf(s.t, files)
		m.Layers = append(m.Layers, put(oci.MediaTypeLayer, content))
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf(content))
		api.Layers = append(api.Layers, s.share(content, diskOfTar(s.t, content)))
	}
	doc, err := json.Marshal(config)
	if err != nil {
		s.t.Fatal(err)
	}
	m.Config = put(oci.MediaTypeImageConfig, doc)
	if doc, err = json.Marshal(m); err != nil {
		s.t.Fatal(err)
	}
	desc, err := s.reg.PushManifest(s.t.Context(), repo, tag, m.MediaType, doc)
	if err != nil {
		s.t.Fatal(err)
	}
	api.Digest = desc.Digest
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mounts[repo+" "+tag], s.mounts[repo+" "+desc.Digest.String()] = api, api
	return desc.Digest
}

// node is a node daemon's parts, which can be stopped and started again on the same
// directories.
type node struct {
	*site
	root  string
	opts  Options // what start adds nothing to
	cache cache.Options
	m     *Manager

	patience time.Duration // with the file server
	c        *cache.Cache
	p        *fuse.Plane
}

func newNode(t testing.TB) *node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting EROFS and FUSE needs root")
	}
	if t, ok := t.(*testing.T); ok {
		t.Parallel() // a node waits a lot
	}
	n := &node{site: newSite(t), root: t.TempDir(), patience: 30 * time.Second}
	n.opts = Options{Retry: blob.RetryOptions{Attempts: 2, MinBackoff: time.Millisecond, MaxBackoff: time.Millisecond}}
	n.cache = cache.Options{FaultTimeout: time.Minute}
	t.Cleanup(n.tearDown)
	return n
}

// start is the start of the daemon.
func (n *node) start() *Manager {
	n.t.Helper()
	ctx := context.Background() // a clean-up starts it, too
	log := slog.New(slog.NewTextHandler(testWriter{n.t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var err error
	n.cache.Dir, n.cache.Log = filepath.Join(n.root, "cache"), log
	if n.c, err = cache.Open(ctx, n.cache); err != nil {
		n.t.Fatal(err)
	}
	n.p, err = fuse.Open(ctx, fuse.Options{
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
	opts.Root, opts.Cache, opts.Plane, opts.Log = filepath.Join(n.root, "node"), n.c, n.p, log
	opts.Registry = func(host, _ string) (*remote.Registry, error) {
		return remote.New(host, remote.Options{Credentials: func(context.Context, string) (remote.Credential, error) { return remote.Credential{}, nil }, Retries: -1})
	}
	opts.Share = func(login func(ctx context.Context, refused string) (smb.Login, error)) smb.Share {
		return n.files.Share(smb.Options{Login: login, Timeout: n.patience, Log: log})
	}
	if n.m, err = Open(ctx, opts); err != nil {
		n.t.Fatal(err)
	}
	return n.m
}

// stop is the orderly end of the daemon. Mounts stay.
func (n *node) stop() {
	n.t.Helper()
	if err := errors.Join(n.p.Close(), n.m.Close(), n.c.Close()); err != nil {
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
	if n.p == nil {
		return // never started
	}
	n.unmountAll()
	if n.m == nil {
		n.start() // to end the holder
		n.unmountAll()
	}
	n.end()
}

// end ends everything, the holder and the FUSE mount, too.
func (n *node) end() {
	if err := errors.Join(n.m.Close(), planetest.Shutdown(n.p, filepath.Join(n.root, "plane")), n.c.Close()); err != nil {
		n.t.Error(err)
	}
}

// unmountAll unmounts everything beneath the node's root but the plane's own mount.
func (n *node) unmountAll() {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.root))
	if err != nil {
		n.t.Error(err)
	}
	slices.Reverse(mounts)
	for _, i := range mounts {
		if strings.HasPrefix(i.Mountpoint, filepath.Join(n.root, "plane")) {
			continue
		}
		if n.m != nil && n.p.Detach(context.Background(), i.Mountpoint) == nil {
			continue
		}
		if err := plane.Unmount(i.Mountpoint, true); err != nil {
			n.t.Error(err)
		}
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	if w.t.Context().Err() == nil { // a test that is over takes no logs
		w.t.Log(strings.TrimSpace(string(p)))
	}
	return len(p), nil
}

// ref is the reference of an image in the registry.
func (n *node) ref(repo, tag string) string { return n.host() + "/" + repo + ":" + tag }

// pull pulls an image that can be mounted.
func (n *node) pull(repo, tag string, manifest oci.Digest) mount.Image {
	n.t.Helper()
	img, err := n.m.Pull(n.t.Context(), n.ref(repo, tag), manifest)
	if err != nil {
		n.t.Fatal(err)
	}
	return img
}

// within shows what a stack of directories is, to fn.
func within(t testing.TB, dirs []string, fn func(dir string)) {
	t.Helper()
	at := t.TempDir()
	dirs = append(slices.Clone(dirs), t.TempDir()) // overlayfs wants two
	if err := unix.Mount("overlay", at, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(dirs, ":")); err != nil {
		t.Fatal(err)
	}
	alone(func() {
		defer func() {
			if err := unix.Unmount(at, 0); err != nil {
				t.Error(err)
			}
		}()
		fn(at)
	})
}

// alone opens files of mounts, closed when it returns, while no other test starts a
// process: that would have them, too, until it has its own program.
func alone(open func()) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	open()
}

// tree returns the regular files beneath dir, with their contents.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		content, err := os.ReadFile(path)
		found[name] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// testLayers are three layers: the second changes a file of the first and removes
// one, the third adds one.
func testLayers() [][]file {
	return [][]file{
		{
			{name: "etc/", kind: tar.TypeDir}, {name: "etc/hello", content: []byte("first")},
			{name: "etc/gone", content: []byte("removed by the second layer")}, {name: "big", content: noise(1, 3<<20)},
		},
		{{name: "etc/", kind: tar.TypeDir}, {name: "etc/hello", content: []byte("second")}, {name: "etc/.wh.gone"}},
		{{name: "top", content: noise(2, 700_000)}},
	}
}

// want is what testLayers look like on each other.
func want() map[string]string {
	return map[string]string{"etc/hello": "second", "big": string(noise(1, 3<<20)), "top": string(noise(2, 700_000))}
}

// sparseTar makes a layer with one sparse file in GNU's old form: content, and as many
// zeros.
func sparseTar(name string, content []byte) []byte {
	h := make([]byte, 512)
	octal := func(at, n int, v int64) { copy(h[at:], fmt.Sprintf("%0*o", n-1, v)) }
	copy(h, name)
	octal(100, 8, 0o644)
	octal(108, 8, 0)
	octal(116, 8, 0)
	octal(124, 12, int64(len(content)))
	octal(136, 12, 1e9)
	h[156] = 'S'
	copy(h[257:], "ustar  \x00")
	octal(386, 12, 0)
	octal(398, 12, int64(len(content)))
	octal(410, 12, 2*int64(len(content)))
	octal(422, 12, 0)
	octal(483, 12, 2*int64(len(content)))
	copy(h[148:], "        ")
	sum := int64(0)
	for _, b := range h {
		sum += int64(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	h = append(h, content...)
	h = append(h, make([]byte, -len(h)&511)...)
	return append(h, make([]byte, 1024)...)
}
