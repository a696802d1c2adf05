package boot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/internal/convert"
	"sluice/internal/node/cache"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/run"
	"sluice/internal/remote"
	"sluice/internal/transfer"
	"sluice/oci"
	"sluice/test/bed"
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

// stage is a registry, the images to be pushed to it, and a link that nodes
// have to it.
type stage struct {
	tools  bed.Tools
	work   string
	server *bed.Registry
	reg    *remote.Registry
	link   *bed.Link
	images *transfer.Archive
}

func newStage(t *testing.T) *stage {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting images and making them needs root")
	}
	work, err := os.MkdirTemp("", "sluice-boot-") // a short path: overlayfs's options have little room
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := bed.UnmountAll(work); err != nil {
			t.Error(err)
			return
		}
		os.RemoveAll(work)
	})
	var unsupported *plane.UnsupportedError
	if _, err := plane.Probe(work); errors.As(err, &unsupported) {
		t.Skip(err)
	}
	s := &stage{work: work}
	ctx, say := t.Context(), func(line string) { t.Log(line) }
	src, err := filepath.Abs("../..")
	must(t, err)
	s.tools, err = bed.BuildTools(ctx, src, say)
	must(t, err)
	layout, err := makeImages(ctx, s.tools, say)
	must(t, err)
	s.images, err = transfer.OpenLayout(ctx, layout)
	must(t, err)
	t.Cleanup(func() { s.images.Close() })
	sluice, err := bed.BuildSluice(ctx, src, work)
	must(t, err)
	// The test converts and strips artifacts itself.
	s.server, err = bed.StartRegistry(ctx, sluice, work, "SLUICE_REGISTRY_PUSH_ALLOW_STREAMING=true")
	must(t, err)
	t.Cleanup(s.server.Stop)
	s.link, err = bed.NewLink(ctx, s.server.Addr, 200e6, 10*time.Millisecond)
	must(t, err)
	t.Cleanup(func() { s.link.Close() })
	s.reg, err = remote.New(s.server.Addr, remote.Options{})
	must(t, err)
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// streamable is an image with its artifact, as the registry has them.
type streamable struct {
	reference string // over the link
	config    oci.ImageConfig
	content   []byte // of the config
	manifest  *artifact.Manifest
	table     *artifact.Table
	pack      []artifact.ChunkRef
}

// push pushes an image and converts it. Without its boot pack it's in another
// repository.
func (s *stage) push(t *testing.T, name string, bare bool) streamable {
	t.Helper()
	ctx, repo := t.Context(), "boot"
	if bare {
		repo = "bare"
	}
	if bare {
		s.mountImage(t, name)
	} else {
		src := transfer.Source{Registry: s.images, Reference: name}
		_, err := transfer.Copy(ctx, transfer.Target{Registry: s.reg, Repo: repo, Tags: []string{name}}, src, transfer.Options{})
		must(t, err)
	}
	image, err := s.reg.ResolveManifest(ctx, repo, name)
	must(t, err)
	if bare {
		s.strip(t, name)
	} else {
		_, err = convert.Convert(ctx, s.reg, repo, name, convert.Options{})
		must(t, err)
	}
	im := streamable{reference: s.link.Addr() + "/" + repo + ":" + name}
	for d, err := range s.reg.Referrers(ctx, repo, image.Digest, oci.ArtifactTypeStreaming) {
		must(t, err)
		m, err := s.reg.GetManifest(ctx, repo, d.Digest.String())
		must(t, err)
		im.manifest, err = artifact.ParseManifest(m.Content)
		must(t, err)
	}
	if im.manifest == nil {
		t.Fatalf("%s has no artifact", name)
	}
	im.content = s.blob(t, repo, im.manifest.Config)
	must(t, json.Unmarshal(im.content, &im.config))
	im.table, err = artifact.OpenTable(ctx, im.manifest.Table, blob.FromBytes(s.blob(t, repo, im.manifest.Table.Blob)))
	must(t, err)
	if im.manifest.BootPack != nil {
		im.pack, err = artifact.ParseBootPackHeader(bytes.NewReader(s.blob(t, repo, *im.manifest.BootPack)))
		must(t, err)
	}
	return im
}

// mountImage puts an image of repository boot into bare, without its content
// coming once more.
func (s *stage) mountImage(t *testing.T, name string) {
	t.Helper()
	got, err := s.reg.GetManifest(t.Context(), "boot", name)
	must(t, err)
	var m oci.ImageManifest
	must(t, json.Unmarshal(got.Content, &m))
	for _, b := range append(m.Layers, m.Config) {
		_, err := s.reg.MountBlob(t.Context(), "boot", "bare", b.Digest)
		must(t, err)
	}
	_, err = s.reg.PushManifest(t.Context(), "bare", name, got.Descriptor.MediaType, got.Content)
	must(t, err)
}

// strip makes the artifact in repository bare: what the one in boot is, without
// its boot pack.
func (s *stage) strip(t *testing.T, name string) {
	t.Helper()
	ctx := t.Context()
	image, err := s.reg.ResolveManifest(ctx, "boot", name)
	must(t, err)
	for d, err := range s.reg.Referrers(ctx, "boot", image.Digest, oci.ArtifactTypeStreaming) {
		must(t, err)
		m, err := s.reg.GetManifest(ctx, "boot", d.Digest.String())
		must(t, err)
		var raw oci.ImageManifest
		must(t, json.Unmarshal(m.Content, &raw))
		raw.Layers = slices.DeleteFunc(raw.Layers, func(l oci.Descriptor) bool { return l.MediaType == artifact.MediaTypeBootPack })
		for _, l := range raw.Layers {
			_, err := s.reg.MountBlob(ctx, "boot", "bare", l.Digest)
			must(t, err)
		}
		content, err := json.Marshal(raw)
		must(t, err)
		_, err = s.reg.PushManifest(ctx, "bare", oci.DigestOf(content).String(), oci.MediaTypeImageManifest, content)
		must(t, err)
	}
}

func (s *stage) blob(t *testing.T, repo string, desc oci.Descriptor) []byte {
	t.Helper()
	r, err := s.reg.GetBlob(t.Context(), repo, desc.Digest)
	must(t, err)
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, desc.Size))
	must(t, err)
	return b
}

// started is what starting an image was like.
type started struct {
	reads []read
	took  time.Duration // from the beginning of the pull to readiness
	bytes int64         // fetched up to then
}

// start streams an image on a node that has nothing, and runs it until it says
// that it's ready.
func (s *stage) start(t *testing.T, im streamable, ready string) started {
	t.Helper()
	dir, err := os.MkdirTemp(s.work, "n")
	must(t, err)
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	content, err := cache.Open(t.Context(), cache.Options{Dir: filepath.Join(dir, "cache"), Log: log})
	must(t, err)
	images, err := fuse.Open(t.Context(), fuse.Options{
		Dir: filepath.Join(dir, "plane"), HolderCommand: []string{"/usr/bin/env", roleVariable + "=holder", os.Args[0]}, Log: log,
	})
	must(t, err)
	rec := &recorder{Plane: images}
	m, err := mount.Open(t.Context(), mount.Options{
		Root: filepath.Join(dir, "node"), Cache: content, Plane: rec, NoFill: true, Log: log,
		Registry: func(host, _ string) (mount.Registry, error) { return remote.New(host, remote.Options{}) },
	})
	must(t, err)
	m.Settled()
	must(t, bed.DropCaches())
	begin := time.Now()
	claim, _, err := m.Mount(t.Context(), mount.Request{Reference: im.reference, PID: os.Getpid()})
	must(t, err)

	ctx, stop := context.WithTimeout(t.Context(), 2*time.Minute)
	defer stop()
	var result started
	out := &awaited{word: strings.ToLower(ready), found: func() {
		result = started{reads: rec.soFar(), took: time.Since(begin), bytes: m.Status(ctx).Traffic.Bytes}
		stop()
	}}
	code, err := run.Run(ctx, run.Container{Rootfs: []string{claim.Path}, Config: im.config, Stdout: out, Stderr: out}, run.Options{
		Dir: filepath.Join(dir, "run"), Runc: s.tools.Runc, Patience: time.Second, Log: log,
	})
	if result.took == 0 {
		t.Errorf("%s never said %q: code %d, %v\n%s", im.reference, ready, code, err, out.text())
	}
	must(t, m.Unmount(context.WithoutCancel(ctx), claim.ID))
	m.SweepMounts(context.WithoutCancel(ctx), time.Now().Add(time.Hour))
	must(t, errors.Join(m.Close(), images.Shutdown(context.WithoutCancel(ctx)), content.Close()))
	return result
}

// awaited is a writer that waits for a word.
type awaited struct {
	word  string // in lower case
	found func()

	mu   sync.Mutex
	seen []byte
	done bool
}

func (a *awaited) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.seen = append(a.seen, p...)
	if !a.done && bytes.Contains(bytes.ToLower(a.seen), []byte(a.word)) {
		a.done = true
		a.found()
	}
	return len(p), nil
}

func (a *awaited) text() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return string(a.seen)
}
