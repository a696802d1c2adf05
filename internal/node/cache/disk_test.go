package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/blob"
)

// TestDiskFull runs a cache on a disk that is too small: slow, but right.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small tmpfs")
	}
	dir := t.TempDir()
	if err := unix.Mount("sluice-test", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	f := newFixture(t, 1, 4<<20, 64<<10)
	idle := newFixture(t, 2, 300_000, 64<<10)
	c := openCache(t, Options{Dir: filepath.Join(dir, "cache"), FlushInterval: 5 * time.Millisecond})
	c.Settled(nil)
	li := acquire(t, c, idle, idle.source())
	mustRead(t, li, idle, 0, 300_000)
	li.Release()
	var count blob.Counter
	l := acquire(t, c, f, blob.Count(f.source(), &count))
	for range 2 {
		mustRead(t, l, f, 0, 4<<20)
		for off := int64(0); off < 4<<20; off += 4096 {
			mustRead(t, l, f, off, 4096)
		}
	}
	if n := c.Stats().WriteErrors; n == 0 {
		t.Error("the disk wasn't full: this test tests nothing")
	}
	if n, most := count.Bytes.Load(), int64(8*len(f.blob)); n > most {
		t.Errorf("fetched %d bytes for reading %d four times in small pieces, want at most %d", n, len(f.blob), most)
	}
	if err := l.Fill(t.Context()); err == nil || l.Complete() {
		t.Errorf("Fill on a full disk: %v, complete: %v", err, l.Complete())
	}
	var kept error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) { // for the flusher
		if _, kept = os.Stat(c.dirOf(idle.device(t).Key)); errors.Is(kept, fs.ErrNotExist) {
			break
		}
	}
	if !errors.Is(kept, fs.ErrNotExist) {
		t.Errorf("a layer that nobody uses is kept on a full disk: %v", kept)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=16m"); err != nil {
		t.Fatal(err)
	}
	if err := l.Fill(t.Context()); err != nil {
		t.Errorf("Fill when there's room again: %v", err)
	}
	mustRead(t, l, f, 0, 4<<20)
}

// TestNoSpaceAnywhere runs out of space at every page that a cache writes, in
// turn: content is read all the same, what is recorded is on the disk, and when
// there's room the layer gets complete.
func TestNoSpaceAnywhere(t *testing.T) {
	const page = 4096
	f := newFixture(t, 1, 30*page, 3*page)
	full := false
	for pages := 1; pages == 1 || full; pages++ {
		full = noSpace(t, smallDisk(t, fmt.Sprintf("size=%d", pages*page)), f)
		if pages > 100 {
			t.Fatal("the disk is full however large it is")
		}
	}
}

// noSpace uses a cache on a disk that may be too small, then enlarges that. It
// reports whether it was.
func noSpace(t *testing.T, disk string, f *fixture) (full bool) {
	dir := filepath.Join(disk, "cache")
	c, err := Open(t.Context(), Options{Dir: dir, FlushInterval: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	c.Settled(nil)
	l, err := c.Acquire(t.Context(), f.device(t), f.source(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { l.Release() }()
	mustRead(t, l, f, 0, l.Size())
	for off := int64(0); off < l.Size(); off += 1000 {
		mustRead(t, l, f, off, 1000)
	}
	full = l.Fill(t.Context()) != nil
	if full == l.Complete() {
		t.Errorf("the disk is full: %v, and the layer is complete: %v", full, l.Complete())
	}
	l.Release()
	_ = c.Close() // some of it may not be recorded
	checkDisk(t, dir, f)

	// The next process finds the disk as it is, then gets room.
	if c, err = Open(t.Context(), Options{Dir: dir, FlushInterval: time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if l, err = c.Acquire(t.Context(), f.device(t), f.source(), nil); err != nil {
		t.Fatal(err)
	}
	mustRead(t, l, f, 0, l.Size())
	if err := unix.Mount("", disk, "", unix.MS_REMOUNT, "size=16m"); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if err = l.Fill(t.Context()); err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil || !l.Complete() {
		t.Errorf("with room again: complete: %v, %v", l.Complete(), err)
	}
	mustRead(t, l, f, 0, l.Size())
	l.Release()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, complete := checkDisk(t, dir, f); !complete {
		t.Error("it isn't recorded as complete")
	}
	return full
}

// TestReadOnlyDisk is every other error of writing: the disk goes read-only
// under the cache.
func TestReadOnlyDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make files immutable")
	}
	f := newFixture(t, 1, 1_000_000, 20_000)
	c := openCache(t, Options{FlushInterval: time.Millisecond})
	l := acquire(t, c, f, f.source())
	mustRead(t, l, f, 0, 200_000)
	// The descriptor is exchanged for one that can't be written.
	ro, err := os.Open(l.Path())
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Dup3(int(ro.Fd()), int(l.content.data.Fd()), unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	ro.Close()
	mustRead(t, l, f, 0, 1_000_000)
	if n := c.Stats().WriteErrors; n == 0 {
		t.Error("no write failed: this test tests nothing")
	}
}

// TestPassingErrors: running out of descriptors is no reason to throw a layer
// away.
func TestPassingErrors(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make a file immutable")
	}
	f := newFixture(t, 1, 200_000, 20_000)
	c := openCache(t, Options{})
	l := acquire(t, c, f, f.source())
	if err := l.Fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	name := l.Path()
	l.Release()
	setImmutable(t, name, true)
	t.Cleanup(func() { setImmutable(t, name, false) })
	if err := acquireError(t, c, f); !errors.Is(err, unix.EPERM) {
		t.Errorf("opening a file that can't be opened for writing: %v, want EPERM", err)
	}
	setImmutable(t, name, false)
	l = acquire(t, c, f, unreachable(f))
	if !l.Complete() {
		t.Error("the layer was discarded")
	}
}

// fsImmutable is FS_IMMUTABLE_FL of linux/fs.h.
const fsImmutable = 0x10

func setImmutable(t *testing.T, name string, on bool) {
	t.Helper()
	file, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	flags, err := unix.IoctlGetInt(int(file.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		t.Skipf("the file system has no immutable files: %v", err)
	}
	flags &^= fsImmutable
	if on {
		flags |= fsImmutable
	}
	if err := unix.IoctlSetPointerInt(int(file.Fd()), unix.FS_IOC_SETFLAGS, flags); err != nil {
		t.Skipf("cannot make files immutable here: %v", err)
	}
}
