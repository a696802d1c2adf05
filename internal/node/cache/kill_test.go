package cache

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"
)

// childDir tells the test binary that it is to be TestKill's child.
const childDir = "SLUICE_CACHE_TEST_DIR"

// TestKill kills a process that uses a cache, again and again, and checks
// after each time that the cache it left is used and right.
func TestKill(t *testing.T) {
	const kills = 8
	dir := t.TempDir()
	f := newFixture(t, 5, 2_000_000, 10_000)
	rng := rand.New(rand.NewPCG(8, 8))
	kept := false
	for n := range kills {
		killChild(t, dir, time.Duration(rng.IntN(60))*time.Millisecond)
		c, err := Open(t.Context(), Options{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		l, err := c.Acquire(t.Context(), f.device(t), f.source())
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
			c.Prune() // begin anew, to catch the creation, too
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if !kept {
		t.Error("nothing ever survived a kill")
	}
}

// killChild runs TestKillChild and kills it some time after it has begun.
func killChild(t *testing.T, dir string, after time.Duration) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKillChild$", "-test.v")
	cmd.Env = append(os.Environ(), childDir+"="+dir)
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
	c := openCache(t, Options{Dir: dir, FlushInterval: time.Millisecond, ReadAhead: -1})
	fmt.Println("reading")
	l := acquire(t, c, f, f.source())
	for rng := rand.New(rand.NewPCG(uint64(os.Getpid()), 1)); ; {
		mustRead(t, l, f, rng.Int64N(l.Size()), rng.Int64N(50_000))
		time.Sleep(200 * time.Microsecond)
	}
}
