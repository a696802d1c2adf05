package fuse

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// emptyHolder is how long a holder without a descriptor stays.
	emptyHolder = 30 * time.Second
	// holderTick is how often a holder looks after its connection. Waiting
	// for it with poll(2) would wake the holder at every request.
	holderTick = time.Second
)

// RunHolder keeps a descriptor of /dev/fuse, so that the mount and what the
// kernel has asked survive the daemon. It listens on the unix socket named
// socket, in a directory of mode 0700, and gives the descriptor to whoever
// connects as root or as the same user.
//
// It is the whole work of a process of its own (Options.HolderCommand), and
// changes that process: signals that end a service are ignored, memory and
// processors are limited. A service manager must not kill it along with the
// daemon (systemd: KillMode=process). No content passes through it.
//
// It returns nil when it was told to quit, when the FUSE mount is gone, or when
// it got no descriptor for 30 s.
//
// When no daemon was connected for the session's OrphanGrace it answers what
// the kernel asks with EIO, until one connects: a read must not wait for ever.
func RunHolder(ctx context.Context, socket string) error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(20)
	debug.SetMemoryLimit(16 << 20)
	// Killing the holder costs all running containers their files. Needs
	// CAP_SYS_RESOURCE; without it the holder still is the smallest process.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil {
		slog.Info("holder is not protected from the out-of-memory killer", "error", err)
	}
	h := &holder{fd: -1, quit: make(chan struct{}), since: time.Now(), conns: map[*net.UnixConn]bool{}}
	return h.run(ctx, socket)
}

// holder is the state of RunHolder.
type holder struct {
	mu      sync.Mutex // of what follows
	fd      int        // -1: none yet
	session session
	conns   map[*net.UnixConn]bool // open; true: a daemon that has the descriptor
	since   time.Time              // when the last daemon, or the holder itself, came or went
	orphans bool                   // orphans are being answered
	ended   bool

	quit chan struct{} // closed when told to quit
	once sync.Once     // closes quit
}

func (h *holder) run(ctx context.Context, socket string) error {
	l, unlock, err := listen(socket)
	if err != nil {
		return fmt.Errorf("holder: %w", err)
	}
	defer unlock()
	var serving sync.WaitGroup
	serving.Go(func() { h.accept(l, &serving) })
	tick := time.NewTicker(holderTick)
	defer tick.Stop()
	for done := false; !done; {
		select {
		case <-ctx.Done():
			done = true
		case <-h.quit:
			done = true
		case <-tick.C:
			done = h.over()
		}
	}
	l.Close()
	h.end()
	serving.Wait()
	return nil
}

// listen makes the socket, replacing what a dead holder left. The lock lives as
// long as the process and makes sure that it is dead.
func listen(socket string) (*net.UnixListener, func(), error) {
	lock, err := lockFile(socket + ".lock")
	if err != nil {
		return nil, nil, err
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		lock.Close()
		return nil, nil, err
	}
	l, err := listenShort(socket)
	if err != nil {
		lock.Close()
		return nil, nil, err
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		l.Close()
		lock.Close()
		return nil, nil, err
	}
	// Whoever removed and remade the directory may have a holder of its own
	// there by now, whose socket has the same name.
	ours, err := os.Lstat(socket)
	if err != nil {
		l.Close()
		lock.Close()
		return nil, nil, err
	}
	return l, func() {
		if now, err := os.Lstat(socket); err == nil && os.SameFile(ours, now) {
			os.Remove(socket)
		}
		lock.Close()
	}, nil
}

// over reports whether there is nothing to hold any more, and answers what has
// waited too long.
func (h *holder) over() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fd < 0 {
		return len(h.conns) == 0 && time.Since(h.since) > emptyHolder
	}
	if aborted(h.fd) {
		return true
	}
	if h.daemons() == 0 && h.session.OrphanGrace > 0 && time.Since(h.since) > h.session.OrphanGrace {
		if err := answerOrphans(h.fd, !h.orphans); err != nil {
			slog.Error("holder cannot answer what the kernel asks", "error", err)
		}
		h.orphans = true
	}
	return false
}

func (h *holder) daemons() int {
	n := 0
	for _, daemon := range h.conns {
		if daemon {
			n++
		}
	}
	return n
}

// end drops everything; connections that come in later are closed at once.
func (h *holder) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = true
	for c := range h.conns {
		c.Close()
	}
	if h.fd >= 0 {
		unix.Close(h.fd)
		h.fd = -1
	}
}

func (h *holder) accept(l *net.UnixListener, serving *sync.WaitGroup) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			slog.Error("holder accepts no connection", "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		h.mu.Lock()
		ok := !h.ended && len(h.conns) < 16
		if ok {
			h.conns[c] = false
		}
		h.mu.Unlock()
		if !ok {
			c.Close()
			continue
		}
		serving.Go(func() {
			if err := h.serve(c); err != nil {
				slog.Warn("holder dropped a connection", "error", err)
			}
			h.forget(c)
		})
	}
}

func (h *holder) forget(c *net.UnixConn) {
	c.Close()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.conns[c] {
		h.since = time.Now()
	}
	delete(h.conns, c)
}

// serve answers one connection's messages until it closes.
func (h *holder) serve(c *net.UnixConn) error {
	if err := trustPeer(c); err != nil {
		return err
	}
	for {
		m, fd, err := receive(c)
		if err != nil {
			if gone(err) {
				return nil
			}
			return err
		}
		if err := h.handle(c, m, fd); err != nil {
			return err
		}
	}
}

// handle answers one message. It takes fd over.
func (h *holder) handle(c *net.UnixConn, m message, fd int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if fd >= 0 && m.Op != opPut {
		unix.Close(fd)
	}
	switch m.Op {
	case opPut:
		if fd < 0 || m.Session == nil {
			return errors.New("put without a descriptor or a session")
		}
		if h.fd >= 0 {
			unix.Close(h.fd) // a connection that could not be resumed
		}
		h.fd, h.session, h.orphans, h.since = fd, *m.Session, false, time.Now()
		h.conns[c] = true
		return send(c, message{Op: opPut}, -1)
	case opGet:
		if h.fd < 0 {
			return send(c, message{Op: opGet}, -1)
		}
		h.conns[c], h.orphans, h.since = true, false, time.Now()
		s := h.session
		return send(c, message{Op: opGet, Session: &s}, h.fd)
	case opQuit:
		err := send(c, message{Op: opQuit}, -1)
		h.once.Do(func() { close(h.quit) })
		return err
	default:
		return fmt.Errorf("unknown request %q", m.Op)
	}
}

// answerOrphans gives EIO to all requests that wait; first also to those which
// the last daemon took and did not answer.
func answerOrphans(fd int, first bool) error {
	s := &server{fd: fd, log: slog.Default()}
	if first {
		slog.Error("no daemon has come for too long: reads of content that is not on this machine fail from now on")
		if err := s.resend(); err != nil {
			return err
		}
	}
	w := &worker{}
	for {
		n, err := unix.Read(fd, w.in[:])
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENODEV):
			return nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOENT):
			continue
		case err != nil:
			return err
		}
		req, ok := parseRequest(w.in[:n])
		if !ok || req.op == opForget || req.op == opBatchForget {
			continue
		}
		s.fail(w, req, unix.EIO)
	}
}

// lockWait is how long a process that was killed may take to end: the kernel
// closes its descriptors one by one.
const lockWait = 2 * time.Second

// lockFile takes an exclusive lock, which ends with the file's close or the
// process.
func lockFile(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(lockWait); ; time.Sleep(time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("%s is locked by another process: %w", filepath.Base(name), err)
		}
	}
}
