package control_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sluice/internal/node/disks/control"
	"sluice/internal/node/endpoint"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/node/pulled"
	"sluice/oci"
	"sluice/oci/ocimem"
)

const image = "registry.test/team/app:v1"

// disks is Teleport in memory: which images there are, and who has what.
type disks struct {
	mu     sync.Mutex
	err    error // of Pull
	broken error // of Stack
	images map[string]mount.Image
	owners map[string]string // what, by owner
	dir    string
}

func (d *disks) Pull(_ context.Context, ref string, _ oci.Digest) (mount.Image, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	img, ok := d.images[ref]
	if d.err != nil {
		return img, d.err
	}
	if !ok {
		return img, &mount.NotStreaming{Reason: mount.NoStreamingArtifact, Err: errors.New("the repository isn't enabled")}
	}
	return img, nil
}

func (d *disks) known(id oci.Digest) error {
	for _, img := range d.images {
		if img.ID == id {
			return nil
		}
	}
	return errors.New("unknown image")
}

func (d *disks) Hold(_ context.Context, id oci.Digest, _ int, owner string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.known(id); err != nil {
		return err
	}
	d.owners[owner] = "held"
	return nil
}

func (d *disks) Stack(_ context.Context, id oci.Digest, owner string) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := errors.Join(d.known(id), d.broken); err != nil {
		return nil, err
	}
	d.owners[owner] = "mounted"
	return []string{filepath.Join(d.dir, "top"), filepath.Join(d.dir, "base")}, nil
}

func (d *disks) Release(_ context.Context, owner string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.owners, owner)
	return nil
}

func (d *disks) LastPull(string) (mount.Outcome, bool) {
	return mount.Outcome{Time: time.Now(), Requests: 3, Bytes: 4000}, true
}

func (d *disks) Usage(context.Context, oci.Digest, int) (int64, error) { return 1000, nil }
func (d *disks) Collect(context.Context)                               {}
func (d *disks) Config(context.Context, oci.Digest) ([]byte, error) {
	return []byte(`{"os":"linux","architecture":"arm64","variant":"v8"}`), nil
}

// have lists what is held and mounted, without the owners' random parts.
func (d *disks) have() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := []string{}
	for owner, what := range d.owners {
		kind, _, _ := bytes.Cut([]byte(owner), []byte("/"))
		list = append(list, string(kind)+" "+what)
	}
	slices.Sort(list)
	return list
}

// registry is one that can go away.
type registry struct {
	*ocimem.Registry
	down atomic.Bool
}

func (r *registry) GetManifest(ctx context.Context, repo, reference string) (oci.Manifest, error) {
	if r.down.Load() {
		return oci.Manifest{}, syscall.ECONNREFUSED
	}
	return r.Registry.GetManifest(ctx, repo, reference)
}

// push pushes an image of one layer with one file.
func (r *registry) push(t *testing.T, content string) oci.Digest {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "file", Size: int64(len(content)), Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	blob := func(mediaType string, content []byte) oci.Descriptor {
		desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
		if _, err := r.PushBlob(t.Context(), "team/app", desc, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	var config oci.ImageConfig
	config.OS, config.Architecture = "linux", "amd64"
	config.RootFS.DiffIDs = []oci.Digest{oci.DigestOf(b.Bytes())}
	doc, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	m := oci.ImageManifest{MediaType: oci.MediaTypeImageManifest, Layers: []oci.Descriptor{blob(oci.MediaTypeLayer, b.Bytes())}}
	m.SchemaVersion, m.Config = 2, blob(oci.MediaTypeImageConfig, doc)
	if doc, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	desc, err := r.PushManifest(t.Context(), "team/app", "v1", m.MediaType, doc)
	if err != nil {
		t.Fatal(err)
	}
	return desc.Digest
}

// daemon is a server on a socket, with images of both kinds.
type daemon struct {
	t      *testing.T
	root   string
	disks  *disks
	reg    *registry
	server *control.Server
	client *control.Client
	store  *pulled.Store
	stop   func()
}

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	d := &daemon{
		t: t, root: t.TempDir(), reg: &registry{Registry: ocimem.New()},
		disks: &disks{images: make(map[string]mount.Image), owners: make(map[string]string), dir: t.TempDir()},
	}
	d.start()
	t.Cleanup(func() {
		d.stop()
		below, err := plane.MountsBelow(d.root)
		for _, dir := range below {
			err = errors.Join(err, plane.Unmount(dir, true))
		}
		if err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *daemon) start() {
	d.t.Helper()
	var err error
	d.store, err = pulled.Open(d.t.Context(), pulled.Options{
		Root: filepath.Join(d.root, "pulled"), KeepFree: -1, Platform: oci.Platform{OS: "linux", Architecture: "amd64"},
		Registry: func(string, string) (oci.Registry, error) { return d.reg, nil },
	})
	if err != nil {
		d.t.Fatal(err)
	}
	d.server, err = control.Open(d.t.Context(), control.Options{Root: filepath.Join(d.root, "control"), Teleport: d.disks, Ordinary: d.store})
	if err != nil {
		d.t.Fatal(err)
	}
	socket := filepath.Join(d.root, "control.sock")
	l, err := endpoint.Listen(socket)
	if err != nil {
		d.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- endpoint.Serve(ctx, l, d.server.Handler()) }()
	d.client = control.NewClient(socket)
	d.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil && !errors.Is(err, http.ErrServerClosed) {
			d.t.Error(err)
		}
		d.server.Close()
		if err := d.store.Close(); err != nil {
			d.t.Error(err)
		}
	})
}

// teleport makes an image one that can be teleported.
func (d *daemon) teleport(ref string) mount.Image {
	d.disks.mu.Lock()
	defer d.disks.mu.Unlock()
	img := mount.Image{ID: oci.DigestOf([]byte(ref)), Manifest: oci.DigestOf([]byte("manifest of " + ref)), DiffIDs: make([]oci.Digest, 2), Layered: true}
	d.disks.images[ref] = img
	return img
}

// mount mounts an image and returns its stages.
func (d *daemon) mount(req control.Mount) (control.Mounted, []control.Line, error) {
	d.t.Helper()
	if req.Reference == "" {
		req.Reference = image
	}
	var lines []control.Line
	m, err := d.client.Mount(d.t.Context(), req, func(l control.Line) {
		if l.Stage != control.StagePulling {
			lines = append(lines, l)
		}
	})
	return m, lines, err
}

func stages(lines []control.Line) (list []control.Stage) {
	for _, l := range lines {
		list = append(list, l.Stage)
	}
	return list
}

// eventually waits for something to be so.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !so(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}
