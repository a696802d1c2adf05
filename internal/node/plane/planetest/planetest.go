// Package planetest checks that a plane keeps the promises of package plane,
// with real EROFS mounts and content of which every byte is known.
//
// The suite needs root. The test process serves the content, so it must not map
// a mounted file (package plane says why); another one does that, which is the
// test binary again: TestMain of a package that uses Run has to begin with
// Child.
package planetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
)

// Options say what kind of plane it is.
type Options struct {
	// Lazy: content is read when a file is. Otherwise all of it is read by
	// Attach.
	Lazy bool
}

// Run runs the suite. open returns a plane of its own for each call, and
// arranges for its end.
func Run(t *testing.T, opts Options, open func(t *testing.T) plane.Plane) {
	if os.Getenv(mapVariable) != "" {
		t.Fatal("TestMain doesn't begin with planetest.Child")
	}
	tests := []struct {
		name string
		lazy bool
		run  func(t *testing.T, p plane.Plane)
	}{
		{"Sequential", false, testSequential},
		{"Random", false, testRandom},
		{"Mapped", false, testMapped},
		{"Tails", false, testTails},
		{"ManyDevices", false, testManyDevices},
		{"LocalFiles", false, testLocalFiles},
		{"SharedDevice", false, testSharedDevice},
		{"Concurrent", false, testConcurrent},
		{"Refusals", false, testRefusals},
		{"Busy", false, testBusy},
		{"BadMetadata", false, testBadMetadata},
		{"ContentError", true, testContentError},
		{"SlowContent", true, testSlowContent},
		{"DetachEndsReads", true, testDetachEndsReads},
		{"ContentPerImage", true, testContentPerImage},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if test.lazy && !opts.Lazy {
				t.Skip("not a lazy plane")
			}
			test.run(t, open(t))
		})
	}
}

// attach attaches img in a new directory and detaches it when the test ends.
func attach(t *testing.T, p plane.Plane, img Image) string {
	t.Helper()
	dir := t.TempDir()
	if err := p.Attach(t.Context(), img.Plane, dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Detach(context.Background(), dir); err != nil && !errors.Is(err, plane.ErrNotAttached) {
			t.Errorf("detach: %v", err)
			plane.Unmount(dir, true)
		}
	})
	return dir
}

func detach(t *testing.T, p plane.Plane, dir string) {
	t.Helper()
	if err := p.Detach(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
}

// readAll reads every file of img whole and compares it.
func readAll(t *testing.T, img Image, dir string) {
	t.Helper()
	for _, f := range img.Files {
		if err := f.Verify(dir); err != nil {
			t.Error(err)
		}
	}
}

// Verify reads f in the image mounted on dir from end to end and compares it.
func (f File) Verify(dir string) error {
	r, err := os.Open(filepath.Join(dir, f.Name))
	if err != nil {
		return err
	}
	defer r.Close()
	buf := make([]byte, 300_000)
	for off := int64(0); ; {
		n, err := r.Read(buf)
		if cerr := f.check(buf[:n], off); cerr != nil {
			return cerr
		}
		off += int64(n)
		if errors.Is(err, io.EOF) {
			if off != f.Size {
				return fmt.Errorf("%s has %d bytes, want %d", f.Name, off, f.Size)
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func testSequential(t *testing.T, p plane.Plane) {
	img := Build(t, []Dev{NewDev(1, 9<<20), NewDev(2, 3<<20+512), NewDev(3, 512)})
	dir := attach(t, p, img)
	readAll(t, img, dir)
	DropCaches(t, img, dir)
	readAll(t, img, dir)
}

func testRandom(t *testing.T, p plane.Plane) {
	img := Build(t, []Dev{NewDev(4, 16<<20), NewDev(5, 5<<20)})
	dir := attach(t, p, img)
	random := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 200_000)
	for range 400 {
		f := img.Files[random.IntN(len(img.Files))]
		if err := readSome(f, dir, random.Int64N(f.Size), buf[:1+random.IntN(len(buf))]); err != nil {
			t.Fatal(err)
		}
	}
}

// readSome reads buf at off of f, which ends the file or fills it, and
// compares.
func readSome(f File, dir string, off int64, buf []byte) error {
	r, err := os.Open(filepath.Join(dir, f.Name))
	if err != nil {
		return err
	}
	defer r.Close()
	n, err := r.ReadAt(buf, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if want := min(int64(len(buf)), f.Size-off); int64(n) != want {
		return fmt.Errorf("%s: read %d bytes at %d, want %d", f.Name, n, off, want)
	}
	return f.check(buf[:n], off)
}

func testMapped(t *testing.T, p plane.Plane) {
	img := Build(t, []Dev{NewDev(6, 4<<20), NewDev(7, 1<<20+1)})
	checkMapped(t, img, attach(t, p, img))
}

func checkMapped(t *testing.T, img Image, dir string) {
	t.Helper()
	all, err := mapped(t, dir, img.Files...)
	if err != nil {
		t.Fatal(err)
	}
	page := int64(os.Getpagesize())
	for _, f := range img.Files {
		size := (f.Size + page - 1) / page * page
		if int64(len(all)) < size {
			t.Fatalf("%s: %d bytes came through the mapping, want %d", f.Name, len(all), size)
		}
		got := all[:size]
		all = all[size:]
		if err := f.check(got[:f.Size], 0); err != nil {
			t.Error(err)
		}
		// What follows in the last block is the device's, zeros in a tar;
		// the next block would be the next file's header.
		for i, b := range got[min((f.Size+511)&^511, int64(len(got))):] {
			if b != 0 {
				t.Errorf("%s: byte %d behind the last block, of the page that is mapped, is %#x, want 0", f.Name, i, b)
				break
			}
		}
	}
}

// testTails: devices that end inside a block and inside a page.
func testTails(t *testing.T, p plane.Plane) {
	var devs []Dev
	for i, size := range []int64{1, 511, 512, 513, 4095, 4096, 4097, 4608, 131072 - 1, 131072 + 1, 1<<20 - 511, 1<<20 + 3584} {
		devs = append(devs, NewDev(100+uint64(i), size))
	}
	img := Build(t, devs)
	dir := attach(t, p, img)
	readAll(t, img, dir)
	checkMapped(t, img, dir)
}

func testManyDevices(t *testing.T, p plane.Plane) {
	var devs []Dev
	for i := range 150 {
		devs = append(devs, NewDev(1000+uint64(i), 20_000+int64(i)*512))
	}
	img := Build(t, devs)
	dir := attach(t, p, img)
	readAll(t, img, dir)
}

func testLocalFiles(t *testing.T, p plane.Plane) {
	complete := NewDev(8, 3<<20+100)
	complete.File = true
	img := Build(t, []Dev{NewDev(9, 1<<20), complete, NewDev(10, 2<<20)})
	dir := attach(t, p, img)
	readAll(t, img, dir)
	if n := complete.Content.Reads.Load(); n != 0 {
		t.Errorf("content of a complete device was asked for %d times", n)
	}
}

func testSharedDevice(t *testing.T, p plane.Plane) {
	shared := NewDev(11, 6<<20)
	one, two := Build(t, []Dev{shared, NewDev(12, 1<<20)}), Build(t, []Dev{NewDev(13, 1<<20), shared})
	dir1, dir2 := attach(t, p, one), attach(t, p, two)
	readAll(t, one, dir1)
	var reading sync.WaitGroup
	reading.Go(func() {
		for range 5 {
			DropCaches(t, two, dir2)
			readAll(t, two, dir2)
		}
	})
	detach(t, p, dir1)
	reading.Wait()
	// And back again, while the other still is there.
	dir1 = attach(t, p, one)
	readAll(t, one, dir1)
}

func testConcurrent(t *testing.T, p plane.Plane) {
	shared := NewDev(14, 1<<20)
	var workers sync.WaitGroup
	for i := range 8 {
		img := Build(t, []Dev{shared, NewDev(200+uint64(i), 300_000)})
		dir := t.TempDir()
		workers.Go(func() {
			for range 6 {
				if err := p.Attach(t.Context(), img.Plane, dir); err != nil {
					t.Error(err)
					return
				}
				readAll(t, img, dir)
				if err := p.Detach(t.Context(), dir); err != nil {
					t.Error(err)
					plane.Unmount(dir, true)
					return
				}
			}
		})
	}
	workers.Wait()
}

func testRefusals(t *testing.T, p plane.Plane) {
	img := Build(t, []Dev{NewDev(15, 1<<20)})
	dir := attach(t, p, img)
	wantError := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", what, err, want)
		}
	}
	wantError("second attach", p.Attach(t.Context(), img.Plane, dir), plane.ErrAttached)
	empty := t.TempDir()
	wantError("detach of nothing", p.Detach(t.Context(), empty), plane.ErrNotAttached)
	wantError("adopt of nothing", p.Adopt(t.Context(), img.Plane, empty), plane.ErrNotAttached)
	wantError("attach on what is missing", p.Attach(t.Context(), img.Plane, filepath.Join(empty, "no")), os.ErrNotExist)
	for _, name := range []string{"", ".", "..", "a/b", "a\x00b", string(bytes.Repeat([]byte("n"), 256))} {
		bad := Build(t, []Dev{NewDev(16, 1<<20)}).Plane
		bad.Devices[0].Name = name
		if err := p.Attach(t.Context(), bad, empty); err == nil {
			t.Errorf("attach with a device named %q worked", name)
		}
	}
	readAll(t, img, dir)
}

func testBusy(t *testing.T, p plane.Plane) {
	img := Build(t, []Dev{NewDev(17, 1<<20)})
	dir := attach(t, p, img)
	f, err := os.Open(filepath.Join(dir, img.Files[0].Name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := p.Detach(t.Context(), dir); !errors.Is(err, plane.ErrBusy) {
		t.Errorf("detach of what is in use: got %v, want %v", err, plane.ErrBusy)
	}
	readAll(t, img, dir)
	f.Close()
	detach(t, p, dir)
	if m, err := plane.MountAt(dir); m != nil || err != nil {
		t.Errorf("still mounted: %v, %v", m, err)
	}
}

func testBadMetadata(t *testing.T, p plane.Plane) {
	img := Build(t, []Dev{NewDev(18, 1<<20), NewDev(24, 1<<20)})
	bad := img.Plane
	bad.Metadata = filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad.Metadata, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := p.Attach(t.Context(), bad, dir); err == nil {
		t.Error("attached zeros as metadata")
	}
	if m, err := plane.MountAt(dir); m != nil || err != nil {
		t.Errorf("something is mounted: %v, %v", m, err)
	}
	fewer := img.Plane
	fewer.Devices = fewer.Devices[:1]
	if err := p.Attach(t.Context(), fewer, dir); err == nil {
		t.Error("attached metadata of two devices with one")
	}
	// The failures left nothing that is in the way.
	if err := p.Attach(t.Context(), img.Plane, dir); err != nil {
		t.Fatal(err)
	}
	readAll(t, img, dir)
	detach(t, p, dir)
}

func testContentError(t *testing.T, p plane.Plane) {
	dev := NewDev(19, 2<<20)
	img := Build(t, []Dev{dev})
	dir := attach(t, p, img)
	dev.Content.Fail.Store(true)
	err := img.Files[0].Verify(dir)
	if !errors.Is(err, unix.EIO) {
		t.Errorf("read of broken content: got %v, want EIO", err)
	}
	if _, err := mapped(t, dir, img.Files[0]); !errors.Is(err, errFault) {
		t.Errorf("fault on broken content: got %v, want %v", err, errFault)
	}
	dev.Content.Fail.Store(false)
	readAll(t, img, dir)
}

func testSlowContent(t *testing.T, p plane.Plane) {
	slow, quick := NewDev(20, 8<<20), NewDev(21, 1<<20)
	img, other := Build(t, []Dev{slow}), Build(t, []Dev{quick})
	dir, dir2 := attach(t, p, img), attach(t, p, other)
	release := slow.Content.Hold()
	defer release()
	var readers sync.WaitGroup
	for i := range 24 {
		readers.Go(func() {
			if err := img.Files[i%len(img.Files)].Verify(dir); err != nil {
				t.Error(err)
			}
		})
	}
	waitUntil(t, func() bool { return slow.Content.Active.Load() > 0 })
	done := make(chan struct{})
	go func() {
		defer close(done)
		readAll(t, other, dir2)
	}()
	select {
	case <-done:
	case <-time.After(45 * time.Second): // what is held fails after a minute
		t.Error("reads of available content wait for content that isn't")
	}
	release()
	readers.Wait()
	<-done
}

// testDetachEndsReads: after Detach no content is asked for any more, not even
// by readahead that is still under way.
func testDetachEndsReads(t *testing.T, p plane.Plane) {
	dev := NewDev(22, 16<<20)
	dev.Content.Delay = 20 * time.Millisecond
	img := Build(t, []Dev{dev})
	dir := attach(t, p, img)
	for _, f := range img.Files[:min(5, len(img.Files))] {
		buf := make([]byte, 1)
		if err := readSome(f, dir, 0, buf); err != nil {
			t.Fatal(err)
		}
	}
	detach(t, p, dir)
	if n := dev.Content.Active.Load(); n != 0 {
		t.Errorf("%d reads of content after the detach", n)
	}
	reads := dev.Content.Reads.Load()
	time.Sleep(50 * time.Millisecond)
	if n := dev.Content.Reads.Load(); n != reads {
		t.Errorf("%d new reads of content after the detach", n-reads)
	}
}

// testContentPerImage: of two images with one device, either's content will do.
func testContentPerImage(t *testing.T, p plane.Plane) {
	bad, good := NewDev(23, 2<<20), NewDev(23, 2<<20)
	one, two := Build(t, []Dev{bad}), Build(t, []Dev{good})
	dir1, dir2 := attach(t, p, one), attach(t, p, two)
	bad.Content.Fail.Store(true)
	readAll(t, two, dir2)
	detach(t, p, dir1)
	DropCaches(t, two, dir2)
	reads := bad.Content.Reads.Load()
	readAll(t, two, dir2)
	if n := bad.Content.Reads.Load(); n != reads {
		t.Errorf("content of a detached image was asked for %d times", n-reads)
	}
}

func waitUntil(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain")
		}
		time.Sleep(time.Millisecond)
	}
}

// DropCaches makes the kernel forget the pages of img's files at dir.
func DropCaches(t testing.TB, img Image, dir string) {
	for _, f := range img.Files {
		r, err := os.Open(filepath.Join(dir, f.Name))
		if err != nil {
			t.Error(err)
			return
		}
		if err := unix.Fadvise(int(r.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			t.Error(err)
		}
		r.Close()
	}
}
