package plane_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
	s, err := plane.Probe(dir)
	if err != nil {
		t.Skip(err)
	}
	if s.Mode != plane.FileBacked || s.Kernel == "" {
		t.Errorf("got %+v", s)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("the probe left %v, %v", left, err)
	}
}

// TestProbeOverlay: the kernel refuses metadata on a stacked file system, and
// the reason says so.
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
	s, err := plane.Probe(merged)
	var unsupported *plane.UnsupportedError
	if !errors.As(err, &unsupported) || s.Mode != "" {
		t.Fatalf("got %+v, %v", s, err)
	}
	if text := err.Error(); !strings.Contains(text, "is on overlayfs") {
		t.Errorf("the reason does not name overlayfs: %s", text)
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
