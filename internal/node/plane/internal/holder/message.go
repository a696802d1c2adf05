package holder

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The daemon and the holder talk over a unix socket of type SOCK_SEQPACKET: one
// JSON message per packet, at most one descriptor with it. Every request is
// answered by a message of the same Op. A daemon keeps its connection open for
// as long as it serves: that is how each learns that the other is gone.
type message struct {
	Op      string          `json:"op"`
	Session json.RawMessage `json:"session,omitempty"`
	// Beats, in answers: this holder knows opAlive. Former ones don't.
	Beats bool `json:"beats,omitempty"`
}

const (
	opPut  = "put"  // take this descriptor and session, instead of what you have
	opGet  = "get"  // give me yours; the answer has none if there is none
	opQuit = "quit" // drop it and end

	opAlive = "alive" // I'm at work; the only message without an answer

	maxMessage = 16 << 10
)

var errClosed = errors.New("the other end closed the connection")

// send sends m, with the descriptor fd unless that is negative.
func send(c *net.UnixConn, m message, fd int) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	_, _, err = c.WriteMsgUnix(data, oob, nil)
	return err
}

// receive receives one message. fd is -1 if none came with it, otherwise the
// caller's to close; it is close-on-exec.
func receive(c *net.UnixConn) (m message, fd int, err error) {
	data := make([]byte, maxMessage)
	oob := make([]byte, unix.CmsgSpace(4*8))
	n, oobn, flags, _, err := c.ReadMsgUnix(data, oob)
	if errors.Is(err, io.EOF) {
		return m, -1, errClosed
	}
	if err != nil {
		return m, -1, err
	}
	fd, err = descriptor(oob[:oobn])
	if err != nil {
		return m, -1, err
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = fmt.Errorf("a message is longer than %d bytes or has too many descriptors", maxMessage)
	} else {
		err = json.Unmarshal(data[:n], &m)
	}
	if err != nil && fd >= 0 {
		unix.Close(fd)
		fd = -1
	}
	return m, fd, err
}

// descriptor takes the one descriptor out of control messages, -1 if none.
func descriptor(oob []byte) (int, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return -1, err
	}
	var fds []int
	for _, m := range msgs {
		more, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // not descriptors
		}
		fds = append(fds, more...)
	}
	switch len(fds) {
	case 0:
		return -1, nil
	case 1:
		return fds[0], nil
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	return -1, fmt.Errorf("%d descriptors in one message", len(fds))
}

// peer returns who the other end is: of a connection to a holder the process
// that listens (unix(7), SO_PEERCRED).
func peer(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	if cerr != nil {
		return nil, fmt.Errorf("credentials of the other end: %w", cerr)
	}
	return cred, nil
}

// trustPeer checks that the other end is root or this user.
func trustPeer(c *net.UnixConn) error {
	cred, err := peer(c)
	if err != nil {
		return err
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Getuid() {
		return fmt.Errorf("the other end is user %d (process %d), neither root nor this user", cred.Uid, cred.Pid)
	}
	return nil
}

// A socket's name has at most 107 bytes. A longer one is reached through a
// descriptor of its directory.
func shortSocket(socket string) (name string, done func(), err error) {
	if len(socket) < 108 {
		return socket, func() {}, nil
	}
	fd, err := unix.Open(filepath.Dir(socket), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, &os.PathError{Op: "open", Path: filepath.Dir(socket), Err: err}
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", fd, filepath.Base(socket)), func() { unix.Close(fd) }, nil
}

func listenShort(socket string) (*net.UnixListener, error) {
	name, done, err := shortSocket(socket)
	if err != nil {
		return nil, err
	}
	defer done()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: name, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // by that name it would not be found
	return l, nil
}

func dialShort(socket string) (*net.UnixConn, error) {
	name, done, err := shortSocket(socket)
	if err != nil {
		return nil, err
	}
	defer done()
	return net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: name, Net: "unixpacket"})
}
