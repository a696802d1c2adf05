package fuse

import (
	"errors"

	"golang.org/x/sys/unix"
)

// HolderPID returns the process that listens on dir's holder socket.
func HolderPID(dir string) (int, error) {
	c, err := dialShort(socketPath(dir))
	if err != nil {
		return 0, err
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	err = raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, cerr); err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}
