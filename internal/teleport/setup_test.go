package teleport

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"sluice/internal/index"
	"sluice/internal/operation"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

const repo = "team/app"

var amd64 = oci.Platform{OS: "linux", Architecture: "amd64"}

// bench is a registry with a directory of disks.
type bench struct {
	t     testing.TB
	store storage.Store
	db    *index.DB
	reg   *stored.Registry
	dir   string
}

func newBench(t testing.TB, opts stored.Options) *bench {
	t.Helper()
	db, err := index.Open(t.Context(), index.Options{URL: "sqlite::memory:"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	b := &bench{t: t, store: new(storage.Memory), db: db, dir: filepath.Join(t.TempDir(), "share")}
	opts.Expand = true
	b.reg = stored.New(b.store, db, opts)
	return b
}

// hurry is timing for tests: a worker of theirs never stands still for as long as its
// lease, but everything else happens soon.
func hurry() operation.Timing {
	return operation.Timing{Lease: time.Minute, Beat: 50 * time.Millisecond, Poll: 10 * time.Millisecond, Pause: 10 * time.Millisecond}
}

// service returns a replica's service, which is in a hurry.
func (b *bench) service(opts Options) *Service {
	b.t.Helper()
	opts.Directory = b.dir
	s, err := newService(b.reg, b.db, opts, hurry())
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

// start runs a service until the test ends or stop is called, which waits.
func start(t testing.TB, s *Service) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { s.Run(ctx) })
	stop = func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return stop
}

// enable has a repository take part, which is made if it isn't there.
func (b *bench) enable(s *Service, repo string) {
	b.t.Helper()
	b.blob(repo, oci.MediaTypeImageConfig, []byte("something"))
	if _, err := s.Change(b.t.Context(), repo, enabled(true)); err != nil {
		b.t.Fatal(err)
	}
}

func enabled(on bool) func(*index.Attributes) error {
	return func(a *index.Attributes) error { a.TeleportEnabled = on; return nil }
}

func waitFor(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
	}
}

// state waits until an image isn't being expanded any more.
func (b *bench) state(s *Service, repo, reference string) State {
	b.t.Helper()
	var state State
	waitFor(b.t, "an expansion", func() bool {
		var err error
		if state, err = s.Find(b.t.Context(), repo, reference, amd64); err != nil {
			b.t.Fatal(err)
		}
		return state.Status != Expanding
	})
	return state
}

// ready waits until an image is expanded.
func (b *bench) ready(s *Service, repo, reference string) []Disk {
	b.t.Helper()
	state := b.state(s, repo, reference)
	if state.Status != Ready {
		b.t.Fatalf("%+v", state)
	}
	return state.Disks
}

// layerTar makes a layer. A name that ends with a slash is a directory of mode
// 0700 (a content says another one), others are files.
func layerTar(entries ...string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(entries); i += 2 {
		name, content := entries[i], entries[i+1]
		h := &tar.Header{Name: name, Size: int64(len(content)), Mode: 0o755, ModTime: time.Unix(1e9, 0)}
		if name[len(name)-1] == '/' {
			h.Typeflag, h.Size, h.Mode = tar.TypeDir, 0, 0o700
			content = ""
		}
		if err := w.WriteHeader(h); err != nil {
			panic(err)
		}
		_, _ = io.WriteString(w, content)
	}
	_ = w.Close()
	return b.Bytes()
}

// hardLink makes a layer with nothing but a hard link.
func hardLink(name, target string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target})
	_ = w.Close()
	return b.Bytes()
}

// noise is content that doesn't compress.
func noise(seed uint64, n int) string {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = r.Read(b)
	return string(b)
}

func (b *bench) blob(repo, mediaType string, content []byte) oci.Descriptor {
	b.t.Helper()
	desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
	if _, err := b.reg.PushBlob(b.t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
		b.t.Fatal(err)
	}
	return desc
}

func (b *bench) manifest(repo, tag, mediaType string, doc any) oci.Descriptor {
	b.t.Helper()
	content, err := json.Marshal(doc)
	if err != nil {
		b.t.Fatal(err)
	}
	if tag == "" {
		tag = oci.DigestOf(content).String()
	}
	desc, err := b.reg.PushManifest(b.t.Context(), repo, tag, mediaType, content)
	if err != nil {
		b.t.Fatal(err)
	}
	return desc
}

// push pushes an image of layers for an architecture.
func (b *bench) push(repo, tag, arch string, tars ...[]byte) oci.Descriptor {
	b.t.Helper()
	return b.pushAs(repo, tag, arch, nil, tars...)
}

// pushAs is push with diff IDs that the config claims.
func (b *bench) pushAs(repo, tag, arch string, diffIDs []oci.Digest, tars ...[]byte) oci.Descriptor {
	b.t.Helper()
	var config oci.ImageConfig
	config.OS, config.Architecture = "linux", arch
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest}
	for _, content := range tars {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		_, _ = w.Write(content)
		_ = w.Close()
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf(content))
		m.Layers = append(m.Layers, b.blob(repo, oci.MediaTypeLayerGzip, z.Bytes()))
	}
	if diffIDs != nil {
		config.RootFS.DiffIDs = diffIDs
	}
	content, err := json.Marshal(config)
	if err != nil {
		b.t.Fatal(err)
	}
	m.Config = b.blob(repo, oci.MediaTypeImageConfig, content)
	return b.manifest(repo, tag, m.MediaType, m)
}

// file returns the path of a disk in a repository.
func (b *bench) file(repo string, d Disk) string {
	return filepath.Join(RepositoryDir(b.dir, repo), layersDir, d.Name+diskSuffix)
}

// files returns how many files a directory of the share has, at any depth.
func (b *bench) files(dir string) int {
	b.t.Helper()
	n := 0
	err := filepath.WalkDir(filepath.Join(b.dir, dir), func(_ string, d os.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil
		}
		if err == nil && !d.IsDir() {
			n++
		}
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return n
}

// sameFile reports whether two names are the same file's.
func sameFile(t testing.TB, a, b string) bool {
	t.Helper()
	one, err := os.Stat(a)
	if err != nil {
		t.Fatal(err)
	}
	two, err := os.Stat(b)
	if err != nil {
		t.Fatal(err)
	}
	return os.SameFile(one, two)
}
