package cache

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// childDir tells the test binary that it is to be a kill test's child,
// childKind which.
const (
	childDir  = "SLUICE_CACHE_TEST_DIR"
	childKind = "SLUICE_CACHE_TEST_KIND"
)

// TestKill kills a process that uses a cache, again and again, and checks
// after each time that the cache it left is used and right.
func TestKill(t *testing.T) {
	const kills = 8
	dir := t.TempDir()
	f := newFixture(t, 5, 2_000_000, 10_000)
	rng := rand.New(rand.NewPCG(8, 8))
	kept := false
	for n := range kills {
		killChild(t, dir, busyChild, time.Duration(rng.IntN(60))*time.Millisecond)
		c, err := Open(t.Context(), Options{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		l, err := c.Acquire(t.Context(), f.device(t), f.source(), nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := range f.chunks {
			kept = kept || l.Has(i)
		}
		off := rng.Int64N(l.Size())
		if err := checkRead(t.Context(), l, f, off, l.Size()/8); err != nil {
			t.Fatalf("after kill %d: %v", n, err)
		}
		if n == kills-1 {
			if err := checkRead(t.Context(), l, f, 0, l.Size()); err != nil {
				t.Fatalf("after kill %d: %v", n, err)
			}
		}
		l.Release()
		if n < kills/2 {
			prune(t, c) // begin anew, to catch the creation, too
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if !kept {
		t.Error("nothing ever survived a kill")
	}
}

// TestKilledProcessLosesNothing kills a process before it has synced anything:
// the page cache and the file recent outlive it. In another boot that file
// means nothing.
func TestKilledProcessLosesNothing(t *testing.T) {
	dir := t.TempDir()
	f := newFixture(t, 5, 2_000_000, 10_000)
	killChild(t, dir, lazyChild, 0)

	rebooted := copyDir(t, dir)
	files, err := filepath.Glob(filepath.Join(rebooted, "*", recentFile))
	if err != nil || len(files) != 1 {
		t.Fatalf("the killed process left the files %v, %v", files, err)
	}
	record, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	copy(record, "00000000-0000-0000-0000-000000000000")
	if err := os.WriteFile(files[0], record, 0o600); err != nil {
		t.Fatal(err)
	}
	l := acquire(t, openCache(t, Options{Dir: rebooted}), f, unreachable(f))
	if err := checkRead(t.Context(), l, f, 300_000, 200_000); !errors.Is(err, errUnreachable) {
		t.Errorf("what was not synced, in another boot: %v, want the source's error", err)
	}

	c := openCache(t, Options{Dir: dir})
	l = acquire(t, c, f, unreachable(f))
	mustRead(t, l, f, 300_000, 200_000)
	l.Release()
	if err := c.Close(); err != nil { // which records it for good
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, filepath.Base(filepath.Dir(files[0])), recentFile)); err != nil {
		t.Fatal(err)
	}
	mustRead(t, acquire(t, openCache(t, Options{Dir: dir}), f, unreachable(f)), f, 300_000, 200_000)
}

// The children of the kill tests.
const (
	busyChild = "busy" // reads at random, syncs at once
	lazyChild = "lazy" // reads the same every time, never syncs
)

// killChild runs TestKillChild and kills it some time after it has begun.
func killChild(t *testing.T, dir, kind string, after time.Duration) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKillChild$", "-test.v")
	cmd.Env = append(os.Environ(), childDir+"="+dir, childKind+"="+kind)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for s := bufio.NewScanner(out); s.Scan() && s.Text() != "reading"; {
	}
	time.Sleep(after)
	_ = cmd.Process.Kill() // it may have ended
	_ = cmd.Wait()
}

func TestKillChild(t *testing.T) {
	dir := os.Getenv(childDir)
	if dir == "" {
		return // not a test of its own: TestKill's child
	}
	f := newFixture(t, 5, 2_000_000, 10_000)
	if os.Getenv(childKind) == lazyChild {
		l := acquire(t, openCache(t, Options{Dir: dir, FlushInterval: time.Hour, ReadAhead: -1}), f, f.source())
		mustRead(t, l, f, 300_000, 200_000)
		l.running.Wait() // who has read the last chunk is ahead of who writes it
		fmt.Println("reading")
		time.Sleep(time.Minute)
		return
	}
	c := openCache(t, Options{Dir: dir, FlushInterval: time.Millisecond, ReadAhead: -1})
	fmt.Println("reading")
	l := acquire(t, c, f, f.source())
	for rng := rand.New(rand.NewPCG(uint64(os.Getpid()), 1)); ; {
		mustRead(t, l, f, rng.Int64N(l.Size()), rng.Int64N(50_000))
		time.Sleep(200 * time.Microsecond)
	}
}
