package fuse

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/internal/holder"
)

// connection is a FUSE mount and its descriptor of /dev/fuse.
type connection struct {
	fd      int
	session session
}

// session is what a successor has to know of a connection. The holder keeps it
// along with the descriptor.
type session struct {
	Version    int        `json:"version"`
	Epoch      string     `json:"epoch"`
	Mountpoint string     `json:"mountpoint"`
	Device     string     `json:"device"` // "major:minor" of the mount
	Init       negotiated `json:"init"`
	// OrphanGrace: how long the holder lets reads wait for a daemon.
	OrphanGrace time.Duration `json:"orphan_grace"`
}

const sessionVersion = 1

// connectionOf returns what a holder kept; verify refuses it if it isn't one.
func connectionOf(h holder.Held) *connection {
	c := &connection{fd: h.FD}
	_ = json.Unmarshal(h.Session, &c.session) // verify sees that there's none
	return c
}

// held is what the holder is to keep.
func (c *connection) held() holder.Held {
	data, err := json.Marshal(c.session)
	if err != nil {
		panic(err) // numbers and strings
	}
	return holder.Held{FD: c.fd, Session: data}
}

// fuseType is the file system type in the mount table.
const fuseType = "fuse.sluice"

// connect mounts a new FUSE file system on dir and settles INIT.
func connect(dir, epoch string, background int, want uint64) (_ *connection, err error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &plane.UnsupportedError{Reasons: []string{fmt.Sprintf("open /dev/fuse: %v", err)}}
	}
	if err := mountFUSE(fd, dir); err != nil {
		unix.Close(fd)
		return nil, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd) // first: nobody would answer the unmount
			_ = plane.Unmount(dir, true)
		}
	}()
	init, err := handshake(fd, background, want)
	if err != nil {
		return nil, err
	}
	m, err := plane.MountAt(dir)
	if err != nil {
		return nil, err
	}
	if m == nil {
		return nil, fmt.Errorf("mount FUSE on %s: it is not in the mount table", dir)
	}
	return &connection{fd: fd, session: session{
		Version: sessionVersion, Epoch: epoch, Mountpoint: dir,
		Device: fmt.Sprintf("%d:%d", m.Major, m.Minor), Init: init,
	}}, nil
}

// mountFUSE mounts the file system of a descriptor of /dev/fuse on dir: a new
// one, or again the one that it has.
func mountFUSE(fd int, dir string) error {
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,max_read=%d", fd, maxRead)
	flags := uintptr(unix.MS_RDONLY | unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NOATIME)
	if err := unix.Mount("sluice", dir, fuseType, flags, options); err != nil {
		return fmt.Errorf("mount FUSE on %s: %w", dir, err)
	}
	return nil
}

// handshakeTimeout bounds the wait for INIT, which the kernel sends as soon as
// the file system is mounted.
const handshakeTimeout = 10 * time.Second

// handshake answers INIT, the first request of a connection.
func handshake(fd, background int, want uint64) (negotiated, error) {
	deadline := time.Now().Add(handshakeTimeout)
	var msg [requestSize]byte
	for {
		n, err := unix.Read(fd, msg[:])
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			left := time.Until(deadline)
			if left <= 0 {
				return negotiated{}, fmt.Errorf("the kernel sent no FUSE INIT within %v", handshakeTimeout)
			}
			if err := waitFor(fd, unix.POLLIN, left); err != nil {
				return negotiated{}, err
			}
			continue
		}
		if err != nil {
			return negotiated{}, fmt.Errorf("read FUSE INIT: %w", err)
		}
		req, ok := parseRequest(msg[:n])
		if !ok || req.op != opInit {
			return negotiated{}, fmt.Errorf("the kernel's first FUSE request is %d, not INIT", req.op)
		}
		return replyInit(fd, req, background, want)
	}
}

func replyInit(fd int, req request, background int, want uint64) (negotiated, error) {
	var reply [outHeaderSize + initOutSize]byte
	init, ok := answerInit(req.body, reply[outHeaderSize:], background, want)
	if !ok {
		return negotiated{}, &plane.UnsupportedError{Reasons: []string{fmt.Sprintf(
			"FUSE of this kernel (7.%d, flags %#x) lacks large or asynchronous reads (flags %#x)", init.Minor, init.Flags, needFlags)}}
	}
	putHeader(reply[:], len(reply), 0, req.unique)
	if _, err := unix.Write(fd, reply[:]); err != nil {
		return negotiated{}, fmt.Errorf("answer FUSE INIT: %w", err)
	}
	return init, nil
}

// waitFor waits until fd is ready for events, or has an error.
func waitFor(fd int, events int16, timeout time.Duration) error {
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	_, err := unix.Poll(fds, int(timeout.Milliseconds())+1)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("poll /dev/fuse: %w", err)
	}
	return nil
}

// pollName is a file of the FUSE mount that only calmPoller uses.
const pollName = ".poll"

// calmPoller makes the kernel learn, for the life of the connection, that files
// of the mount don't implement poll. Otherwise os.Open of one of them in this
// process deadlocks: the runtime adds the file to its epoll instance, that asks
// us (FUSE_POLL) with the instance locked, and we wait for /dev/fuse through the
// same instance.
func calmPoller(name string) error {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return waitFor(fd, unix.POLLIN, 0)
}

// aborted reports whether the connection of fd has ended: the file system was
// unmounted and is used no more, or somebody aborted it.
func aborted(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd)}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0 && fds[0].Revents&(unix.POLLERR|unix.POLLNVAL) != 0
}

// verify tells why the connection that a holder kept can't be gone on with.
func (c *connection) verify(dir, epoch string) error {
	s := c.session
	switch {
	case s.Version != sessionVersion:
		return fmt.Errorf("the holder has a session of version %d, this is %d", s.Version, sessionVersion)
	case s.Mountpoint != dir:
		return fmt.Errorf("the holder keeps the mount at %s", s.Mountpoint)
	case s.Epoch != epoch:
		return errors.New("the state on disk is of another FUSE mount than the holder's")
	case s.Init.Flags&needFlags != needFlags:
		return fmt.Errorf("the FUSE mount was made with flags %#x, too few to resume", s.Init.Flags)
	case aborted(c.fd):
		return errors.New("the FUSE mount's connection was aborted")
	}
	return c.show()
}

// show makes sure that the connection's file system is what is mounted at its
// mountpoint. If somebody unmounted it, images that use it keep it alive, and
// it is mounted again.
func (c *connection) show() error {
	dir := c.session.Mountpoint
	shown, err := c.shown()
	if err != nil || shown {
		return err
	}
	if err := plane.UnmountAll(dir); err != nil { // of somebody else
		return err
	}
	if err := mountFUSE(c.fd, dir); err != nil {
		return err
	}
	if shown, err = c.shown(); err == nil && !shown {
		err = errors.Join(fmt.Errorf("what is mounted at %s is another file system than before", dir), plane.Unmount(dir, true))
	}
	return err
}

// shown reports whether the connection's file system is mounted where it was.
func (c *connection) shown() (bool, error) {
	m, err := plane.MountAt(c.session.Mountpoint)
	if err != nil || m == nil {
		return false, err
	}
	return strings.HasPrefix(m.FSType, "fuse") && fmt.Sprintf("%d:%d", m.Major, m.Minor) == c.session.Device, nil
}

// resends reports whether the kernel gives out again what a process took and
// didn't answer.
func (c *connection) resends() bool { return c.session.Init.Flags&initHasResend != 0 }

// close drops this process's descriptor. If it was the last one, the
// connection ends.
func (c *connection) close() { unix.Close(c.fd) }

// reader returns a descriptor to read requests from and to answer them on,
// which waits in the runtime's poller. Where the kernel resends it is the one
// that the holder has, too. Elsewhere it's a clone: what was read through it is
// aborted when it's closed, which is better than never answered.
func (c *connection) reader() (int, *os.File, error) {
	var fd int
	var err error
	if c.resends() {
		fd, err = unix.FcntlInt(uintptr(c.fd), unix.F_DUPFD_CLOEXEC, 0)
	} else {
		fd, err = cloneDevice(c.fd)
	}
	if err != nil {
		return -1, nil, fmt.Errorf("another descriptor of the FUSE connection: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return -1, nil, fmt.Errorf("make /dev/fuse non-blocking: %w", err)
	}
	f := os.NewFile(uintptr(fd), "/dev/fuse")
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		f.Close()
		return -1, nil, fmt.Errorf("wait for /dev/fuse through the poller: %w", err)
	}
	return fd, f, nil
}

// cloneDevice opens another channel of a FUSE connection.
func cloneDevice(fd int) (int, error) {
	clone, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.IoctlSetPointerInt(clone, devIocClone, fd); err != nil {
		unix.Close(clone)
		return -1, err
	}
	return clone, nil
}
