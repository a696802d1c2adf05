package transfer_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/transfer"
	"sluice/oci"
	"sluice/oci/ocimem"
)

const large = 24 << 20

// largeImage returns a registry with an image of one large layer.
func largeImage(t *testing.T) (maker, oci.Digest) {
	m := newMaker(t)
	layer := noise(7, large)
	m.image("v1", linux("amd64"), layer)
	return m, oci.DigestOf(layer)
}

// A source whose connections break again and again costs no byte twice.
func TestCutReadsGoOn(t *testing.T) {
	m, digest := largeImage(t)
	src := &faulty{Registry: m.reg, cut: 3<<20 + 17}
	dst := &faulty{Registry: ocimem.New()}
	copyAll(t, transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1"}}, transfer.Source{Registry: src, Repo: m.repo, Reference: "v1"}, transfer.Options{MinBackoff: 1})
	checkImage(t, dst.Registry, repo, "v1")
	if n := src.read.Load(); n > large+large/100 {
		t.Errorf("%d bytes were read for a layer of %d", n, large)
	}
	if n := dst.started.Load(); n != 1 {
		t.Errorf("%d uploads were started", n)
	}
	blobContent(t, dst.Registry, repo, digest)
}

// A target whose connections break keeps what it acknowledged.
func TestCutWritesGoOn(t *testing.T) {
	m, _ := largeImage(t)
	left := int64(5 << 20)
	dst := &faulty{Registry: ocimem.New(), appends: func(n int64) error {
		if left -= n; left < 0 {
			left = 5 << 20
			return errCut
		}
		return nil
	}}
	copyAll(t, transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1"}}, transfer.Source{Registry: m.reg, Repo: m.repo, Reference: "v1"}, transfer.Options{MinBackoff: 1})
	checkImage(t, dst.Registry, repo, "v1")
	if n := dst.sent.Load(); n > large+large/100 {
		t.Errorf("%d bytes were sent for a layer of %d", n, large)
	}
}

func TestGivesUp(t *testing.T) {
	m, _ := largeImage(t)
	calls := 0
	dst := &faulty{Registry: ocimem.New(), appends: func(int64) error { calls++; return errCut }}
	_, err := transfer.Copy(t.Context(), transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1"}},
		transfer.Source{Registry: m.reg, Repo: m.repo, Reference: "v1"}, transfer.Options{MinBackoff: 1, Attempts: 3})
	if !errors.Is(err, errCut) || !strings.Contains(err.Error(), "target") || calls != 3 {
		t.Errorf("after %d attempts: %v", calls, err)
	}
}

// A registry without chunked uploads gets blobs in one request.
func TestTargetWithoutChunks(t *testing.T) {
	m, _ := largeImage(t)
	dst := &faulty{Registry: ocimem.New(), noChunk: true}
	copyAll(t, transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1"}}, transfer.Source{Registry: m.reg, Repo: m.repo, Reference: "v1"}, transfer.Options{MinBackoff: 1})
	checkImage(t, dst.Registry, repo, "v1")
	if dst.single.Load() != 2 {
		t.Errorf("%d blobs were sent whole", dst.single.Load())
	}
}

// interrupted starts a copy and ends it in the middle of the layer.
func interrupted(t *testing.T, m maker, to transfer.Target, dir string) int64 {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	src := &faulty{Registry: m.reg, stop: cancel, stopAt: large / 2}
	_, err := transfer.Copy(ctx, to, transfer.Source{Registry: src, Repo: m.repo, Reference: "v1"}, transfer.Options{StateDir: dir})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if _, err := to.Registry.ResolveManifest(t.Context(), to.Repo, "v1"); err == nil {
		t.Fatal("the tag exists")
	}
	return src.read.Load()
}

// The next run goes on where the one before was interrupted.
func TestInterruptedCopyGoesOn(t *testing.T) {
	m, _ := largeImage(t)
	dst := &faulty{Registry: ocimem.New()}
	to := transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1"}, Name: "registry.example.com"}
	dir := t.TempDir()
	first := interrupted(t, m, to, dir)
	src := &faulty{Registry: m.reg}
	copyAll(t, to, transfer.Source{Registry: src, Repo: m.repo, Reference: "v1"}, transfer.Options{StateDir: dir})
	checkImage(t, dst.Registry, repo, "v1")
	if n := src.read.Load(); first+n > large+large/20 || n < large/3 {
		t.Errorf("%d bytes were read at first and %d then, for a layer of %d", first, n, large)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*", "sha256-*"))
	if err != nil || len(files) > 0 {
		t.Errorf("state that is left: %v, %v", files, err)
	}
	info, err := os.Stat(dir)
	if err != nil || !info.IsDir() {
		t.Error(err)
	}
}

// What an upload holds that isn't the blob's beginning doesn't end in the image.
func TestStrangeUploadBeginsAnew(t *testing.T) {
	m, digest := largeImage(t)
	mem := ocimem.New()
	dst := &faulty{Registry: mem}
	to := transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1"}, Name: "registry.example.com"}
	for name, id := range map[string]func() string{
		"other content": func() string {
			u, err := mem.StartUpload(t.Context(), repo)
			if err != nil {
				t.Fatal(err)
			}
			if err := u.Append(t.Context(), 0, strings.NewReader("something else")); err != nil {
				t.Fatal(err)
			}
			return u.ID()
		},
		"too long": func() string {
			u, err := mem.StartUpload(t.Context(), repo)
			if err != nil {
				t.Fatal(err)
			}
			if err := u.Append(t.Context(), 0, strings.NewReader(strings.Repeat("x", large+1))); err != nil {
				t.Fatal(err)
			}
			return u.ID()
		},
		"forgotten": func() string { return "nonesuch" },
	} {
		dir := t.TempDir()
		interrupted(t, m, to, dir)
		files, err := filepath.Glob(filepath.Join(dir, "*", "sha256-*"))
		if err != nil || len(files) != 1 {
			t.Fatalf("state: %v, %v", files, err)
		}
		if err := os.WriteFile(files[0], []byte(id()), 0o600); err != nil {
			t.Fatal(err)
		}
		copyAll(t, to, transfer.Source{Registry: m.reg, Repo: m.repo, Reference: "v1"}, transfer.Options{StateDir: dir, MinBackoff: 1})
		if blobContent(t, mem, repo, digest); t.Failed() {
			t.Fatal(name)
		}
		if err := mem.DeleteManifest(t.Context(), repo, checkImage(t, mem, repo, "v1").Digest); err != nil {
			t.Fatal(err)
		}
		if err := mem.DeleteBlob(t.Context(), repo, digest); err != nil {
			t.Fatal(err)
		}
	}
}

// Of two copies to one repository at once only one remembers uploads.
func TestStateHasOneOwner(t *testing.T) {
	m, _ := largeImage(t)
	dst := &faulty{Registry: ocimem.New()}
	to := transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1"}, Name: "registry.example.com"}
	dir := t.TempDir()
	inner := 0
	var during error
	src := &faulty{Registry: m.reg, stopAt: large / 2, stop: func() {
		before := dst.started.Load()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		_, during = transfer.Copy(ctx, to, transfer.Source{Registry: m.reg, Repo: m.repo, Reference: "v1"}, transfer.Options{StateDir: dir})
		inner = int(dst.started.Load() - before)
	}}
	copyAll(t, to, transfer.Source{Registry: src, Repo: m.repo, Reference: "v1"}, transfer.Options{StateDir: dir})
	if during != nil || inner != 1 {
		t.Errorf("the copy within started %d uploads: %v", inner, during)
	}
	checkImage(t, dst.Registry, repo, "v1")
}
