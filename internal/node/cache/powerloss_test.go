package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestPowerLoss cuts the power of a real file system at random moments, again
// and again: ext4 is shut down with what its journal and the page cache hold
// lost (EXT4_IOC_SHUTDOWN, as xfstests does it), and mounted again, which
// replays the journal. What is recorded as being on the disk then is there.
func TestPowerLoss(t *testing.T) {
	const rounds = 30
	disk := newTestDisk(t)
	dir := filepath.Join(disk.dir, "cache")
	f := newFixture(t, 5, 12_000_000, 20_000)
	rng := rand.New(rand.NewPCG(9, 9))
	var claims, completes, partials int
	var filled bool // which survives
	for n := range rounds {
		disk.mount(t)
		c, err := Open(t.Context(), Options{Dir: dir, FlushInterval: time.Duration(1+rng.IntN(20)) * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		c.boot = fmt.Sprintf("%0*d", bootIDSize, n) // what recent has was in the page cache
		found, complete := checkDisk(t, dir, f)
		claims += found
		if filled && !complete {
			t.Error("a layer that Fill said is complete isn't after power was lost")
		}
		if complete {
			completes++
		} else if found > 0 {
			partials++
		}
		if n%4 == 0 {
			prune(t, c) // begin anew, to catch the creation, too
		}
		filled = untilPowerFails(t, disk, c, f, rng)
		_ = c.Close() // its disk is dead
		disk.unmount(t)
	}
	t.Logf("%d chunks were found after %d losses of power, %d times a part of the layer, %d times all of it", claims, rounds, partials, completes)
	if partials == 0 || completes == 0 {
		t.Error("that's no test")
	}
}

// untilPowerFails reads and fills a layer, has the kernel write pages back in
// any order, and cuts the power. Reads are right all the time, also after that.
// It reports whether the layer was complete before.
func untilPowerFails(t *testing.T, disk *testDisk, c *Cache, f *fixture, rng *rand.Rand) (filled bool) {
	l, err := c.Acquire(t.Context(), f.device(t), f.source(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	for range 2 {
		seed := rng.Uint64()
		work.Go(func() {
			for rng := rand.New(rand.NewPCG(seed, 1)); ctx.Err() == nil; time.Sleep(200 * time.Microsecond) {
				if err := checkRead(ctx, l, f, rng.Int64N(l.Size()), rng.Int64N(50_000)); err != nil && ctx.Err() == nil {
					t.Errorf("reading: %v", err)
					return
				}
			}
		})
	}
	seed := rng.Uint64()
	work.Go(func() { writeBack(ctx, c.dirOf(l.dev.Key), rand.New(rand.NewPCG(seed, 1))) })
	switch rng.IntN(4) {
	case 0:
		work.Go(func() { _ = l.Fill(ctx) }) // it ends with the disk
	case 1:
		if err := l.Fill(ctx); err != nil {
			t.Error(err)
		}
	}
	time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond)
	filled = l.Complete()
	disk.cut(t, 1+rng.IntN(2))
	for range 20 { // what the disk doesn't give comes from the network
		if err := checkRead(ctx, l, f, rng.Int64N(l.Size()), rng.Int64N(50_000)); err != nil {
			t.Errorf("reading from a dead disk: %v", err)
		}
	}
	return filled
}

// writeBack has pages of a layer's files written back, some here, some there.
func writeBack(ctx context.Context, dir string, rng *rand.Rand) {
	names := []string{dataFile, stateFile, recentFile}
	for ; ctx.Err() == nil; time.Sleep(100 * time.Microsecond) {
		file, err := os.Open(filepath.Join(dir, names[rng.IntN(len(names))]))
		if err != nil {
			continue
		}
		if info, err := file.Stat(); err == nil && info.Size() > 0 {
			_ = unix.SyncFileRange(int(file.Fd()), rng.Int64N(info.Size()), 1+rng.Int64N(100_000), unix.SYNC_FILE_RANGE_WRITE)
		}
		file.Close()
	}
}

// checkDisk compares what a cache that nobody has opened yet records with what
// its disk has.
func checkDisk(t *testing.T, dir string, f *fixture) (claims int, complete bool) {
	t.Helper()
	s, err := shapeOf(f.device(t))
	if err != nil {
		t.Fatal(err)
	}
	layer := filepath.Join(dir, "sha256-"+s.key.Encoded())
	state, err := os.ReadFile(filepath.Join(layer, stateFile))
	if errors.Is(err, os.ErrNotExist) {
		return 0, false
	}
	if err != nil {
		t.Fatal(err)
	}
	mark, markErr := os.ReadFile(filepath.Join(layer, completeFile))
	known, damaged, err := s.parse(state)
	if damaged > 0 {
		t.Errorf("%d entries of the state file are damaged", damaged)
	}
	if (err != nil || len(known) == 0) && markErr != nil {
		return 0, false // nothing was recorded, and then the files may be anything
	}
	data, err := os.ReadFile(filepath.Join(layer, dataFile))
	if err != nil || int64(len(data)) != s.size {
		t.Fatalf("the data file has %d bytes, want %d, %v", len(data), s.size, err)
	}
	for _, k := range known {
		ch := f.chunks[k.chunk]
		if end := ch.Offset + int64(ch.Length); !bytes.Equal(data[ch.Offset:end], f.content[ch.Offset:end]) {
			t.Errorf("chunk %d is recorded, and isn't on the disk", k.chunk)
		}
	}
	if markErr == nil && string(mark) != (&content{shape: s}).completeMark() {
		t.Errorf("the mark of a complete layer is %q", mark)
	}
	if markErr == nil && (len(known) != len(f.chunks) || !bytes.Equal(data, f.padded)) {
		t.Errorf("marked complete, with %d of %d chunks", len(known), len(f.chunks))
	}
	return len(known), markErr == nil
}

// testDisk is a file system of its own, in a file.
type testDisk struct {
	image, dir string
	moves      int
}

// newTestDisk makes an ext4, or skips the test.
func newTestDisk(t *testing.T) *testDisk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a file system")
	}
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("needs mkfs.ext4")
	}
	d := &testDisk{image: filepath.Join(t.TempDir(), "image"), dir: t.TempDir()}
	if shm, err := os.MkdirTemp("/dev/shm", "sluice-test-"); err == nil { // so that syncing costs little
		t.Cleanup(func() { os.RemoveAll(shm) })
		d.image = filepath.Join(shm, "image")
	}
	file, err := os.Create(d.image)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(file.Truncate(64<<20), file.Close()); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-b", "4096", d.image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = unix.Unmount(d.dir, unix.MNT_DETACH) }) // a test that failed
	return d
}

func (d *testDisk) mount(t *testing.T) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "mount", "-t", "ext4", "-o", "loop,commit=1", d.image, d.dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
}

// unmount takes the disk to another machine: a process in another mount
// namespace may keep this one's dead file system.
func (d *testDisk) unmount(t *testing.T) {
	t.Helper()
	if err := unix.Unmount(d.dir, 0); err != nil {
		t.Fatalf("unmount %s: %v", d.dir, err)
	}
	d.moves++
	moved := fmt.Sprintf("%s.%d", strings.TrimSuffix(d.image, filepath.Ext(d.image)), d.moves)
	if out, err := exec.CommandContext(t.Context(), "cp", "--sparse=always", d.image, moved).CombinedOutput(); err != nil {
		t.Fatalf("copy the disk: %v: %s", err, out)
	}
	if err := os.Remove(d.image); err != nil {
		t.Fatal(err)
	}
	d.image = moved
}

// cut is the end of all writing. how is 1: what the journal has in memory is
// written first, 2: nothing is (fs/ext4/ext4.h).
func (d *testDisk) cut(t *testing.T, how int) {
	t.Helper()
	const shutdown = 0x8004587d // EXT4_IOC_SHUTDOWN
	root, err := os.Open(d.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := unix.IoctlSetPointerInt(int(root.Fd()), shutdown, how); err != nil {
		t.Fatalf("shut the file system down: %v", err)
	}
}
