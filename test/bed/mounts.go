package bed

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Mounts lists the mount points below dir, in the order they were made.
func Mounts(dir string) ([]string, error) {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var all []string
	for line := range strings.Lines(string(b)) {
		// mountinfo(5): the fifth field is the mount point, spaces as \040.
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		if p := strings.ReplaceAll(f[4], `\040`, " "); strings.HasPrefix(p, dir+"/") {
			all = append(all, p)
		}
	}
	return all, nil
}

// UnmountAll removes every mount below dir, the newest first, also where a
// dead process has left one behind.
func UnmountAll(dir string) error {
	for {
		all, err := Mounts(dir)
		if err != nil || len(all) == 0 {
			return err
		}
		progress := false
		for _, m := range slices.Backward(all) {
			if syscall.Unmount(m, syscall.MNT_DETACH) == nil {
				progress = true
			}
		}
		if !progress {
			return &os.PathError{Op: "unmount", Path: all[len(all)-1], Err: syscall.EBUSY}
		}
	}
}

// DropCaches empties the kernel's page, dentry and inode caches, so that a
// measurement begins cold. It needs root.
func DropCaches() error {
	syscall.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3\n"), 0o200)
}
