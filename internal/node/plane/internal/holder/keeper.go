package holder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Keeper is the daemon's end of the holder: it starts one, gives it what is to
// be held, and replaces it when it dies while the daemon lives.
type Keeper struct {
	dir     string
	command []string
	log     *slog.Logger

	mu      sync.Mutex // of what follows
	conn    *net.UnixConn
	beats   bool      // the holder wants to hear that this process is at work
	beating bool      // and it does, see Beat
	child   *exec.Cmd // if this process started the holder and has not reaped it
	closing bool

	stop chan struct{} // closed by Leave
	done sync.WaitGroup
}

// NewKeeper returns the keeper of the holder in dir, a directory of mode 0700.
// command is the program and first arguments of a holder, to which the name of
// its socket is appended.
func NewKeeper(dir string, command []string, log *slog.Logger) *Keeper {
	return &Keeper{dir: dir, command: command, log: log, stop: make(chan struct{})}
}

const (
	// holderStart bounds the wait for a new holder's socket.
	holderStart = 10 * time.Second
	// holderAnswer bounds the wait for one answer of the holder.
	holderAnswer = 5 * time.Second
)

func socketPath(dir string) string { return filepath.Join(dir, "holder.sock") }

// getTries bounds how often Get asks a holder that hangs up: it's ending, and
// its socket goes, or has too many clients, of which the idle ones go.
const getTries = 100

// Get asks a living holder for what it has. No holder, or an empty one: nil and
// no error.
func (k *Keeper) Get() (*Held, error) {
	for try := 1; ; try++ {
		h, err := k.get()
		if err == nil || !gone(err) {
			return h, err
		}
		if try == getTries {
			return nil, fmt.Errorf("the holder hangs up: %w", err)
		}
		time.Sleep(2 * idleClient / getTries)
	}
}

func (k *Keeper) get() (*Held, error) {
	c, err := dialShort(socketPath(k.dir))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("connect to the holder: %w", err)
	}
	m, fd, err := k.ask(c, message{Op: opGet}, -1)
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("get what the holder keeps: %w", err)
	}
	k.keep(c, m.Beats)
	if fd < 0 || m.Session == nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, nil
	}
	return &Held{FD: fd, Session: m.Session}, nil
}

// Put gives h to the holder in place of what it has, starting one if none runs.
// From its return on h survives this process.
func (k *Keeper) Put(ctx context.Context, h Held) error {
	k.mu.Lock()
	conn := k.conn
	k.mu.Unlock()
	if conn != nil {
		if err := k.put(conn, h); err == nil || !gone(err) {
			return err
		}
		// It was ending when it answered Get: what it had was of no use.
		held, err := k.Get()
		if err != nil {
			return err
		}
		if held != nil {
			unix.Close(held.FD)
		}
		k.mu.Lock()
		conn = k.conn
		k.mu.Unlock()
	}
	if conn == nil {
		var err error
		if conn, err = k.launch(ctx); err != nil {
			return err
		}
	}
	return k.put(conn, h)
}

// put gives h to the holder of a connection, which is the keeper's from then on,
// or closed.
func (k *Keeper) put(conn *net.UnixConn, h Held) error {
	answer, _, err := k.ask(conn, message{Op: opPut, Session: h.Session}, h.FD)
	if err != nil {
		conn.Close()
		k.mu.Lock()
		k.conn = nil
		k.mu.Unlock()
		return fmt.Errorf("give the holder what it is to keep: %w", err)
	}
	k.keep(conn, answer.Beats)
	return nil
}

// keep takes a connection over. It's closed at once when Leave has been called
// while the holder was being replaced: Leave waits for Watch, which would wait
// for the end of a connection that nobody else ends.
func (k *Keeper) keep(conn *net.UnixConn, beats bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.conn, k.beats = conn, beats
	if k.closing {
		conn.Close()
	}
}

// Beat tells the holder, now and at such intervals until Leave, that this process
// is at work. If that stays away for the orphan grace, because the process is
// stopped or stuck, the holder answers orphans as if there were none.
func (k *Keeper) Beat(every time.Duration) {
	k.mu.Lock()
	k.beating = true
	k.mu.Unlock()
	k.beat() // from here on the holder knows what silence means
	k.done.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-k.stop:
				return
			case <-tick.C:
				k.beat()
			}
		}
	})
}

// beat tells the holder once, if it's one to be told.
func (k *Keeper) beat() {
	k.mu.Lock()
	conn, told := k.conn, k.beating && k.beats
	k.mu.Unlock()
	if conn != nil && told {
		_ = send(conn, message{Op: opAlive}, -1) // Watch sees if it's gone
	}
}

// ask sends a request and waits for its answer.
func (k *Keeper) ask(c *net.UnixConn, m message, fd int) (message, int, error) {
	if err := trustPeer(c); err != nil {
		return message{}, -1, err
	}
	c.SetDeadline(time.Now().Add(holderAnswer))
	defer c.SetDeadline(time.Time{})
	if err := send(c, m, fd); err != nil {
		return message{}, -1, err
	}
	answer, got, err := receive(c)
	if err == nil && answer.Op != m.Op {
		err = fmt.Errorf("the holder answered %q to %q", answer.Op, m.Op)
		if got >= 0 {
			unix.Close(got)
		}
	}
	return answer, got, err
}

// launch starts the holder's program, in a session of its own and with nothing
// of the daemon but its log file, and waits for its socket.
func (k *Keeper) launch(ctx context.Context) (*net.UnixConn, error) {
	if len(k.command) == 0 {
		return nil, errors.New("no holder runs and Options.HolderCommand is empty")
	}
	logName := filepath.Join(k.dir, "holder.log")
	logFile, err := os.OpenFile(logName, os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the holder's log: %w", err)
	}
	defer logFile.Close()
	program, err := exec.LookPath(k.command[0])
	if err == nil {
		program, err = filepath.Abs(program) // it starts in another directory
	}
	if err != nil {
		return nil, fmt.Errorf("find the holder's program: %w", err)
	}
	argv := append(append([]string{}, k.command[1:]...), socketPath(k.dir))
	cmd := exec.Command(program, argv...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the holder: %w", err)
	}
	k.log.Info("started the holder", "pid", cmd.Process.Pid, "log", logName)
	conn, err := k.await(ctx, cmd.Process.Pid)
	var cred *unix.Ucred
	if err == nil {
		cred, err = peer(conn)
	}
	if err != nil || int(cred.Pid) != cmd.Process.Pid {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("the holder %v did not come up, see %s: %w", cmd.Args, logName, err)
	case int(cred.Pid) != cmd.Process.Pid:
		k.log.Info("another holder was faster: the last daemon had just begun to start it", "pid", cred.Pid)
		return conn, nil
	}
	k.mu.Lock()
	k.child = cmd
	k.mu.Unlock()
	return conn, nil
}

// await connects to the socket of the holder that was started as process pid.
func (k *Keeper) await(ctx context.Context, pid int) (*net.UnixConn, error) {
	ctx, cancel := context.WithTimeout(ctx, holderStart)
	defer cancel()
	wait := time.Millisecond
	for {
		conn, err := dialShort(socketPath(k.dir))
		if err == nil {
			return conn, nil
		}
		if exited(pid) {
			return nil, errors.New("it has exited")
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (last: %w)", ctx.Err(), err)
		case <-time.After(wait):
			wait = min(2*wait, 50*time.Millisecond)
		}
	}
}

// exited reports whether the child pid is a zombie, and leaves it one.
func exited(pid int) bool {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return err == nil && info.Signo == int32(unix.SIGCHLD)
}

// Watch replaces the holder whenever it ends, until Leave. h.FD must stay open
// until then.
func (k *Keeper) Watch(h Held) {
	k.done.Go(func() {
		for k.lasts() {
			k.log.Error("the holder has died; starting another: until it runs, the death of this daemon would cost all images their content")
			for wait := time.Second; !k.replace(h); wait = min(2*wait, 30*time.Second) {
				select {
				case <-k.stop:
					return
				case <-time.After(wait):
				}
			}
		}
	})
}

// lasts waits for the connection to the holder to end. False: it was Leave
// that ended it.
func (k *Keeper) lasts() bool {
	k.mu.Lock()
	conn := k.conn
	k.mu.Unlock()
	var one [1]byte
	_, _ = conn.Read(one[:]) // the holder never speaks first
	k.reap()
	k.mu.Lock()
	defer k.mu.Unlock()
	conn.Close()
	k.conn = nil
	return !k.closing
}

func (k *Keeper) replace(h Held) bool {
	ctx, cancel := context.WithTimeout(context.Background(), holderStart)
	defer cancel()
	if err := k.Put(ctx, h); err != nil {
		k.log.Error("cannot replace the holder", "error", err)
		return false
	}
	k.beat()
	k.log.Info("a new holder keeps what the last one did")
	return true
}

// reap ends the zombie of a holder which has closed its socket, if it is this
// process's child. It is ending, so the wait is short; a stuck one is killed.
func (k *Keeper) reap() {
	k.mu.Lock()
	child := k.child
	if k.closing { // it lives on, or Quit takes care
		child = nil
	} else {
		k.child = nil
	}
	k.mu.Unlock()
	if child != nil {
		kill := time.AfterFunc(holderAnswer, func() { _ = child.Process.Kill() })
		_ = child.Wait()
		kill.Stop()
	}
}

// Leave ends the daemon's part. The holder lives on.
func (k *Keeper) Leave() {
	k.mu.Lock()
	if !k.closing {
		k.closing = true
		close(k.stop)
	}
	if k.conn != nil {
		k.conn.Close()
	}
	k.mu.Unlock()
	k.done.Wait()
}

// Quit, after Leave, makes the holder end and waits for its socket to close.
func (k *Keeper) Quit() error {
	c, err := dialShort(socketPath(k.dir))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("connect to the holder: %w", err)
	}
	defer c.Close()
	// It may be ending already, because the mount is gone.
	if _, _, err := k.ask(c, message{Op: opQuit}, -1); err != nil && !gone(err) {
		return fmt.Errorf("tell the holder to quit: %w", err)
	}
	c.SetDeadline(time.Now().Add(holderAnswer))
	var one [1]byte
	_, _ = c.Read(one[:])
	k.mu.Lock()
	k.closing = false
	k.mu.Unlock()
	k.reap()
	return nil
}

// gone reports whether err says that the other end has ended.
func gone(err error) bool {
	return errors.Is(err, errClosed) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}
