package faults

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sluice/test/bed"
)

// chaosTime is how long TestChaos goes on.
func chaosTime() time.Duration {
	if everything() {
		return time.Minute
	}
	return 10 * time.Second
}

// TestChaos reads two images all the time while random faults happen to random
// requests and the daemon is killed and started: no byte is ever wrong, no read
// hangs, and when it is over everything can be read.
func TestChaos(t *testing.T) {
	s := theStage(t)
	n := s.node(t)
	images := map[string]*image{filepath.Join(n.Dir, "app"): s.app, filepath.Join(n.Dir, "other"): s.other}
	for dir, img := range images {
		if err := n.mount(t, img, dir); err != nil {
			t.Fatal(err)
		}
	}
	var right, failed, wrong atomic.Int64
	var slowest atomic.Int64
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for i := range 8 {
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for {
				select {
				case <-stop:
					return
				default:
				}
				for dir, img := range images {
					for name, want := range img.files {
						if rng.IntN(4) > 0 {
							continue
						}
						off := rng.IntN(len(want))
						began := time.Now()
						err := readPiece(filepath.Join(dir, name), want[off:min(off+rng.IntN(piece)+1, len(want))], int64(off))
						if took := int64(time.Since(began)); took > slowest.Load() {
							slowest.Store(took)
						}
						switch {
						case err == nil:
							right.Add(1)
						case errors.Is(err, errWrong):
							wrong.Add(1)
						case errors.Is(err, syscall.EIO):
							failed.Add(1)
						default:
							t.Errorf("%s: %v", name, err)
						}
					}
				}
			}
		})
	}
	rng := rand.New(rand.NewPCG(7, 7))
	kills, faults := 0, 0
	n.proxy.Watch(nil) // counts from here on
	for end := time.Now().Add(chaosTime()); time.Now().Before(end); {
		f := Catalog()[rng.IntN(len(Catalog()))]
		n.proxy.Arm(f, requests[rng.IntN(len(requests))], rng.IntN(10)-1)
		faults++
		n.discard(t, rng) // so that there is something to fetch
		time.Sleep(time.Duration(rng.IntN(200)) * time.Millisecond)
		if rng.IntN(3) == 0 {
			kills++
			n.Sluice.Kill()
			if err := n.StartSluice(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	n.proxy.Disarm()
	close(stop)
	readers.Wait()
	fetched := 0
	for _, k := range n.proxy.Seen() {
		if k == Layer {
			fetched++
		}
	}
	t.Logf("FIGURE %d faults, %d kills, %d requests for content: %d reads right, %d failed, %d wrong, slowest %v",
		faults, kills, fetched, right.Load(), failed.Load(), wrong.Load(), time.Duration(slowest.Load()))
	if wrong.Load() > 0 {
		t.Errorf("WRONG BYTES in %d reads", wrong.Load())
	}
	if d := time.Duration(slowest.Load()); d > readBound {
		t.Errorf("a read took %v, more than %v", d, readBound)
	}
	if right.Load() < 100 || fetched < 20 {
		t.Errorf("only %d reads were right, only %d requests were made: nothing was tested", right.Load(), fetched)
	}
	eventually(t, readBound+slack, "reading everything when it is over", func() error {
		for dir, img := range images {
			w, f, _ := img.files.readAll(dir, readBound)
			if len(w)+len(f) > 0 {
				return fmt.Errorf("%v %v", w, f)
			}
		}
		return nil
	})
	checkState(t, n)
	st := n.status(t)
	var size int64
	for _, i := range st.Images {
		size += i.Size
	}
	if st.Cache.Bytes > size {
		t.Errorf("the cache has %d bytes of images of %d: something is there twice", st.Cache.Bytes, size)
	}
}

// discard makes the node lose some of its content: cache files that are deleted
// or cut are content that a disk lost.
func (n *node) discard(t *testing.T, rng *rand.Rand) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1\n"), 0o200); err != nil {
		t.Fatal(err)
	}
	if rng.IntN(4) > 0 {
		return
	}
	// While no daemon runs: what a living one has open it believes in.
	n.Sluice.Kill()
	files, err := filepath.Glob(filepath.Join(n.Dir, "sluice", "cache", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if rng.IntN(2) == 0 {
			_ = os.Remove(f) // or it is a directory
		}
	}
	if err := n.StartSluice(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestKilledAtItsStart kills the daemon again and again soon after it began to
// start: the one that is left alone takes up the mounts of the first.
func TestKilledAtItsStart(t *testing.T) {
	s := theStage(t)
	n := s.node(t, "--no-fill")
	dir := filepath.Join(n.Dir, "mnt")
	if err := n.mount(t, s.app, dir); err != nil {
		t.Fatal(err)
	}
	n.Sluice.Kill()
	rng := rand.New(rand.NewPCG(3, 3))
	flags := []string{
		"node", "--root", filepath.Join(n.Dir, "sluice"), "--run", filepath.Join(n.Dir, "run"),
		"--read-timeout", readTimeout.String(), "--no-fill",
	}
	for range 30 {
		p, err := bed.Start(n.Dir, "sluice", nil, s.sluice, flags...)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rng.IntN(120)) * time.Millisecond)
		p.Kill()
	}
	if err := n.StartSluice(t.Context()); err != nil {
		t.Fatal(err)
	}
	wrong, failed, slowest := s.app.files.readAll(dir, readBound)
	checkReads(t, wrong, failed, slowest)
	if len(failed) > 0 {
		t.Errorf("%d reads fail, the first: %v", len(failed), failed[0])
	}
	checkState(t, n)
	checkClean(t, n, dir)
}
