// Package holder keeps a descriptor alive while the daemon that uses it is
// killed, stopped or updated.
//
// What connects a plane's mounts with its daemon is one descriptor: of /dev/fuse,
// of a fanotify group. It lasts as long as some process has it. A small process
// of its own, the holder (Run), has it besides the daemon; the daemon's end is a
// Keeper, which starts the holder, gives it the descriptor, gets it back after a
// restart, and replaces a holder that dies. They talk over a unix socket:
//
//	DIR/holder.sock       the socket
//	DIR/holder.sock.lock  one holder at a time
//	DIR/holder.log        what it has to say
//
// What the descriptor is, and what to do for readers when no daemon comes, is
// the plane's: its Kind.
package holder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// idleClient is how long a client that has no descriptor may be silent.
	idleClient = 5 * time.Second
	// impatience is how long readers of what needs no content wait.
	impatience = 5 * time.Second
	// emptyHolder is how long a holder without a descriptor stays.
	emptyHolder = 30 * time.Second
	// holderTick is how often a holder looks after its connection. Waiting
	// for it with poll(2) would wake the holder at every request.
	holderTick = time.Second
)

// Held is a descriptor and what a successor has to know to go on with it.
type Held struct {
	FD int
	// Session is a JSON object. Its member "orphan_grace", in nanoseconds, is
	// how long readers wait for a daemon; 0 is for ever.
	Session json.RawMessage
}

// Kind is what a holder does with what it keeps. Its methods are called one at
// a time, never while the descriptor is being given to a daemon.
type Kind interface {
	// Over reports whether the descriptor is of no use any more: the holder
	// ends then.
	Over(h Held) bool
	// AnswerBystanders lets those go that wait, without a daemon, for something
	// that is no content of an image: people who look around. What readers of
	// images asked for stays for the next daemon. It is called every second
	// when no daemon was connected for five.
	AnswerBystanders(h Held) error
	// AnswerOrphans lets the readers that wait fail. It is called every second
	// when no daemon was connected, or the one that is gave no sign of life,
	// for the orphan grace; first is the first time since.
	AnswerOrphans(h Held, first bool) error
}

// Run keeps a descriptor. It listens on the unix socket named socket, in a
// directory of mode 0700, and gives the descriptor to whoever connects as root
// or as the same user.
//
// It is the whole work of a process of its own, and changes that process:
// signals that end a service are ignored, memory and processors are limited. A
// service manager must not kill it along with the daemon (systemd:
// KillMode=process). No content passes through it.
//
// It returns nil when it was told to quit, when kind says that it is over, or
// when it got no descriptor for 30 s.
func Run(ctx context.Context, socket string, kind Kind) error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(20)
	debug.SetMemoryLimit(16 << 20)
	// Killing the holder costs all running containers their files. Needs
	// CAP_SYS_RESOURCE; without it the holder still is the smallest process.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil {
		slog.Info("holder is not protected from the out-of-memory killer", "error", err)
	}
	h := &holder{kind: kind, held: Held{FD: -1}, quit: make(chan struct{}), since: time.Now(), conns: map[*net.UnixConn]*client{}}
	return h.run(ctx, socket)
}

// holder is the state of Run.
type holder struct {
	kind Kind

	mu      sync.Mutex    // of what follows
	held    Held          // FD is -1: none yet
	grace   time.Duration // of the session
	conns   map[*net.UnixConn]*client
	since   time.Time // when the last daemon, or the holder itself, came or went
	orphans bool      // orphans are being answered
	ended   bool

	quit chan struct{} // closed when told to quit
	once sync.Once     // closes quit
}

// client is who is connected.
type client struct {
	daemon bool      // it has the descriptor
	heard  time.Time // the last opAlive; zero: it never sent one
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
	lock, err := Lock(socket + ".lock")
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
	if h.held.FD < 0 {
		return len(h.conns) == 0 && time.Since(h.since) > emptyHolder
	}
	if h.kind.Over(h.held) {
		return true
	}
	daemons, silence := h.silence()
	var err error
	switch {
	case h.grace > 0 && silence > h.grace:
		if !h.orphans {
			slog.Error("no daemon has been at work for too long: reads of content that is not on this machine fail from now on", "connected", daemons)
		}
		err = h.kind.AnswerOrphans(h.held, !h.orphans)
		h.orphans = true
	case daemons == 0 && silence > impatience:
		err = h.kind.AnswerBystanders(h.held)
	}
	if err != nil {
		slog.Error("holder cannot answer what the kernel asks", "error", err)
	}
	return false
}

// silence returns how many daemons are connected, and for how long none has
// been at work. A connected one that never sent opAlive is taken to be.
func (h *holder) silence() (daemons int, silence time.Duration) {
	last := h.since
	for _, c := range h.conns {
		switch {
		case !c.daemon:
			continue
		case c.heard.IsZero():
			last = time.Now()
		case c.heard.After(last):
			last = c.heard
		}
		daemons++
	}
	return daemons, time.Since(last)
}

// end drops everything; connections that come in later are closed at once.
func (h *holder) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = true
	for c := range h.conns {
		c.Close()
	}
	if h.held.FD >= 0 {
		unix.Close(h.held.FD)
		h.held.FD = -1
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
			h.conns[c] = &client{}
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
	if h.conns[c].daemon {
		h.since = time.Now()
	}
	delete(h.conns, c)
}

// serve answers one connection's messages until it closes.
func (h *holder) serve(c *net.UnixConn) error {
	if err := trustPeer(c); err != nil {
		return err
	}
	if err := c.SetReadDeadline(time.Now().Add(idleClient)); err != nil {
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
		var s struct {
			OrphanGrace time.Duration `json:"orphan_grace"`
		}
		if err := json.Unmarshal(m.Session, &s); fd < 0 || err != nil {
			if fd >= 0 {
				unix.Close(fd)
			}
			return fmt.Errorf("put without a descriptor or a session: %w", err)
		}
		if h.held.FD >= 0 {
			unix.Close(h.held.FD) // what could not be resumed
		}
		h.held, h.grace = Held{fd, m.Session}, s.OrphanGrace
		return h.welcome(c, message{Op: opPut, Beats: true}, -1)
	case opGet:
		if h.held.FD < 0 {
			return send(c, message{Op: opGet, Beats: true}, -1)
		}
		return h.welcome(c, message{Op: opGet, Session: h.held.Session, Beats: true}, h.held.FD)
	case opAlive:
		if h.orphans && h.conns[c].daemon {
			slog.Info("the daemon is at work again")
			h.orphans = false
		}
		h.conns[c].heard = time.Now()
		return nil
	case opQuit:
		err := send(c, message{Op: opQuit}, -1)
		h.once.Do(func() { close(h.quit) })
		return err
	default:
		return fmt.Errorf("unknown request %q", m.Op)
	}
}

// welcome makes a daemon of a client that has the descriptor from now on. The
// caller has h.mu.
func (h *holder) welcome(c *net.UnixConn, answer message, fd int) error {
	h.conns[c].daemon, h.orphans, h.since = true, false, time.Now()
	if err := c.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	return send(c, answer, fd)
}
