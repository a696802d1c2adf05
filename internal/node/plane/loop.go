package plane

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Loop devices are how EROFS reads files on kernels that can't mount it from
// files. Each is bound to one file, which it reads by direct I/O: no second
// copy in the page cache, and several requests at once.
//
// Nobody has to remember or detach them. A loop device that is bound with
// LO_FLAGS_AUTOCLEAR lets go of its file when the last user closes it: the
// mount that has it, or the process that made it and died before it mounted.

// MountEROFSLoop is MountEROFS with a loop device for each file. The files
// must be whole blocks.
func MountEROFSLoop(metadata string, devices []string, dir string) error {
	mnt, err := openEROFSLoop(metadata, devices)
	if err != nil {
		return fmt.Errorf("mount %s on %s by loop devices: %w", metadata, dir, err)
	}
	defer unix.Close(mnt)
	return place(mnt, metadata, dir)
}

// openEROFSLoop is openEROFS with a loop device for each file.
func openEROFSLoop(metadata string, devices []string) (int, error) {
	ctl, err := openLoopControl()
	if err != nil {
		return -1, err
	}
	defer ctl.Close()
	paths := make([]string, 0, 1+len(devices))
	for _, file := range append([]string{metadata}, devices...) {
		loop, err := bindLoop(ctl, file)
		if err != nil {
			return -1, fmt.Errorf("loop device for %s: %w", file, err)
		}
		defer loop.Close() // from then on it's the mount's alone
		paths = append(paths, loop.Name())
	}
	return openEROFS(paths[0], paths[1:], nil)
}

const (
	loopControl      = "/dev/loop-control"
	loopControlMajor = 10 // of character devices, Documentation/admin-guide/devices.txt
	loopControlMinor = 237
	loopMajor        = 7 // of block devices
)

// openLoopControl opens the device that gives out loop devices. Opening it
// makes the kernel load their module.
func openLoopControl() (*os.File, error) {
	if err := makeNode(loopControl, unix.S_IFCHR, loopControlMajor, loopControlMinor); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(loopControl, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("no loop devices (CONFIG_BLK_DEV_LOOP): %w", err)
	}
	return f, nil
}

// makeNode makes a device node where nobody else does: in a container's /dev
// only those are that were there at its start.
func makeNode(name string, kind uint32, major, minor uint32) error {
	var st unix.Stat_t
	err := unix.Stat(name, &st)
	if errors.Is(err, unix.ENOENT) {
		if err = unix.Mknod(name, kind|0o600, int(unix.Mkdev(major, minor))); errors.Is(err, unix.EEXIST) {
			err = nil // udev was faster
		}
		if err == nil {
			err = unix.Stat(name, &st)
		}
	}
	if err != nil {
		return fmt.Errorf("device node %s: %w", name, err)
	}
	if st.Mode&unix.S_IFMT != kind || st.Rdev != unix.Mkdev(major, minor) {
		return fmt.Errorf("%s isn't the device %d:%d", name, major, minor)
	}
	return nil
}

// loopTries bounds how often a free loop device may be taken by others before
// it is ours.
const loopTries = 64

// bindLoop makes a loop device of the file. It lets go of it when the returned
// file, and whoever else opens it, is closed.
func bindLoop(ctl *os.File, file string) (*os.File, error) {
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for range loopTries {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("no loop device is free: %w", err)
		}
		loop, err := bindLoopNumber(n, fd)
		if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENXIO) {
			continue // somebody else has it, or removed it
		}
		return loop, err
	}
	return nil, fmt.Errorf("others took %d free loop devices, one after the other", loopTries)
}

// bindLoopNumber binds the loop device n to the open file fd.
func bindLoopNumber(n, fd int) (_ *os.File, err error) {
	name := fmt.Sprintf("/dev/loop%d", n)
	if err := makeNode(name, unix.S_IFBLK, loopMajor, uint32(n)); err != nil {
		return nil, err
	}
	loop, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			loop.Close()
		}
	}()
	config := unix.LoopConfig{Fd: uint32(fd), Size: BlockSize}
	config.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	if err := unix.IoctlLoopConfigure(int(loop.Fd()), &config); err != nil {
		return nil, fmt.Errorf("configure %s: %w", name, err)
	}
	info, err := unix.IoctlLoopGetStatus64(int(loop.Fd()))
	if err != nil {
		return nil, fmt.Errorf("status of %s: %w", name, err)
	}
	return loop, checkLoop(info, fd)
}

// checkLoop makes sure that a loop device reads the content of a plane by
// direct I/O. Otherwise a read that came short would be filled with zeros (the
// kernel's lo_read_simple), and reads would wait for each other. With a local
// file, on a disk whose blocks are larger, neither matters.
func checkLoop(info *unix.LoopInfo64, fd int) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return fmt.Errorf("file system of the loop device's file: %w", err)
	}
	if fs.Type == unix.FUSE_SUPER_MAGIC && info.Flags&unix.LO_FLAGS_DIRECT_IO == 0 {
		return errors.New("the kernel refuses direct I/O on a FUSE file")
	}
	return nil
}
