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
	return 6 * time.Second
}

// TestChaos reads two images all the time while random faults happen to random
// requests, the daemon is killed and started, and its disk loses files, or
// changes bits of layers that aren't complete: no byte is ever wrong, no read
// hangs, and when it is over everything can be read. (Complete layers are the
// kernel's to read, as any local file: their bits are the disk's affair.)
func TestChaos(t *testing.T) {
	s := theStage(t)
	t.Run("files-lost", func(t *testing.T) { chaos(t, s, s.node(t), os.Remove) })
	t.Run("bits-changed", func(t *testing.T) { chaos(t, s, s.node(t, "--no-fill"), changeBit) })
}

// changeBit changes one bit in the middle of what a file has.
func changeBit(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	var b [1]byte
	off := rand.Int64N(fi.Size() + 1)
	if _, err := f.ReadAt(b[:], off); err != nil {
		return err
	}
	b[0] ^= 0x40
	_, err = f.WriteAt(b[:], off)
	return err
}

// reads is what the readers of a chaos saw.
type reads struct {
	right, failed, wrong atomic.Int64
	slowest              atomic.Int64 // nanoseconds
}

// go8 reads random pieces of images, which are mounted on the directories, in
// eight goroutines until stop is closed.
func (r *reads) go8(t *testing.T, images map[string]*image, stop <-chan struct{}) *sync.WaitGroup {
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
						if rng.IntN(4) == 0 {
							r.one(t, rng, filepath.Join(dir, name), want)
						}
					}
				}
			}
		})
	}
	return &readers
}

func (r *reads) one(t *testing.T, rng *rand.Rand, name string, want []byte) {
	off := rng.IntN(len(want))
	began := time.Now()
	err := readPiece(name, want[off:min(off+rng.IntN(piece)+1, len(want))], int64(off))
	if took := int64(time.Since(began)); took > r.slowest.Load() {
		r.slowest.Store(took)
	}
	switch {
	case err == nil:
		r.right.Add(1)
	case errors.Is(err, errWrong):
		r.wrong.Add(1)
	case errors.Is(err, syscall.EIO):
		r.failed.Add(1)
	default:
		t.Errorf("%s: %v", name, err)
	}
}

func chaos(t *testing.T, s *stage, n *node, harm func(name string) error) {
	images := map[string]*image{filepath.Join(n.Dir, "app"): s.app, filepath.Join(n.Dir, "other"): s.other}
	for dir, img := range images {
		if err := n.mount(t, img, dir); err != nil {
			t.Fatal(err)
		}
	}
	var r reads
	stop := make(chan struct{})
	readers := r.go8(t, images, stop)
	end := sync.OnceFunc(func() { close(stop); readers.Wait() })
	defer end()
	rng := rand.New(rand.NewPCG(7, 7))
	kills, faults := 0, 0
	n.proxy.Watch(nil) // counts from here on
	enough := func() bool {
		return r.right.Load() >= 100 && n.proxy.SeenOf(Layer) >= 20 && faults >= 20 && kills >= 5
	}
	over := time.Now().Add(chaosTime())
	for end := over.Add(10 * slack); time.Now().Before(over) || !enough() && time.Now().Before(end); {
		f := Catalog()[rng.IntN(len(Catalog()))]
		n.proxy.Arm(f, requests[rng.IntN(len(requests))], rng.IntN(10)-1)
		faults++
		n.harmCache(t, rng, harm) // so that there is something to fetch, too
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
	end()
	slowest := time.Duration(r.slowest.Load())
	t.Logf("FIGURE %d faults, %d kills, %d requests for content: %d reads right, %d failed, %d wrong, slowest %v",
		faults, kills, n.proxy.SeenOf(Layer), r.right.Load(), r.failed.Load(), r.wrong.Load(), slowest)
	if r.wrong.Load() > 0 {
		t.Errorf("WRONG BYTES in %d reads", r.wrong.Load())
	}
	if slowest > readBound {
		t.Errorf("a read took %v, more than %v", slowest, readBound)
	}
	if !enough() {
		t.Error("that is too little to mean something")
	}
	n.isWhole(t, images)
}

// isWhole checks that everything of the images can be read, and is there once.
func (n *node) isWhole(t *testing.T, images map[string]*image) {
	t.Helper()
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

// harmCache harms about half of the cache's files, now and then, and always
// empties the kernel's caches.
func (n *node) harmCache(t *testing.T, rng *rand.Rand, harm func(name string) error) {
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
			_ = harm(f) // it may be a directory, or empty
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
		p, err := bed.Start(n.Dir, "sluice", nil, s.Sluice, flags...)
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
