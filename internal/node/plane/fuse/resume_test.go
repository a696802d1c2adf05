package fuse_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/durable"
	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/plane/planetest"
)

func TestCloseAndResume(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	dev, shared := planetest.NewDev(1, 8<<20+77), planetest.NewDev(2, 3<<20)
	img, other := planetest.Build(t, []planetest.Dev{dev, shared}), planetest.Build(t, []planetest.Dev{shared})
	at, at2 := t.TempDir(), t.TempDir()

	p := open(t, fuse.Options{Dir: dir})
	if p.Start().Resumed || p.Start().Reason != "" {
		t.Errorf("first start: %+v", p.Start())
	}
	attachAll(t, p, map[string]planetest.Image{at: img, at2: other})
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}

	// A read while there is no daemon waits.
	done := make(chan error, 1)
	go func() { done <- img.Files[0].Verify(at) }()
	select {
	case err := <-done:
		t.Fatalf("read without a daemon: %v", err)
	case <-time.After(100 * time.Millisecond):
	}

	p = open(t, fuse.Options{Dir: dir})
	if s := p.Start(); !s.Resumed || len(s.Images) != 2 || len(s.Stale) != 0 {
		t.Fatalf("second start: %+v", s)
	}
	if err := p.Attach(t.Context(), img.Plane, at); !errors.Is(err, plane.ErrAttached) {
		t.Errorf("attach over a living mount: %v", err)
	}
	for dir, img := range map[string]planetest.Image{at: img, at2: other} {
		if err := p.Adopt(t.Context(), img.Plane, dir); err != nil {
			t.Fatal(err)
		}
	}
	p.Ready()
	if err := <-done; err != nil {
		t.Errorf("read across the restart: %v", err)
	}
	verify(t, img, at)
	verify(t, other, at2)
	// A node that was given out is not given to another device.
	third := planetest.Build(t, []planetest.Dev{planetest.NewDev(3, 1<<20), dev})
	at3 := t.TempDir()
	attachAll(t, p, map[string]planetest.Image{at3: third})
	verify(t, third, at3)
	for _, dir := range []string{at, at2, at3} {
		if err := p.Detach(t.Context(), dir); err != nil {
			t.Error(err)
		}
	}
}

func attachAll(t *testing.T, p plane.Plane, images map[string]planetest.Image) {
	t.Helper()
	for dir, img := range images {
		if err := p.Attach(t.Context(), img.Plane, dir); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { plane.Unmount(dir, true) })
	}
}

func verify(t *testing.T, img planetest.Image, dir string) {
	t.Helper()
	for _, f := range img.Files {
		if err := f.Verify(dir); err != nil {
			t.Error(err)
		}
	}
}

// TestNotAdopted: a device whose image nobody adopts fails after Ready, not
// before; and when Ready never comes, after AdoptTimeout.
func TestNotAdopted(t *testing.T) {
	needRoot(t)
	dir, at := t.TempDir(), t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 1<<20)})
	p := open(t, fuse.Options{Dir: dir})
	attachAll(t, p, map[string]planetest.Image{at: img})
	p.Close()

	p = open(t, fuse.Options{Dir: dir, AdoptTimeout: 50 * time.Millisecond})
	if err := img.Files[0].Verify(at); !errors.Is(err, unix.EIO) {
		t.Errorf("without an adoption, after the timeout: got %v, want EIO", err)
	}
	p.Close()

	p = open(t, fuse.Options{Dir: dir, AdoptTimeout: time.Minute})
	done := make(chan error, 1)
	go func() { done <- img.Files[0].Verify(at) }()
	time.Sleep(20 * time.Millisecond)
	p.Ready()
	if err := <-done; !errors.Is(err, unix.EIO) {
		t.Errorf("without an adoption, after Ready: got %v, want EIO", err)
	}
	// A late adoption still helps.
	if err := p.Adopt(t.Context(), img.Plane, at); err != nil {
		t.Fatal(err)
	}
	verify(t, img, at)
	if err := p.Detach(t.Context(), at); err != nil {
		t.Error(err)
	}
}

// TestAdoptCompleted: what was lazy when it was attached is a file now.
func TestAdoptCompleted(t *testing.T) {
	needRoot(t)
	dir, at := t.TempDir(), t.TempDir()
	dev := planetest.NewDev(1, 1<<20)
	img := planetest.Build(t, []planetest.Dev{dev})
	p := open(t, fuse.Options{Dir: dir})
	attachAll(t, p, map[string]planetest.Image{at: img})
	p.Close()
	dev.File = true
	complete := planetest.Attachable(t, t.TempDir(), []planetest.Dev{dev}, img.Files)
	p = open(t, fuse.Options{Dir: dir})
	wrong := complete
	wrong.Devices = nil
	if err := p.Adopt(t.Context(), wrong, at); !errors.Is(err, plane.ErrNotAttached) {
		t.Errorf("adopt without the device: got %v, want %v", err, plane.ErrNotAttached)
	}
	if err := p.Adopt(t.Context(), complete, at); err != nil {
		t.Fatal(err)
	}
	verify(t, img, at)
	if n := dev.Content.Reads.Load(); n != 0 {
		t.Errorf("content was read %d times though the file is complete", n)
	}
	if err := p.Detach(t.Context(), at); err != nil {
		t.Error(err)
	}
}

// TestStale: the daemon and the holder both died, or the state was lost.
func TestStale(t *testing.T) {
	for name, harm := range map[string]func(t *testing.T, dir string){
		"holder killed": func(t *testing.T, dir string) {
			syscall.Kill(holderPID(t, dir), syscall.SIGKILL)
		},
		"state lost": func(t *testing.T, dir string) {
			// The images are lost with it, so this one is not in the list.
			rewriteEpoch(t, filepath.Join(dir, "state.json"))
		},
	} {
		t.Run(name, func(t *testing.T) { testStale(t, harm) })
	}
}

func testStale(t *testing.T, harm func(t *testing.T, dir string)) {
	needRoot(t)
	dir, at := t.TempDir(), t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 1<<20)})
	p := open(t, fuse.Options{Dir: dir})
	attachAll(t, p, map[string]planetest.Image{at: img})
	user, err := os.Open(filepath.Join(at, img.Files[0].Name)) // keeps the old mount in use
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	p.Close()
	harm(t, dir)

	p = open(t, fuse.Options{Dir: dir})
	s := p.Start()
	if s.Resumed || s.Reason == "" || len(s.Images) != 0 || len(s.Stale) != 1 || s.Stale[0] != at {
		t.Fatalf("start: %+v", s)
	}
	t.Log(s.Reason)
	if err := p.Adopt(t.Context(), img.Plane, at); !errors.Is(err, plane.ErrStale) {
		t.Errorf("adopt: got %v, want %v", err, plane.ErrStale)
	}
	p.Ready()
	if _, err := user.Read(make([]byte, 1)); !errors.Is(err, unix.EIO) {
		t.Errorf("read through the old mount: got %v, want EIO", err)
	}
	if err := p.Attach(t.Context(), img.Plane, at); err != nil {
		t.Fatalf("attach in place of the stale mount: %v", err)
	}
	verify(t, img, at)
	if err := p.Detach(t.Context(), at); err != nil {
		t.Error(err)
	}
	if m, err := plane.MountAt(at); m != nil || err != nil {
		t.Errorf("still mounted: %v, %v", m, err)
	}
}

// rewriteEpoch makes the state that of another connection.
func rewriteEpoch(t *testing.T, name string) {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	i := len(`{"version":1,"epoch":"`)
	old := string(data[i : i+8])
	out := []byte{}
	for rest := data; len(rest) > 0; {
		if len(rest) >= 8 && string(rest[:8]) == old {
			out, rest = append(out, "XXXXXXXX"...), rest[8:]
			continue
		}
		out, rest = append(out, rest[0]), rest[1:]
	}
	if err := os.WriteFile(name, out, 0o600); err != nil {
		t.Fatal(err)
	}
}

// hasFUSE reports whether a process has a descriptor of /dev/fuse.
func hasFUSE(pid int) bool {
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	return slices.ContainsFunc(fds, func(fd string) bool {
		target, err := os.Readlink(fd)
		return err == nil && target == "/dev/fuse"
	})
}

func holderPID(t *testing.T, dir string) int {
	t.Helper()
	pid, err := planetest.HolderPID(dir)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// TestHolderDies: a living daemon replaces it, and can be killed again then.
func TestHolderDies(t *testing.T) {
	needRoot(t)
	dir, at := t.TempDir(), t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 4<<20)})
	p := open(t, fuse.Options{Dir: dir})
	attachAll(t, p, map[string]planetest.Image{at: img})
	first := holderPID(t, dir)
	syscall.Kill(first, syscall.SIGKILL)
	waitUntil(t, time.Minute, "there's a new holder", func() bool {
		pid, err := planetest.HolderPID(dir)
		return err == nil && pid != first && hasFUSE(pid)
	})
	verify(t, img, at)
	planetest.DropCaches(t, img, at)
	p.Close()
	p = open(t, fuse.Options{Dir: dir})
	if !p.Start().Resumed {
		t.Fatalf("start: %+v", p.Start())
	}
	if err := p.Adopt(t.Context(), img.Plane, at); err != nil {
		t.Fatal(err)
	}
	verify(t, img, at)
	if err := p.Detach(t.Context(), at); err != nil {
		t.Error(err)
	}
}

// TestOrphans: when no daemon comes, reads end with EIO; when one comes after
// all, they work again.
func TestOrphans(t *testing.T) {
	needRoot(t)
	dir, at := t.TempDir(), t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 2<<20)})
	p := open(t, fuse.Options{Dir: dir, OrphanGrace: shortGrace})
	attachAll(t, p, map[string]planetest.Image{at: img})
	p.Close()
	for range 2 {
		if err := img.Files[0].Verify(at); !errors.Is(err, unix.EIO) {
			t.Errorf("read that no daemon came for: got %v, want EIO", err)
		}
	}
	p = open(t, fuse.Options{Dir: dir})
	if err := p.Adopt(t.Context(), img.Plane, at); err != nil {
		t.Fatal(err)
	}
	verify(t, img, at)
	if err := p.Detach(t.Context(), at); err != nil {
		t.Error(err)
	}
}

// What a process was writing when it was killed goes with the next one.
func TestTemporaryFilesAreRemoved(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	name := filepath.Join(dir, durable.TempPrefix+"123")
	if err := os.WriteFile(name, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, fuse.Options{Dir: dir})
	if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}

func TestOneProcessAtATime(t *testing.T) {
	dir := t.TempDir()
	open(t, fuse.Options{Dir: dir})
	if p, err := fuse.Open(t.Context(), fuse.Options{Dir: dir, HolderCommand: planetest.HolderCommand()}); err == nil {
		p.Close()
		t.Error("a second process got the plane, too")
	}
}

func TestReadTimeout(t *testing.T) {
	dev := planetest.NewDev(1, 1<<20)
	img := planetest.Build(t, []planetest.Dev{dev})
	const patience = time.Second
	p := open(t, fuse.Options{ReadTimeout: patience})
	at := t.TempDir()
	attachAll(t, p, map[string]planetest.Image{at: img})
	release := dev.Content.Hold()
	began := time.Now()
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			if err := img.Files[0].Verify(at); !errors.Is(err, unix.EIO) {
				t.Errorf("read of content that hangs: got %v, want EIO", err)
			}
		})
	}
	readers.Wait()
	if took := time.Since(began); took < patience {
		t.Errorf("reads failed after %v, the timeout is %v", took, patience)
	}
	release()
	verify(t, img, at)
	if err := p.Detach(t.Context(), at); err != nil {
		t.Error(err)
	}
}

func TestShutdownRefused(t *testing.T) {
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 1<<20)})
	p := open(t, fuse.Options{})
	at := t.TempDir()
	attachAll(t, p, map[string]planetest.Image{at: img})
	if err := p.Shutdown(context.Background()); !errors.Is(err, plane.ErrBusy) {
		t.Errorf("shutdown with an image: got %v, want %v", err, plane.ErrBusy)
	}
	verify(t, img, at)
	if err := p.Detach(t.Context(), at); err != nil {
		t.Error(err)
	}
}

// TestBlobs looks at the FUSE mount as a person does.
func TestBlobs(t *testing.T) {
	dir := t.TempDir()
	var devs []planetest.Dev
	for i := range 100 {
		devs = append(devs, planetest.NewDev(uint64(i+1), 5000))
	}
	img := planetest.Build(t, devs)
	p := open(t, fuse.Options{Dir: dir})
	at := t.TempDir()
	attachAll(t, p, map[string]planetest.Image{at: img})
	entries, err := os.ReadDir(filepath.Join(dir, "blobs"))
	if err != nil || len(entries) != len(devs) {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	name := filepath.Join(dir, "blobs", entries[0].Name())
	if info, err := os.Stat(name); err != nil || info.Size() != 8192 || info.Mode() != 0o400 {
		t.Errorf("%v, %v", info, err)
	}
	if f, err := os.OpenFile(name, os.O_RDWR, 0); !errors.Is(err, unix.EROFS) {
		f.Close()
		t.Errorf("open for writing: got %v, want EROFS", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "blobs", "no")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stat of what isn't there: %v", err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(f)
	f.Close()
	if err != nil || len(data) != 8192 {
		t.Errorf("read %d bytes, %v", len(data), err)
	}
	if err := p.Detach(t.Context(), at); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a device that no image has: got %v, want ErrNotExist", err)
	}
}
