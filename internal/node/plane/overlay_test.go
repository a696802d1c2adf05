package plane_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"sluice/internal/node/plane"
)

func TestMountOverlay(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting overlayfs needs root")
	}
	root := t.TempDir()
	lower, scratch, dir := filepath.Join(root, "lower"), filepath.Join(root, "scratch"), filepath.Join(root, "dir")
	for _, d := range []string{lower, scratch, dir} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	const mode = os.ModeDir | os.ModeSticky | 0o751
	if err := os.WriteFile(filepath.Join(lower, "file"), []byte("image"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(lower, 12, 34); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(lower, mode); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = plane.Unmount(dir, true) })  // only if the test ended before
	for _, want := range []string{"image", "changed"} { // the second time it finds what the first time wrote
		if err := plane.MountOverlay(lower, scratch, dir); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		if st := fi.Sys().(*syscall.Stat_t); fi.Mode() != mode || st.Uid != 12 || st.Gid != 34 {
			t.Errorf("the root is %v of %d:%d, want %v of 12:34", fi.Mode(), st.Uid, st.Gid, mode)
		}
		content, err := os.ReadFile(filepath.Join(dir, "file"))
		if err != nil || string(content) != want {
			t.Errorf("content %q, %v; want %q", content, err, want)
		}
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte("changed"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := plane.Unmount(dir, false); err != nil {
			t.Fatal(err)
		}
	}
	if content, err := os.ReadFile(filepath.Join(scratch, "upper", "file")); err != nil || string(content) != "changed" {
		t.Errorf("scratch has %q, %v", content, err)
	}
	if content, err := os.ReadFile(filepath.Join(lower, "file")); err != nil || string(content) != "image" {
		t.Errorf("lower has %q, %v", content, err)
	}
	for _, bad := range []string{"a:b", "a,b", `a\b`} {
		path := filepath.Join(root, bad)
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if plane.MountOverlay(path, scratch, dir) == nil || plane.MountOverlay(lower, path, dir) == nil {
			t.Errorf("a path with %q was taken", bad)
		}
	}
}
