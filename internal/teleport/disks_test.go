package teleport

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/operation"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

// Disks go with the last image that needs them, whichever repositories these are
// in; soft-deleted images need none.
func TestDisksGoWithTheLastImage(t *testing.T) {
	b := newBench(t, stored.Options{SoftDelete: 24 * time.Hour})
	s := b.service(Options{})
	start(t, s)
	shared, own := layerTar("a", "shared"), layerTar("b", "own")
	b.enable(s, repo)
	b.enable(s, "other")
	one := b.push(repo, "one", "amd64", shared, own)
	b.push(repo, "two", "amd64", shared)
	b.push("other", "three", "amd64", shared)
	b.ready(s, repo, "one")
	b.ready(s, repo, "two")
	b.ready(s, "other", "three")
	if n := b.files(""); n != 3*(2+3) {
		t.Errorf("%d files in the share", n)
	}
	if err := b.reg.DeleteManifest(t.Context(), repo, one.Digest); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the image's own disk", func() bool { return b.files("") == 3*(1+2) })
	b.ready(s, repo, "two")
	if _, err := b.reg.Restore(t.Context(), repo, one.Digest, ""); err != nil {
		t.Fatal(err)
	}
	b.ready(s, repo, "one")
	if err := b.reg.DeleteRepository(t.Context(), repo); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the repository's disks", func() bool { return b.files(reposDir) == 3 })
	if err := s.Tidy(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.ready(s, "other", "three")
	waitFor(t, "the removal of the repository's directory, by whoever began it", func() bool {
		_, err := os.Stat(RepositoryDir(b.dir, repo))
		return errors.Is(err, os.ErrNotExist)
	})
}

// Deletion while an image is being expanded leaves nothing of it, whichever comes first.
func TestDeletedMeanwhile(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{Workers: 2})
	start(t, s)
	b.enable(s, repo)
	b.push(repo, "stays", "amd64", layerTar("stays", "stays"))
	for n := range 10 {
		desc := b.push(repo, "goes", "amd64", layerTar("a", fmt.Sprint("a", n)), layerTar("b", noise(uint64(n), 1<<20)), layerTar("c", fmt.Sprint("c", n)))
		time.Sleep(time.Duration(n) * 3 * time.Millisecond)
		if err := b.reg.DeleteManifest(t.Context(), repo, desc.Digest); err != nil {
			t.Fatal(err)
		}
	}
	b.ready(s, repo, "stays")
	// What an expansion has made that came to nothing goes by a job that comes after its own.
	waitFor(t, "the end of what was deleted", func() bool { return b.jobs() == 0 && b.files("") == 3*2 })
}

// jobs returns how many jobs wait or are being done.
func (b *bench) jobs() int {
	b.t.Helper()
	queued, running, err := b.db.CountJobs(b.t.Context(), stored.ExpandQueues)
	if err != nil {
		b.t.Fatal(err)
	}
	return queued + running
}

// held is a store that stops the first to read an object.
type held struct {
	storage.Store
	key           string // the end of the object's; empty: none
	once          sync.Once
	reached, free chan struct{}
}

func (h *held) Open(ctx context.Context, key string, off, n int64) (storage.Object, error) {
	if h.key != "" && strings.HasSuffix(key, h.key) {
		h.once.Do(func() {
			close(h.reached)
			<-h.free
		})
	}
	return h.Store.Open(ctx, key, off, n)
}

// It leaves nothing either where the disks that nothing needs are looked for before
// the last of the image's own is there.
func TestDeletedAtTheLastLayer(t *testing.T) {
	b := newBench(t, stored.Options{})
	store := &held{Store: b.store, reached: make(chan struct{}), free: make(chan struct{})}
	b.reg = stored.New(store, b.db, stored.Options{Expand: true})
	s := b.service(Options{Workers: 2})
	b.enable(s, repo)
	desc := b.push(repo, "goes", "amd64", layerTar("a", "a"))
	m, err := b.reg.GetManifest(t.Context(), repo, desc.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	info, err := oci.ParseManifestInfo(m.Content, m.Descriptor.MediaType)
	if err != nil {
		t.Fatal(err)
	}
	store.key = info.Blobs[len(info.Blobs)-1].Digest.String()
	start(t, s)
	<-store.reached
	if err := b.reg.DeleteManifest(t.Context(), repo, desc.Digest); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the removal of what nothing needs", func() bool { return b.jobs() == 1 })
	close(store.free)
	waitFor(t, "the end of what the expansion has made", func() bool { return b.jobs() == 0 && b.files("") == 0 })
}

// What an expansion has made that came to nothing goes, but for what other images
// need; and what was whole before stays, whatever becomes of it later.
func TestDisksOfFailuresGo(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{MaxLayer: 1 << 20})
	stop := start(t, s)
	b.enable(s, repo)
	shared, own, large := layerTar("a", "shared"), layerTar("b", "own"), layerTar("c", noise(1, 2<<20))
	good := b.push(repo, "good", "amd64", shared)
	b.ready(s, repo, "good")
	b.push(repo, "bad", "amd64", shared, own, large)
	b.push(repo, "bad-too", "arm64", own, large)
	if state := b.state(s, repo, "bad"); state.Status != Failed {
		t.Errorf("%+v", state)
	}
	waitFor(t, "the disk that nothing needs any more", func() bool { return b.files("") == 3*2 })
	b.ready(s, repo, "good")
	stop()

	s = b.service(Options{MaxLayer: 100})
	start(t, s)
	if err := s.enqueue(t.Context(), repo, good.Digest); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "its failure", func() bool {
		op, err := s.Latest(t.Context(), repo, good.Digest)
		return err == nil && op.Status == operation.StatusFailed
	})
	if err := s.Tidy(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.ready(s, repo, "good")
}

// What a crash leaves is cleared away, and damaged disks are made again.
func TestTidy(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	start(t, s)
	b.enable(s, repo)
	b.push(repo, "v1", "amd64", layerTar("a", "a"))
	d := b.ready(s, repo, "v1")[0]
	name := b.file(repo, d)
	old := filepath.Join(s.share.pool(), ".tmp-old")
	stray := diskName(oci.DigestOf([]byte("stray")), "")
	for _, f := range []string{old, filepath.Join(s.share.pool(), stray+".json"), filepath.Join(filepath.Dir(name), stray+".sums")} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chtimes(old, time.Time{}, time.Now().Add(-48*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := s.Tidy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := b.files(""); n != 6 {
		t.Errorf("%d files are left", n)
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if state := b.state(s, repo, "v1"); state.Status != Absent {
		t.Errorf("with a disk that was truncated: %+v", state)
	}
	b.push(repo, "v1", "amd64", layerTar("a", "a"))
	b.check(repo, b.ready(s, repo, "v1")[0])
}

// Several replicas with one directory expand a layer once, and each knows what the
// others did.
func TestReplicas(t *testing.T) {
	b := newBench(t, stored.Options{})
	replicas := []*Service{b.service(Options{Workers: 2}), b.service(Options{Workers: 2}), b.service(Options{Workers: 2})}
	repos := []string{repo, "other", "third"}
	for _, name := range repos {
		b.enable(replicas[0], name)
	}
	shared := [][]byte{layerTar("a", noise(1, 1<<20)), layerTar("b", "b"), layerTar("c", "c")}
	const images = 4
	for _, name := range repos {
		for n := range images {
			b.push(name, fmt.Sprint("v", n), "amd64", append(shared[:len(shared):len(shared)], layerTar("own", fmt.Sprint(n)))...)
		}
	}
	for _, s := range replicas {
		start(t, s)
	}
	for _, s := range replicas {
		for _, name := range repos {
			for n := range images {
				for _, d := range b.ready(s, name, fmt.Sprint("v", n)) {
					b.check(name, d)
				}
			}
		}
	}
	made := 0
	waitFor(t, "the counts", func() bool {
		made = 0
		all := 0
		for _, s := range replicas {
			made += int(s.expanded.Load())
			all += int(s.expanded.Load() + s.reused.Load())
		}
		return all == len(repos)*images*(len(shared)+1)
	})
	if want := len(shared) + images; made != want {
		t.Errorf("%d layers were expanded %d times", want, made)
	}
}

// When the index was lost and made anew, disks are where they were, and go when they
// should.
func TestIndexMadeAnew(t *testing.T) {
	dir := t.TempDir()
	var desc oci.Descriptor
	visit(t, dir, func(b *bench, s *Service) {
		start(t, s)
		b.enable(s, repo)
		b.push(repo, "stays", "amd64", layerTar("a", "a"))
		desc = b.push(repo, "goes", "amd64", layerTar("a", "a"), layerTar("b", "b"))
		b.ready(s, repo, "stays")
		b.ready(s, repo, "goes")
	})
	lost, err := filepath.Glob(filepath.Join(dir, "index.db*"))
	if err != nil || len(lost) == 0 {
		t.Fatalf("%q, %v", lost, err)
	}
	for _, name := range lost {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	visit(t, dir, func(b *bench, s *Service) {
		if err := b.reg.Rebuild(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if err := s.Tidy(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, tag := range []string{"stays", "goes"} {
			if state, err := s.Find(t.Context(), repo, tag, amd64); err != nil || state.Status != Ready {
				t.Errorf("%s: %+v, %v", tag, state, err)
			}
		}
		start(t, s)
		if err := b.reg.DeleteManifest(t.Context(), repo, desc.Digest); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the disk of what was deleted", func() bool { return b.files("") == 3*2 })
	})
}
