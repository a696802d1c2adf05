package plane

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMakeNode: a node that is missing is made, one that is another device
// isn't used.
func TestMakeNode(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("making device nodes needs root")
	}
	name := filepath.Join(t.TempDir(), "node")
	for range 2 {
		if err := makeNode(name, unix.S_IFBLK, loopMajor, 3); err != nil {
			t.Fatal(err)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil || st.Mode != unix.S_IFBLK|0o600 || st.Rdev != unix.Mkdev(loopMajor, 3) {
		t.Errorf("got mode %o, device %#x, %v", st.Mode, st.Rdev, err)
	}
	if err := makeNode(name, unix.S_IFBLK, loopMajor, 4); err == nil {
		t.Error("took 7:3 for 7:4")
	}
	if err := makeNode(name, unix.S_IFCHR, loopMajor, 3); err == nil {
		t.Error("took a block device for a character device")
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := makeNode(file, unix.S_IFBLK, loopMajor, 3); err == nil {
		t.Error("took a file for a device")
	}
}
