package plane

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// MountOverlay mounts an overlayfs on dir that shows lower and can be written
// to. What is written goes to the directories upper and work in scratch, which
// is on a file system that overlayfs can write to, and private: files in upper
// can have any owner and mode. They are made if they are missing; with those of
// an earlier mount its changes are there again.
func MountOverlay(lower, scratch, dir string) error {
	return mountOverlay(lower, scratch, dir, 0)
}

// MountOverlayRestricted is MountOverlay for a dir that other users of the
// machine may reach: device nodes and set-user-ID bits have no effect there.
func MountOverlayRestricted(lower, scratch, dir string) error {
	return mountOverlay(lower, scratch, dir, unix.MS_NODEV|unix.MS_NOSUID)
}

// BindRestricted makes what is mounted at from visible at dir too, read-only,
// with device nodes and set-user-ID bits of no effect. There's no moment when
// they have one.
func BindRestricted(from, dir string) error {
	mnt, err := unix.OpenTree(unix.AT_FDCWD, from, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("bind %s to %s: clone the mount: %w", from, dir, err)
	}
	defer unix.Close(mnt)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID}
	if err := unix.MountSetattr(mnt, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("bind %s to %s: set the mount's flags: %w", from, dir, err)
	}
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("bind %s to %s: %w", from, dir, err)
	}
	return nil
}

func mountOverlay(lower, scratch, dir string, flags uintptr) error {
	for _, path := range []string{lower, scratch} {
		if strings.ContainsAny(path, `:,\`) {
			return fmt.Errorf("mount overlayfs on %s: %q has characters that overlayfs gives a meaning: use another directory", dir, path)
		}
	}
	upper, work := filepath.Join(scratch, "upper"), filepath.Join(scratch, "work")
	if err := makeUpper(lower, upper); err != nil {
		return err
	}
	if err := os.Mkdir(work, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	options := "lowerdir=" + lower + ",upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("overlay", dir, "overlay", flags, options); err != nil {
		return fmt.Errorf("mount overlayfs on %s with %s: %w", dir, options, err)
	}
	return nil
}

// makeUpper makes the upper directory, whose owner and mode are those of the
// root that the mount shows: that of lower.
func makeUpper(lower, upper string) error {
	fi, err := os.Stat(lower)
	if err != nil {
		return err
	}
	if err := os.Mkdir(upper, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil
		}
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("owner of %s is unknown", lower)
	}
	return errors.Join(os.Chown(upper, int(st.Uid), int(st.Gid)), os.Chmod(upper, fi.Mode()))
}
