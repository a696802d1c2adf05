package plane_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
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
		if err := plane.MountOverlay([]string{lower}, scratch, dir); err != nil {
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
		if plane.MountOverlay([]string{path}, scratch, dir) == nil || plane.MountOverlay([]string{lower}, path, dir) == nil {
			t.Errorf("a path with %q was taken", bad)
		}
	}
}

// Of many directories the topmost one that has a name counts; mount(2) has no room
// for so many.
func TestMountTallOverlay(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting overlayfs needs root")
	}
	root := t.TempDir()
	deep := filepath.Join(root, strings.Repeat("d", 200), strings.Repeat("e", 200)) // too long for fsconfig(2)
	for _, layers := range []int{1, 3, 127} {
		var lower []string
		for i := range layers {
			d := filepath.Join(deep, fmt.Sprint(layers, "-", i))
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"all", fmt.Sprint(i)} {
				if err := os.WriteFile(filepath.Join(d, name), fmt.Append(nil, i), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			lower = append(lower, d)
		}
		scratch, dir := t.TempDir(), t.TempDir()
		if err := plane.MountOverlayRestricted(lower, scratch, dir); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = plane.Unmount(dir, true) })
		for name, want := range map[string]string{"all": "0", "0": "0", fmt.Sprint(layers - 1): fmt.Sprint(layers - 1)} {
			if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
				t.Errorf("%d layers: %s is %q, %v; want %q", layers, name, got, err, want)
			}
		}
		m, err := plane.MountAt(dir)
		if err != nil || m == nil || !strings.Contains(m.Options, "nodev") || !strings.Contains(m.Options, "nosuid") {
			t.Errorf("%d layers: mounted with %+v, %v", layers, m, err)
		}
		if err := plane.Unmount(dir, false); err != nil {
			t.Fatal(err)
		}
	}
	if plane.MountOverlay(nil, t.TempDir(), t.TempDir()) == nil {
		t.Error("nothing was mounted")
	}
}
