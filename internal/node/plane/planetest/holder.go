package planetest

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// HolderPID returns the process that listens on the holder's socket in a plane's
// directory.
func HolderPID(dir string) (int, error) {
	at, err := os.Open(dir) // a socket's name must be short
	if err != nil {
		return 0, err
	}
	defer at.Close()
	name := fmt.Sprintf("/proc/self/fd/%d/holder.sock", at.Fd())
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: name, Net: "unixpacket"})
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
