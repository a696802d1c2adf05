package plane_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/planetest"
)

func TestMain(m *testing.M) {
	planetest.Child()
	os.Exit(m.Run())
}

func needRoot(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
}

func TestProbe(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	for _, mode := range plane.Modes() {
		s, err := plane.Probe(dir, mode)
		var unsupported *plane.UnsupportedError
		switch {
		case errors.As(err, &unsupported):
			t.Log(mode, err)
		case err != nil || s.Mode != mode || s.Kernel == "" || len(s.Reasons) > 0:
			t.Errorf("%s: got %+v, %v", mode, s, err)
		}
	}
	if s, err := plane.Probe(filepath.Join(dir, "no"), plane.FileBacked); !errors.Is(err, plane.ErrNotProbed) || s.Mode != "" {
		t.Errorf("in a directory that isn't there: %+v, %v", s, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("the probe left %v, %v", left, err)
	}
}

// TestProbeOverlay: the kernel refuses metadata on a stacked file system, and
// the reason says so; a loop device does not mind.
func TestProbeOverlay(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	merged := filepath.Join(dir, "merged")
	options := "lowerdir=" + dir + "/lower,upperdir=" + dir + "/upper,workdir=" + dir + "/work"
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		t.Skip("no overlayfs here: ", err)
	}
	t.Cleanup(func() { plane.Unmount(merged, true) })
	s, err := plane.Probe(merged, plane.FileBacked)
	var unsupported *plane.UnsupportedError
	if !errors.As(err, &unsupported) || s.Mode != "" {
		t.Fatalf("got %+v, %v", s, err)
	}
	if text := err.Error(); !strings.Contains(text, "is on overlayfs") {
		t.Errorf("the reason does not name overlayfs: %s", text)
	}
	s, err = plane.Probe(merged, plane.Modes()...)
	if err != nil || s.Mode != plane.Loop || len(s.Reasons) != 1 || !strings.Contains(s.Reasons[0], "is on overlayfs") {
		t.Errorf("got %+v, %v; want loop devices, and why", s, err)
	}
}

// TestLongPaths: fsconfig(2) takes no string of more than 255 bytes.
func TestLongPaths(t *testing.T) {
	needRoot(t)
	dev := planetest.NewDev(1, 100_000&^511)
	dev.File = true
	img := planetest.Build(t, []planetest.Dev{dev})
	long := filepath.Join(t.TempDir(), strings.Repeat("d", 200), strings.Repeat("e", 200))
	if err := os.MkdirAll(long, 0o700); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{img.Plane.Metadata: "metadata", img.Plane.Devices[0].File: "device"} {
		if err := os.Rename(from, filepath.Join(long, to)); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	if err := plane.MountEROFS(filepath.Join(long, "metadata"), []string{filepath.Join(long, "device")}, dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { plane.Unmount(dir, true) })
	for _, f := range img.Files {
		if err := f.Verify(dir); err != nil {
			t.Error(err)
		}
	}
}

// boundLoops are the loop devices of files below dir.
func boundLoops(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	var bound []string
	for _, name := range names {
		if file, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(file), dir) { // else it was just let go
			bound = append(bound, name)
		}
	}
	return bound
}

// noneBound waits until files below dir have no loop devices any more: others,
// such as udev, look at new ones, and keep them until they have.
func noneBound(t *testing.T, dir string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); len(boundLoops(t, dir)) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("without a mount there still are %q", boundLoops(t, dir))
		}
	}
}

// TestLoopsLetGo: loop devices live exactly as long as the mount that has them.
func TestLoopsLetGo(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	var devs []planetest.Dev
	for i := range 5 {
		dev := planetest.NewDev(uint64(i+1), 8192)
		dev.File = true
		devs = append(devs, dev)
	}
	img := planetest.Build(t, devs)
	metadata := filepath.Join(base, "metadata")
	if err := os.Rename(img.Plane.Metadata, metadata); err != nil {
		t.Fatal(err)
	}
	files := []string{}
	for i, d := range img.Plane.Devices {
		files = append(files, filepath.Join(base, fmt.Sprint(i)))
		if err := os.Rename(d.File, files[i]); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	if err := plane.MountEROFSLoop(metadata, files[:4], dir); err == nil {
		t.Error("mounted with one device too few")
	}
	if err := plane.MountEROFSLoop(metadata, append(files[:4:4], filepath.Join(base, "no")), dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("mounted with a device that isn't there: %v", err)
	}
	noneBound(t, base)
	if err := plane.MountEROFSLoop(metadata, files, dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { plane.Unmount(dir, true) })
	if bound := boundLoops(t, base); len(bound) != 6 {
		t.Errorf("the mount has %d loop devices, want 6", len(bound))
	}
	for _, f := range img.Files {
		if err := f.Verify(dir); err != nil {
			t.Error(err)
		}
	}
	if err := plane.Unmount(dir, false); err != nil {
		t.Fatal(err)
	}
	noneBound(t, base)
}

// TestKernelMessage: an error of the mount has the kernel's own words in it
// where there are any, and in any case names the file.
func TestKernelMessage(t *testing.T) {
	needRoot(t)
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 4096)})
	err := plane.MountEROFS(img.Plane.Metadata, nil, t.TempDir(), "nosuchoption")
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "kernel: ") || !strings.Contains(err.Error(), "nosuchoption") {
		t.Errorf("got %v", err)
	}
}

func TestUnmount(t *testing.T) {
	needRoot(t)
	if err := plane.Unmount(t.TempDir(), false); !errors.Is(err, plane.ErrNotAttached) {
		t.Errorf("got %v, want %v", err, plane.ErrNotAttached)
	}
}
