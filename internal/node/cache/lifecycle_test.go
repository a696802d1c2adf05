package cache

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"sluice/internal/artifact"
	"sluice/oci"
)

func TestRelease(t *testing.T) {
	f := newFixture(t, 1, 100_000, 50_000)
	c := openCache(t, Options{})
	asked := make(chan int64, 100)
	l := acquire(t, c, f, gate(f, asked, nil))
	done := make(chan error, 1)
	go func() { done <- checkRead(t.Context(), l, f, 0, 100) }()
	<-asked
	l.Release()
	l.Release()
	if err := <-done; !errors.Is(err, ErrClosed) { // such as ErrTimeout
		t.Errorf("a read that waits: %v, want ErrClosed", err)
	}
	if err := checkRead(t.Context(), l, f, 0, 100); !errors.Is(err, ErrClosed) {
		t.Errorf("a later read: %v, want ErrClosed", err)
	}
	if err := l.Fill(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("a later Fill: %v, want ErrClosed", err)
	}
	l = acquire(t, c, f, f.source())
	mustRead(t, l, f, 0, 100)
}

// TestAcquireReleaseRace opens, reads, releases and prunes one layer at the
// same time.
func TestAcquireReleaseRace(t *testing.T) {
	f := newFixture(t, 1, 200_000, 20_000)
	c := openCache(t, Options{FlushInterval: time.Millisecond})
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 7))
			for range 40 {
				l, err := c.Acquire(t.Context(), f.device(t), f.source(), nil)
				if err != nil {
					t.Error(err)
					return
				}
				if err := checkRead(t.Context(), l, f, rng.Int64N(190_000), 5000); err != nil {
					t.Error(err)
				}
				l.Release()
				if rng.IntN(3) == 0 {
					prune(t, c)
				}
			}
		})
	}
	wg.Wait()
	prune(t, c)
	if u := c.Usage(); u.Bytes != 0 || u.Layers != 0 || u.Acquired != 0 {
		t.Errorf("after Prune: %+v, want nothing", u)
	}
}

func TestEviction(t *testing.T) {
	c := openCache(t, Options{Quota: Space{Bytes: 7 << 19}, FlushInterval: time.Hour})
	c.Settled(nil)
	var fs []*fixture
	for i := range 4 {
		fs = append(fs, newFixture(t, uint64(i), 1<<20, 64<<10))
	}
	held := acquire(t, c, fs[0], fs[0].source()) // the oldest, but in use
	mustRead(t, held, fs[0], 0, 1<<20)
	for _, f := range fs[1:3] {
		l := acquire(t, c, f, f.source())
		if err := l.Fill(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.Release()
		time.Sleep(2 * time.Millisecond) // so that they differ in age
	}
	l := acquire(t, c, fs[3], fs[3].source())
	if err := l.Fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, want := range []bool{true, false, true, true} {
		_, err := os.Stat(c.dirOf(fs[i].device(t).Key))
		if (err == nil) != want {
			t.Errorf("layer %d in the cache: %v, want %v", i, err == nil, want)
		}
	}
	if u := c.Usage(); u.Bytes > u.High || u.Acquired != 2 {
		t.Errorf("usage %+v, want at most the quota and two acquired", u)
	}
	big := newFixture(t, 9, 2<<20, 64<<10)
	lb := acquire(t, c, big, big.source())
	if err := lb.Fill(t.Context()); !errors.Is(err, ErrQuota) {
		t.Errorf("filling beyond the quota: %v, want ErrQuota", err)
	}
	mustRead(t, lb, big, 0, 2<<20) // reading works all the same
	mustRead(t, held, fs[0], 0, 1<<20)
}

func TestOneProcessAtATime(t *testing.T) {
	c := openCache(t, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, Options{Dir: c.opts.Dir}); err == nil {
		t.Fatal("two caches have one directory")
	}
	go func() {
		time.Sleep(50 * time.Millisecond)
		c.Close()
	}()
	second, err := Open(t.Context(), Options{Dir: c.opts.Dir})
	if err != nil {
		t.Fatalf("opening while the first is closing: %v", err)
	}
	second.Close()
}

func TestAcquireChecks(t *testing.T) {
	f, other := newFixture(t, 1, 100_000, 20_000), newFixture(t, 2, 50_000, 20_000)
	c := openCache(t, Options{})
	if _, err := c.Acquire(t.Context(), f.device(t), other.source(), nil); err == nil {
		t.Error("a source of another size was accepted")
	}
	for _, key := range []oci.Digest{"", "sha256:../../etc", "sha256:abc"} {
		d := *f.device(t)
		d.Key = key
		if _, err := c.Acquire(t.Context(), &d, f.source(), nil); err == nil {
			t.Errorf("device key %q was accepted", key)
		}
	}
	for _, change := range []func(*artifact.Device){
		func(d *artifact.Device) { d.Size = -1 },
		func(d *artifact.Device) { d.Chunks = 1 << 30 },
		func(d *artifact.Device) { d.ContentSize = 1 << 60 },
		func(d *artifact.Device) { d.DiffID = "md5:00" },
	} {
		d := *f.device(t)
		change(&d)
		if _, err := c.Acquire(t.Context(), &d, f.source(), nil); err == nil {
			t.Errorf("impossible device %+v was accepted", d)
		}
	}
	if entries, _ := os.ReadDir(c.opts.Dir); len(entries) != 1 { // the lock
		t.Errorf("refused devices left %v", entries)
	}
}

// TestFileModes: what is in layers is nobody else's business.
func TestFileModes(t *testing.T) {
	f := newFixture(t, 1, 100_000, 20_000)
	c := openCache(t, Options{})
	l := acquire(t, c, f, f.source())
	if err := l.Fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	var names []string
	err := filepath.WalkDir(c.opts.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if path != c.opts.Dir && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		if !d.IsDir() {
			names = append(names, d.Name())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	if want := []string{completeFile, dataFile, "lock", stateFile}; !slices.Equal(names, want) {
		t.Errorf("files %v, want %v", names, want)
	}
}

func TestCloseWhileAcquired(t *testing.T) {
	f := newFixture(t, 1, 100_000, 20_000)
	c := openCache(t, Options{})
	l := acquire(t, c, f, f.source())
	mustRead(t, l, f, 0, 100)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	// A fetch that was under way may still answer, rightly.
	err := checkRead(t.Context(), l, f, 0, 100)
	for deadline := time.Now().Add(10 * time.Second); err == nil && time.Now().Before(deadline); {
		err = checkRead(t.Context(), l, f, 0, 100)
	}
	if err == nil || errors.Is(err, errWrongBytes) {
		t.Errorf("reading after Close: %v, want an error", err)
	}
	if _, err := c.Acquire(t.Context(), f.device(t), f.source(), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("acquiring after Close: %v, want ErrClosed", err)
	}
}

func TestRemove(t *testing.T) {
	f, other := newFixture(t, 1, 100_000, 20_000), newFixture(t, 2, 100_000, 20_000)
	c := openCache(t, Options{})
	l, lo := acquire(t, c, f, f.source()), acquire(t, c, other, other.source())
	mustRead(t, l, f, 0, 100_000)
	mustRead(t, lo, other, 0, 100_000)
	lo.Release()
	if n := c.Remove(l.dev.Key); n != 0 {
		t.Errorf("removed %d bytes of a layer in use", n)
	}
	l.Release()
	if n := c.Remove(l.dev.Key); n <= 0 {
		t.Errorf("removing a layer that nobody uses gave back %d bytes", n)
	}
	if n := c.Remove(l.dev.Key); n != 0 {
		t.Errorf("removing it again gave back %d bytes", n)
	}
	if u := c.Usage(); u.Layers != 1 {
		t.Errorf("%d layers are left, want the other one", u.Layers)
	}
}
