package plane

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// MountEROFS mounts the EROFS file metadata, with its devices in the order of
// its device table, read-only on dir. options are further flags of EROFS, for
// instance "directio".
//
//	fsopen("erofs")
//	fsconfig(SET_FLAG "ro"); fsconfig(SET_STRING "source"); fsconfig(SET_STRING "device") …
//	fsconfig(CMD_CREATE); fsmount(); move_mount(dir)
//
// mount(2) would not do: all its options have to fit in one page, some thirty
// devices. The mount appears whole or not at all.
func MountEROFS(metadata string, devices []string, dir string, options ...string) error {
	mnt, err := openEROFS(metadata, devices, options)
	if err != nil {
		return fmt.Errorf("mount %s on %s: %w", metadata, dir, err)
	}
	defer unix.Close(mnt)
	return place(mnt, metadata, dir)
}

// place gives a mount its place in the tree.
func place(mnt int, what, dir string) error {
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move mount of %s to %s: %w", what, dir, err)
	}
	return nil
}

// openEROFS makes the mount without giving it a place in the tree: closing the
// descriptor undoes it.
func openEROFS(metadata string, devices, options []string) (int, error) {
	fs, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen erofs: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
		return -1, kernelError(fs, "set ro", err)
	}
	for _, o := range options {
		if err := unix.FsconfigSetFlag(fs, o); err != nil {
			return -1, kernelError(fs, "set "+o, err)
		}
	}
	for i, path := range append([]string{metadata}, devices...) {
		key := "device"
		if i == 0 {
			key = "source"
		}
		held, err := setPath(fs, key, path)
		if err != nil {
			return -1, err
		}
		if held >= 0 {
			defer unix.Close(held) // until the file system is created
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, kernelError(fs, "create the file system", err)
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return -1, kernelError(fs, "fsmount", err)
	}
	return mnt, nil
}

// maxString is what fsconfig(2) takes as a string, without the final zero.
const maxString = 255

// setPath sets an option to a path. One that is too long for fsconfig(2) is
// given as a descriptor's name in /proc; EROFS opens it when the file system is
// created, so the descriptor is returned for the caller to close after that
// (-1: none).
func setPath(fs int, key, path string) (held int, err error) {
	held = -1
	value := path
	if len(path) > maxString {
		if held, err = unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0); err != nil {
			return -1, fmt.Errorf("open %s: %w", path, err)
		}
		value = fmt.Sprintf("/proc/self/fd/%d", held)
	}
	if err := unix.FsconfigSetString(fs, key, value); err != nil {
		if held >= 0 {
			unix.Close(held)
		}
		return -1, kernelError(fs, fmt.Sprintf("set %s=%s", key, path), err)
	}
	return held, nil
}

// kernelError adds what the kernel wrote into the log of the file system
// context, which says more than an errno: one message per read(2), each with a
// severity letter in front.
func kernelError(fs int, doing string, err error) error {
	var lines []string
	buf := make([]byte, 1024)
	for len(lines) < 16 {
		n, rerr := unix.Read(fs, buf)
		if rerr != nil || n <= 0 { // ENODATA: no more
			break
		}
		lines = append(lines, strings.TrimSpace(string(buf[:n])))
	}
	switch {
	case len(lines) > 0:
		return fmt.Errorf("%s: %w (kernel: %s)", doing, err, strings.Join(lines, "; "))
	case errors.Is(err, unix.ENOTBLK):
		return fmt.Errorf("%s: %w (the kernel cannot mount EROFS from this file: no EROFS_FS_BACKED_BY_FILE, or the file is on a stacked file system such as overlayfs)", doing, err)
	default:
		return fmt.Errorf("%s: %w (the kernel log may say more)", doing, err)
	}
}

// Unmount removes the topmost mount at dir. It fails with ErrBusy when it is in
// use, unless lazy: then it disappears from the tree now and ends when its last
// user does.
func Unmount(dir string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(dir, flags)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("unmount %s: %w", dir, ErrBusy)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("unmount %s: %w", dir, ErrNotAttached)
	case err != nil:
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// UnmountAll removes all mounts at dir, one above the other, lazily.
func UnmountAll(dir string) error {
	for range 16 {
		m, err := MountAt(dir)
		if err != nil || m == nil {
			return err
		}
		if err := Unmount(dir, true); err != nil {
			return err
		}
	}
	return fmt.Errorf("unmount %s: there's always another mount", dir)
}

// MountAt returns the topmost mount at dir in this mount namespace, nil if
// there is none. dir is as the kernel shows it: absolute, without symbolic
// links (see CleanDir). It looks only into /proc/self/mountinfo and so cannot
// hang on a file system that nobody serves.
func MountAt(dir string) (*mountinfo.Info, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.Mountpoint != dir, false
	})
	if err != nil {
		return nil, fmt.Errorf("read mount table: %w", err)
	}
	if len(mounts) == 0 {
		return nil, nil
	}
	return mounts[len(mounts)-1], nil
}

// MountsBelow returns the directories below dir where something is mounted in
// this mount namespace, in the order of the mount table: parents come before
// what is mounted in them.
func MountsBelow(dir string) ([]string, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Mountpoint, dir+"/"), false
	})
	if err != nil {
		return nil, fmt.Errorf("read mount table: %w", err)
	}
	dirs := make([]string, len(mounts))
	for i, m := range mounts {
		dirs[i] = m.Mountpoint
	}
	return dirs, nil
}

// CleanDir gives dir the form that the mount table has. The last element is
// not looked at, it may be a mount which nobody serves.
func CleanDir(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	return filepath.Join(parent, filepath.Base(abs)), nil
}

// SetReadahead sets how far the kernel reads ahead on a mount, by the name of
// its backing device info under /sys/class/bdi ("0:57", "erofs-3").
func SetReadahead(bdi string, bytes int) error {
	return os.WriteFile(filepath.Join("/sys/class/bdi", bdi, "read_ahead_kb"), fmt.Appendf(nil, "%d", bytes>>10), 0)
}
