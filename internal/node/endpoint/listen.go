// Package endpoint is where daemons of this machine answer: unix sockets that only
// their user can open, and HTTP on a listener until the daemon ends. What is asked
// there is for others to say: packages mount/control and disks/control, snapshot
// and cri.
package endpoint

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
)

// Listen listens on a unix socket that only this user can open. A socket that
// a dead daemon left is replaced; one on which somebody answers is an error.
func Listen(socket string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o711); err != nil {
		return nil, err
	}
	if conn, err := net.Dial("unix", socket); err == nil {
		conn.Close()
		return nil, fmt.Errorf("%s: another process answers there", socket)
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		// Files that aren't sockets refuse connections too.
		if fi, err := os.Lstat(socket); err == nil && fi.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("%s exists and isn't a socket: remove it, or use another name", socket)
		}
		if err := os.Remove(socket); err != nil {
			return nil, err
		}
	}
	// The name appears with its final mode: bound under a name that nobody
	// knows in a directory that nobody can enter, then moved.
	private, err := os.MkdirTemp(filepath.Dir(socket), ".listen-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(private)
	bound := filepath.Join(private, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: bound, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // a successor may have taken the name by then
	if err = os.Chmod(bound, 0o600); err == nil {
		err = os.Rename(bound, socket)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
