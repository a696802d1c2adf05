package fanotify_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fanotify"
	"sluice/internal/node/plane/planetest"
)

func attach(t *testing.T, p plane.Plane, img planetest.Image) string {
	t.Helper()
	dir := t.TempDir()
	if err := p.Attach(t.Context(), img.Plane, dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { plane.Unmount(dir, true) })
	return dir
}

func adopt(t *testing.T, p plane.Plane, img planetest.Image, dir string) {
	t.Helper()
	if err := p.Adopt(t.Context(), img.Plane, dir); err != nil {
		t.Fatal(err)
	}
}

func detach(t *testing.T, p plane.Plane, dir string) {
	t.Helper()
	if err := p.Detach(t.Context(), dir); err != nil {
		t.Error(err)
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

func readers(t *testing.T, img planetest.Image, dir string, n int) <-chan error {
	done := make(chan error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { done <- img.Files[i%len(img.Files)].Verify(dir) })
	}
	t.Cleanup(all.Wait)
	return done
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// TestResume: reads that were under way when the daemon closed, and those that
// began without one, are answered by the next.
func TestResume(t *testing.T) {
	dir := t.TempDir()
	dev := planetest.NewDev(1, 8<<20+77)
	img, other := planetest.Build(t, []planetest.Dev{dev, planetest.NewDev(2, 3<<20)}), planetest.Build(t, []planetest.Dev{dev})
	p := open(t, fanotify.Options{Dir: dir})
	if s := p.Start(); s.Resumed || s.Reason != "" {
		t.Errorf("first start: %+v", s)
	}
	at, at2 := attach(t, p, img), attach(t, p, other)
	release := dev.Content.Hold()
	before := readers(t, img, at, 3)
	waitFor(t, "reads of content", func() bool { return p.Stats().Waiting == 3 })
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	release()
	after := readers(t, other, at2, 3)

	p = open(t, fanotify.Options{Dir: dir})
	if s := p.Start(); !s.Resumed || len(s.Images) != 2 || len(s.Stale) != 0 {
		t.Fatalf("second start: %+v", s)
	}
	if err := p.Attach(t.Context(), img.Plane, at); !errors.Is(err, plane.ErrAttached) {
		t.Errorf("attach over a living mount: %v", err)
	}
	adopt(t, p, img, at)
	adopt(t, p, other, at2)
	p.Ready()
	for range 3 {
		if err := errors.Join(<-before, <-after); err != nil {
			t.Errorf("read across the restart: %v", err)
		}
	}
	verify(t, img, at)
	verify(t, other, at2)
	detach(t, p, at)
	detach(t, p, at2)
	if left, err := os.ReadDir(filepath.Join(dir, "files")); len(left) != 0 || err != nil {
		t.Errorf("files of devices that no image has: %v, %v", left, err)
	}
}

// TestNotAdopted: a device whose image nobody adopts fails after Ready, not
// before; a late adoption still helps.
func TestNotAdopted(t *testing.T) {
	dir := t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 1<<20)})
	p := open(t, fanotify.Options{Dir: dir})
	at := attach(t, p, img)
	p.Close()
	p = open(t, fanotify.Options{Dir: dir, AdoptTimeout: time.Minute})
	done := readers(t, img, at, 1)
	waitFor(t, "a read", func() bool { return p.Stats().Waiting > 0 })
	p.Ready()
	if err := <-done; !errors.Is(err, unix.EIO) {
		t.Errorf("without an adoption, after Ready: got %v, want EIO", err)
	}
	adopt(t, p, img, at)
	verify(t, img, at)
	detach(t, p, at)
}

// TestHolderDies: a living daemon replaces it, and can go then.
func TestHolderDies(t *testing.T) {
	dir := t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 4<<20)})
	p := open(t, fanotify.Options{Dir: dir})
	at := attach(t, p, img)
	first := kill(t, dir)
	waitFor(t, "a new holder", func() bool {
		pid, err := planetest.HolderPID(dir)
		return err == nil && pid != first && hasGroup(pid)
	})
	p.Close()
	p = open(t, fanotify.Options{Dir: dir})
	if !p.Start().Resumed {
		t.Fatalf("start: %+v", p.Start())
	}
	adopt(t, p, img, at)
	verify(t, img, at)
	detach(t, p, at)
}

// kill kills the holder and waits until the group is not its any more.
func kill(t *testing.T, dir string) int {
	t.Helper()
	pid, err := planetest.HolderPID(dir)
	if err != nil {
		t.Fatal(err)
	}
	syscall.Kill(pid, syscall.SIGKILL)
	waitFor(t, "the holder's end", func() bool { return !hasGroup(pid) })
	return pid
}

// hasGroup reports whether a process has a fanotify group.
func hasGroup(pid int) bool {
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && strings.Contains(to, "fanotify") {
			return true
		}
	}
	return false
}

// TestBothDie is what this plane can't prevent: without daemon and holder the
// kernel lets reads pass, and they show zeros. The next daemon stops that: the
// mount is stale, what it still asks for fails, a new mount is right.
func TestBothDie(t *testing.T) {
	dir := t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 8<<20)})
	p := open(t, fanotify.Options{Dir: dir})
	at := attach(t, p, img)
	user, err := os.Open(filepath.Join(at, img.Files[len(img.Files)-1].Name)) // keeps the old mount in use
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	p.Close()
	kill(t, dir)
	page := make([]byte, 4096)
	if _, err := user.ReadAt(page, 0); err != nil || !bytes.Equal(page, make([]byte, len(page))) {
		t.Errorf("read without a group: %v, zeros: %t; the documentation says zeros", err, bytes.Equal(page, make([]byte, len(page))))
	}

	p = open(t, fanotify.Options{Dir: dir})
	s := p.Start()
	if s.Resumed || s.Reason == "" || len(s.Images) != 0 || len(s.Stale) != 1 || s.Stale[0] != at {
		t.Fatalf("start: %+v", s)
	}
	t.Log(s.Reason)
	if err := p.Adopt(t.Context(), img.Plane, at); !errors.Is(err, plane.ErrStale) {
		t.Errorf("adopt: got %v, want %v", err, plane.ErrStale)
	}
	p.Ready()
	if err := unix.Fadvise(int(user.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	if _, err := user.ReadAt(page, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("read through the old mount: got %v, want EIO", err)
	}
	if err := p.Attach(t.Context(), img.Plane, at); err != nil {
		t.Fatalf("attach in place of the stale mount: %v", err)
	}
	verify(t, img, at)
	if _, err := user.ReadAt(page, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("read through the old mount after the new one: got %v, want EIO", err)
	}
	detach(t, p, at)
}

// TestStateLost: a group whose state is lost is given up without letting reads
// pass.
func TestStateLost(t *testing.T) {
	dir := t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 4<<20)})
	p := open(t, fanotify.Options{Dir: dir})
	at := attach(t, p, img)
	p.Close()
	if err := os.Remove(filepath.Join(dir, "state.json")); err != nil {
		t.Fatal(err)
	}
	waiting := readers(t, img, at, 2)
	p = open(t, fanotify.Options{Dir: dir})
	if s := p.Start(); s.Resumed || s.Reason == "" {
		t.Fatalf("start: %+v", s)
	}
	for range 2 {
		if err := <-waiting; !errors.Is(err, unix.EIO) {
			t.Errorf("read of a mount that was given up: got %v, want EIO", err)
		}
	}
	if err := plane.Unmount(at, false); err != nil {
		t.Error(err)
	}
}

// TestFileLost: somebody removed the file of a device while no daemon was there.
func TestFileLost(t *testing.T) {
	dir := t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 4<<20)})
	p := open(t, fanotify.Options{Dir: dir})
	at := attach(t, p, img)
	p.Close()
	if err := os.RemoveAll(filepath.Join(dir, "files")); err != nil {
		t.Fatal(err)
	}
	p = open(t, fanotify.Options{Dir: dir})
	if s := p.Start(); !s.Resumed || len(s.Stale) != 1 {
		t.Fatalf("start: %+v", s)
	}
	if err := img.Files[0].Verify(at); !errors.Is(err, unix.EIO) {
		t.Errorf("read of what has no file: got %v, want EIO", err)
	}
	if err := p.Attach(t.Context(), img.Plane, at); err != nil {
		t.Fatal(err)
	}
	verify(t, img, at)
	detach(t, p, at)
}

// shortGrace is one that tests can wait for, and after which a process that is
// merely slow isn't taken for one that is stuck.
const shortGrace = 3 * time.Second

// TestOrphans: when no daemon comes, reads end with EIO; when one comes after
// all, they work again.
func TestOrphans(t *testing.T) {
	dir := t.TempDir()
	dev := planetest.NewDev(1, 2<<20)
	img := planetest.Build(t, []planetest.Dev{dev})
	p := open(t, fanotify.Options{Dir: dir, OrphanGrace: shortGrace})
	at := attach(t, p, img)
	release := dev.Content.Hold()
	taken := readers(t, img, at, 1)
	waitFor(t, "a read", func() bool { return p.Stats().Waiting == 1 })
	p.Close()
	release()
	if err := errors.Join(<-taken, img.Files[1].Verify(at)); !errors.Is(err, unix.EIO) {
		t.Errorf("read that no daemon came for: got %v, want EIO", err)
	}
	p = open(t, fanotify.Options{Dir: dir})
	adopt(t, p, img, at)
	verify(t, img, at)
	detach(t, p, at)
}

// TestHolderEnds: a holder that no daemon comes for and no image needs ends.
func TestHolderEnds(t *testing.T) {
	dir := t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 1<<20)})
	p := open(t, fanotify.Options{Dir: dir, OrphanGrace: shortGrace})
	at := attach(t, p, img)
	p.Close()
	if err := img.Files[0].Verify(at); !errors.Is(err, unix.EIO) {
		t.Errorf("read after the grace: got %v, want EIO", err)
	}
	if _, err := planetest.HolderPID(dir); err != nil {
		t.Errorf("the holder of an image that is mounted has ended: %v", err)
	}
	if err := plane.Unmount(at, false); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the holder's end", func() bool {
		_, err := planetest.HolderPID(dir)
		return err != nil
	})
}

func TestReadTimeout(t *testing.T) {
	dev := planetest.NewDev(1, 1<<20)
	img := planetest.Build(t, []planetest.Dev{dev})
	const patience = time.Second
	p := open(t, fanotify.Options{ReadTimeout: patience})
	at := attach(t, p, img)
	release := dev.Content.Hold()
	began := time.Now()
	done := readers(t, img, at, 1)
	if err := <-done; !errors.Is(err, unix.EIO) {
		t.Errorf("read of content that hangs: got %v, want EIO", err)
	}
	if took := time.Since(began); took < patience {
		t.Errorf("reads failed after %v, the timeout is %v", took, patience)
	}
	release()
	verify(t, img, at)
	detach(t, p, at)
}

// complete is content that says when it is here.
type complete struct {
	*planetest.Content
	here chan struct{}
}

func (c complete) Complete() bool {
	select {
	case <-c.here:
		return true
	default:
		return false
	}
}

// TestComplete: a device whose content is here is copied, and then the kernel
// doesn't ask any more, not even a daemon that doesn't know of it.
func TestComplete(t *testing.T) {
	dir := t.TempDir()
	dev := planetest.NewDev(1, 6<<20+100)
	img := planetest.Build(t, []planetest.Dev{dev})
	content := complete{dev.Content, make(chan struct{})}
	img.Plane.Devices[0].Content = content
	p := open(t, fanotify.Options{Dir: dir})
	at := attach(t, p, img)
	if err := img.Files[0].Verify(at); err != nil {
		t.Fatal(err)
	}
	close(content.here)
	if err := img.Files[1].Verify(at); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the copy", func() bool { return p.Stats().Filled >= 6<<20+100 })
	verify(t, img, at)
	for _, restart := range []bool{false, true} {
		if restart {
			p.Close()
			p = open(t, fanotify.Options{Dir: dir})
			adopt(t, p, img, at)
		}
		waitFor(t, "a read that isn't asked about", func() bool {
			asked := p.Stats().Events
			planetest.DropCaches(t, img, at)
			verify(t, img, at)
			return p.Stats().Events == asked
		})
	}
	detach(t, p, at)
}

// TestSpace: an image that there's no space for isn't attached.
func TestSpace(t *testing.T) {
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 1<<20)})
	img.Plane.Devices[0].Size = 1 << 50
	p := open(t, fanotify.Options{})
	if err := p.Attach(t.Context(), img.Plane, t.TempDir()); !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EFBIG) {
		t.Errorf("attach without space: %v", err)
	}
}

// TestUnsupported: a file system without pre-content events is named.
func TestUnsupported(t *testing.T) {
	need(t)
	files := t.TempDir()
	if err := unix.Mount("tmpfs", files, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(files, 0)
	_, err := fanotify.Open(t.Context(), fanotify.Options{Dir: t.TempDir(), Files: files, HolderCommand: planetest.HolderCommand()})
	var unsupported *plane.UnsupportedError
	if !errors.As(err, &unsupported) {
		t.Errorf("got %v", err)
	}
	t.Log(err)
}

func TestOneProcessAtATime(t *testing.T) {
	dir := t.TempDir()
	open(t, fanotify.Options{Dir: dir})
	if p, err := fanotify.Open(t.Context(), options(dir, nil)); err == nil {
		p.Close()
		t.Error("a second process got the plane, too")
	}
}

// TestOtherPath: who reads a device's file directly isn't asked about.
func TestOtherPath(t *testing.T) {
	dir := t.TempDir()
	dev := planetest.NewDev(1, 1<<20)
	p := open(t, fanotify.Options{Dir: dir})
	at := attach(t, p, planetest.Build(t, []planetest.Dev{dev}))
	f, err := os.Open(filepath.Join(dir, "files", "test-0000000000000001"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.Copy(io.Discard, f); err != nil || dev.Content.Reads.Load() != 0 {
		t.Errorf("%v; content was read %d times", err, dev.Content.Reads.Load())
	}
	f.Close()
	detach(t, p, at)
}
