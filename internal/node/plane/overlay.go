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

// MountOverlay mounts an overlayfs on dir that shows the directories lower, the
// topmost first, and can be written to. What is written goes to the directories
// upper and work in scratch, which is on a file system that overlayfs can write
// to, and private: files in upper can have any owner and mode. They are made if
// they are missing; with those of an earlier mount its changes are there again.
//
// The kernel stacks at most 500 directories, and file systems two deep: an EROFS
// on a file is one, so no lower may be an overlayfs of such.
func MountOverlay(lower []string, scratch, dir string) error {
	return mountOverlay(lower, scratch, dir, 0)
}

// MountOverlayRestricted is MountOverlay for a dir that other users of the
// machine may reach: device nodes and set-user-ID bits have no effect there.
func MountOverlayRestricted(lower []string, scratch, dir string) error {
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

// maxOptions is what mount(2) takes of options without the final zero.
const maxOptions = 4095

func mountOverlay(lower []string, scratch, dir string, flags uintptr) error {
	if len(lower) == 0 {
		return fmt.Errorf("mount overlayfs on %s: there's nothing to show", dir)
	}
	for _, path := range append([]string{scratch}, lower...) {
		if strings.ContainsAny(path, `:,\`) {
			return fmt.Errorf("mount overlayfs on %s: %q has characters that overlayfs gives a meaning: use another directory", dir, path)
		}
	}
	upper, work := filepath.Join(scratch, "upper"), filepath.Join(scratch, "work")
	if err := makeUpper(lower[0], upper); err != nil {
		return err
	}
	if err := os.Mkdir(work, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	options := "lowerdir=" + strings.Join(lower, ":") + ",upperdir=" + upper + ",workdir=" + work
	if len(options) > maxOptions {
		return mountTallOverlay(lower, upper, work, dir, flags)
	}
	if err := unix.Mount("overlay", dir, "overlay", flags, options); err != nil {
		return fmt.Errorf("mount overlayfs on %s with %s: %w", dir, options, err)
	}
	return nil
}

// mountTallOverlay mounts an overlayfs whose options have no room in mount(2), by
// fsconfig(2). That takes lower directories one by one since Linux 6.5.
func mountTallOverlay(lower []string, upper, work, dir string, flags uintptr) error {
	mnt, err := openOverlay(lower, upper, work, flags)
	if err != nil {
		return fmt.Errorf("mount overlayfs of %d directories on %s: %w", len(lower), dir, err)
	}
	defer unix.Close(mnt)
	return place(mnt, "overlayfs", dir)
}

// openOverlay makes the mount without giving it a place in the tree.
func openOverlay(lower []string, upper, work string, flags uintptr) (int, error) {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen overlay: %w", err)
	}
	defer unix.Close(fs)
	set := func(key, path string) error {
		held, err := setPath(fs, key, path)
		if held >= 0 {
			unix.Close(held) // overlayfs has looked it up
		}
		return err
	}
	for _, path := range lower {
		if err := set("lowerdir+", path); err != nil {
			return -1, err
		}
	}
	if err := errors.Join(set("upperdir", upper), set("workdir", work)); err != nil {
		return -1, err
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, kernelError(fs, "create the file system", err)
	}
	attr := 0
	if flags&unix.MS_NODEV != 0 {
		attr |= unix.MOUNT_ATTR_NODEV
	}
	if flags&unix.MS_NOSUID != 0 {
		attr |= unix.MOUNT_ATTR_NOSUID
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return -1, kernelError(fs, "fsmount", err)
	}
	return mnt, nil
}

// makeUpper makes the upper directory, whose owner and mode are those of the
// root that the mount shows: that of the topmost lower directory.
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
