package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/blob"
)

// unreachable is a registry that is gone.
func unreachable(f *fixture) blob.Source {
	return &source{size: int64(len(f.blob)), open: func(context.Context, int64, int64) (io.ReadCloser, error) {
		return nil, errUnreachable
	}}
}

var errUnreachable = errors.New("no route to host")

func TestFill(t *testing.T) {
	f := newFixture(t, 1, 3_000_001, 20_000)
	dir := t.TempDir()
	c := openCache(t, Options{Dir: dir})
	l := acquire(t, c, f, f.source())
	mustRead(t, l, f, 500_000, 100_000)
	if l.Complete() {
		t.Error("complete before anything was filled")
	}
	if err := l.Fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !l.Complete() {
		t.Error("not complete after Fill")
	}
	got, err := os.ReadFile(l.Path())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, f.padded) {
		t.Error("the file isn't the device")
	}
	mustRead(t, l, f, 0, l.Size())
	if err := l.Fill(t.Context()); err != nil {
		t.Errorf("filling what is complete: %v", err)
	}
	l.Release()
	c.Close()

	// Nobody is needed any more, neither the registry nor the chunk table.
	l = acquire(t, openCache(t, Options{Dir: dir}), f, unreachable(f))
	if !l.Complete() {
		t.Fatal("not complete after a restart")
	}
	mustRead(t, l, f, 0, l.Size())
}

func TestFillFailsAndGoesOn(t *testing.T) {
	f := newFixture(t, 1, 1_000_000, 20_000)
	var served atomic.Int64
	src := &source{size: int64(len(f.blob)), open: func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
		served.Add(n)
		return f.source().ReadRange(ctx, off, min(n, 100_000))
	}}
	l := acquire(t, openCache(t, Options{}), f, src)
	failures := 0
	for ; !l.Complete() && failures < 100; failures++ {
		before := l.Stored()
		if err := l.Fill(t.Context()); err == nil {
			break
		} else if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatal(err)
		}
		if l.Stored() <= before {
			t.Fatal("a Fill that was cut off kept nothing")
		}
	}
	if !l.Complete() || failures == 0 {
		t.Errorf("complete: %v after %d failures", l.Complete(), failures)
	}
}

// TestFillStandsBack: while a read waits, Fill takes next to nothing.
func TestFillStandsBack(t *testing.T) {
	f := newFixture(t, 1, 2_000_000, 20_000)
	synctest.Test(t, func(t *testing.T) {
		c := openCache(t, Options{})
		asked, open := make(chan int64, 100), make(chan struct{})
		reader := acquire(t, c, f, gate(f, asked, open))
		filler := acquire(t, c, f, f.source())
		read, fill := make(chan error, 1), make(chan error, 1)
		go func() { read <- checkRead(t.Context(), reader, f, 1_500_000, 100) }()
		<-asked
		go func() { fill <- filler.Fill(t.Context()) }()
		time.Sleep(maxYield / 2)
		if n := filler.Stored(); n > 0 {
			t.Errorf("Fill stored %d bytes while a read was waiting", n)
		}
		close(open)
		if err := <-read; err != nil {
			t.Error(err)
		}
		if err := <-fill; err != nil {
			t.Error(err)
		}
	})
}

func TestFillBandwidth(t *testing.T) {
	f := newFixture(t, 1, 400_000, 20_000)
	l := acquire(t, openCache(t, Options{FillBandwidth: 400_000}), f, f.source())
	began := time.Now()
	if err := l.Fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	least := time.Duration(float64(len(f.blob)-64<<10) / 400_000 * float64(time.Second))
	if d := time.Since(began); d < least {
		t.Errorf("%d bytes at 400,000/s took %v, want at least %v", len(f.blob), d, least)
	}
}

// TestQuarantine: chunks that are all as the chunk table has them, and aren't
// the layer whose digest the artifact claims.
func TestQuarantine(t *testing.T) {
	f := newFixture(t, 1, 1_000_000, 20_000)
	f.encodeTable([32]byte{1, 2, 3}, sha256.Sum256(f.blob))
	dir := t.TempDir()
	c := openCache(t, Options{Dir: dir})
	l := acquire(t, c, f, f.source())
	mustRead(t, l, f, 0, 100_000)
	var ie *IntegrityError
	if err := l.Fill(t.Context()); !errors.As(err, &ie) || ie.Chunk != -1 {
		t.Fatalf("Fill: %v, want an IntegrityError of the layer", err)
	}
	if l.Complete() {
		t.Error("complete though it isn't what it should be")
	}
	for what, err := range map[string]error{
		"ReadAt":  checkRead(t.Context(), l, f, 0, 100),
		"Fill":    l.Fill(t.Context()),
		"Acquire": acquireError(t, c, f),
	} {
		if !errors.As(err, &ie) {
			t.Errorf("%s of a quarantined layer: %v, want an IntegrityError", what, err)
		}
	}
	if _, err := os.Stat(l.Path()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the content is still there: %v", err)
	}
	l.Release()
	c.Close()
	c = openCache(t, Options{Dir: dir})
	if err := acquireError(t, c, f); !errors.As(err, &ie) {
		t.Errorf("Acquire after a restart: %v, want an IntegrityError", err)
	}
	prune(t, c)
	if err := acquireError(t, c, f); err != nil {
		t.Errorf("Acquire after Prune: %v", err)
	}
}

func acquireError(t *testing.T, c *Cache, f *fixture) error {
	l, err := c.Acquire(t.Context(), f.device(t), f.source(), nil)
	if err == nil {
		l.Release()
	}
	return err
}

func TestRestart(t *testing.T) {
	f := newFixture(t, 1, 1_000_000, 20_000)
	dir := t.TempDir()
	c := openCache(t, Options{Dir: dir, ReadAhead: -1})
	l := acquire(t, c, f, f.source())
	mustRead(t, l, f, 300_000, 200_000)
	l.Release()
	c.Close()

	l = acquire(t, openCache(t, Options{Dir: dir}), f, unreachable(f))
	mustRead(t, l, f, 300_000, 200_000)
	if err := checkRead(t.Context(), l, f, 0, 100); !errors.Is(err, errUnreachable) {
		t.Errorf("what was never fetched: %v, want the source's error", err)
	}
}

// TestDamagedOnDisk damages the files of a cache in all kinds of ways. What
// is read afterwards must be right, with the source's help.
func TestDamagedOnDisk(t *testing.T) {
	f := newFixture(t, 1, 500_000, 10_000)
	clean := t.TempDir()
	partial, whole := filepath.Join(clean, "partial"), filepath.Join(clean, "whole")
	var key string
	for _, dir := range []string{partial, whole} {
		c := openCache(t, Options{Dir: dir, ReadAhead: -1})
		l := acquire(t, c, f, f.source())
		mustRead(t, l, f, 100_000, 300_000)
		if dir == whole {
			if err := l.Fill(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		key = filepath.Base(c.dirOf(l.dev.Key))
		l.Release()
		c.Close()
	}
	for name, damage := range map[string]func(dir string) error{
		"no data":          func(dir string) error { return os.Remove(filepath.Join(dir, dataFile)) },
		"no state":         func(dir string) error { return os.Remove(filepath.Join(dir, stateFile)) },
		"short data":       func(dir string) error { return os.Truncate(filepath.Join(dir, dataFile), 300_000) },
		"long data":        func(dir string) error { return os.Truncate(filepath.Join(dir, dataFile), 3_000_000) },
		"empty data":       func(dir string) error { return os.Truncate(filepath.Join(dir, dataFile), 0) },
		"short state":      func(dir string) error { return os.Truncate(filepath.Join(dir, stateFile), 100) },
		"empty state":      func(dir string) error { return os.Truncate(filepath.Join(dir, stateFile), 0) },
		"long state":       func(dir string) error { return os.Truncate(filepath.Join(dir, stateFile), 1<<40) },
		"state's header":   func(dir string) error { return flip(filepath.Join(dir, stateFile), 50, 1) },
		"state's entries":  func(dir string) error { return flip(filepath.Join(dir, stateFile), stateHeaderSize, 40) },
		"long recent":      recentOnly(func(name string) error { return os.Truncate(name, 1<<40) }),
		"recent's header":  recentOnly(func(name string) error { return flip(name, 40, 1) }),
		"recent's entries": recentOnly(func(name string) error { return flip(name, bootIDSize+stateHeaderSize, 40) }),
		"data is a directory": func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, dataFile)), os.Mkdir(filepath.Join(dir, dataFile), 0o700))
		},
		"another layer's mark": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, completeFile), []byte("sha256:00\n"), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, from := range []string{partial, whole} {
				dir := copyDir(t, from)
				if err := damage(filepath.Join(dir, key)); err != nil {
					t.Fatal(err)
				}
				l := acquire(t, openCache(t, Options{Dir: dir}), f, f.source())
				mustRead(t, l, f, 0, l.Size())
				if err := l.Fill(t.Context()); err != nil {
					t.Error(err)
				}
				mustRead(t, l, f, 0, l.Size())
			}
		})
	}
	// A complete layer's file goes to the kernel unread, so only a partial
	// one's data is checked: torn pages, holes, bit rot.
	t.Run("data", func(t *testing.T) {
		for seed := range uint64(10) {
			dir := copyDir(t, partial)
			if err := flip(filepath.Join(dir, key, dataFile), 100_000, int(seed)*20+1); err != nil {
				t.Fatal(err)
			}
			l := acquire(t, openCache(t, Options{Dir: dir}), f, f.source())
			mustRead(t, l, f, 0, l.Size())
			if err := l.Fill(t.Context()); err != nil {
				t.Error(err)
			}
		}
	})
	// Never to happen, since data is synced first; but if a disk lies about
	// that, it's found.
	t.Run("state is ahead of data", func(t *testing.T) {
		dir := copyDir(t, partial)
		b, err := os.ReadFile(filepath.Join(whole, key, stateFile))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, key, stateFile), b, 0o600); err != nil {
			t.Fatal(err)
		}
		l := acquire(t, openCache(t, Options{Dir: dir}), f, f.source())
		mustRead(t, l, f, 0, l.Size())
		if n := l.cache.Stats().Requests; n == 0 {
			t.Error("nothing was fetched again")
		}
	})
	t.Run("data, found by Fill", func(t *testing.T) {
		dir := copyDir(t, partial)
		if err := flip(filepath.Join(dir, key, dataFile), 150_000, 5); err != nil {
			t.Fatal(err)
		}
		l := acquire(t, openCache(t, Options{Dir: dir}), f, f.source())
		if err := l.Fill(t.Context()); err != nil {
			t.Error(err)
		}
		mustRead(t, l, f, 0, l.Size())
	})
}

// recentOnly damages the file recent, which a complete layer doesn't have.
func recentOnly(damage func(name string) error) func(dir string) error {
	return func(dir string) error {
		if err := damage(filepath.Join(dir, recentFile)); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
}

// flip flips bits of n bytes at random places from off on.
func flip(name string, off int64, n int) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(uint64(n), uint64(off)))
	for range n {
		b[off+rng.Int64N(min(int64(len(b))-off, 300_000))] ^= byte(1 + rng.IntN(255))
	}
	return os.WriteFile(name, b, 0o600)
}

// copyDir copies a cache as it is at this moment, file after file, which is
// what a crash leaves: for any two of its files, whichever is newer.
func copyDir(t *testing.T, from string) string {
	t.Helper()
	to := t.TempDir()
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), b, 0o600)
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return to
}
