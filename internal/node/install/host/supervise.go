package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Daemon is the node daemon of a machine without a service manager.
type Daemon struct {
	// Command starts it by way of Launch.
	Command []string
	// Log is the file that it writes to.
	Log string
	// Process returns the daemon that answers, 0 if none does.
	Process func(ctx context.Context) (int, error)
	// Wanted reports whether it may be started.
	Wanted func() (bool, error)
}

// maxLog bounds the log in bytes. What is older is in one more file, .1.
const maxLog = 16 << 20

// ErrNotWanted: the daemon is being uninstalled.
var ErrNotWanted = errors.New("sluice node is being uninstalled: it isn't started again")

// Start starts the daemon and waits until it answers, at most patience. One that
// answers already is left alone.
func (d Daemon) Start(ctx context.Context, patience time.Duration) (pid int, err error) {
	if wanted, err := d.Wanted(); err != nil || !wanted {
		return 0, errors.Join(err, ErrNotWanted)
	}
	if pid, err := d.Process(ctx); err != nil || pid != 0 {
		return pid, err
	}
	log, err := os.OpenFile(d.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	cmd := exec.Command(d.Command[0], d.Command[1:]...) // it outlives this process
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		if pid, err := d.Process(ctx); err == nil && pid != 0 {
			return pid, nil
		}
		select {
		case err := <-ended:
			return 0, fmt.Errorf("the node daemon ended at once (%w); the end of its log %s:\n%s", err, d.Log, logEnd(d.Log))
		case <-ctx.Done():
			return 0, fmt.Errorf("the node daemon doesn't answer within %v; the end of its log %s:\n%s", patience, d.Log, logEnd(d.Log))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// The pauses between starts of a daemon that ends again and again.
const (
	firstPause = time.Second
	longPause  = time.Minute
	startTime  = time.Minute
)

// Supervise keeps the daemon running until ctx ends, and then leaves it as it
// is. It also ends when the daemon isn't wanted any more, with ErrNotWanted. What
// the daemon logs is copied to out.
func (d Daemon) Supervise(ctx context.Context, out io.Writer, log *slog.Logger) error {
	at := int64(0) // what is there already somebody else has shown
	if fi, err := os.Stat(d.Log); err == nil {
		at = fi.Size()
	}
	following, stop := context.WithCancel(ctx)
	followed := make(chan struct{})
	go func() { defer close(followed); d.follow(following, at, out) }()
	defer func() { stop(); <-followed }()
	for pause := firstPause; ; pause = min(2*pause, longPause) {
		begin := time.Now()
		pid, err := d.Start(ctx, startTime)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, ErrNotWanted) {
			return err
		}
		if err == nil {
			log.Info("the node daemon runs", "pid", pid)
			err = awaitEnd(ctx, pid)
		}
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(begin) > longPause {
			pause = firstPause
		}
		log.Error("the node daemon is down, it's started again", "after", pause, "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// awaitEnd returns when a process has ended, which needn't be a child.
func awaitEnd(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("watch the node daemon, process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	for ctx.Err() == nil {
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 500); err == nil && n > 0 {
			return nil
		}
	}
	return ctx.Err()
}

// follow copies what is appended to the log after its first at bytes, and keeps the
// log bounded, until ctx ends.
func (d Daemon) follow(ctx context.Context, at int64, out io.Writer) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		f, err := os.OpenFile(d.Log, os.O_RDWR, 0)
		if err != nil {
			continue // it will be there when the daemon is
		}
		if fi, err := f.Stat(); err == nil && fi.Size() < at {
			at = 0 // somebody cut it
		}
		n, _ := io.Copy(out, io.NewSectionReader(f, at, maxLog)) // what can't be shown is in the file
		if at += n; at > maxLog {
			if copyFile(d.Log+".1", f) == nil && f.Truncate(0) == nil {
				at = 0
			}
		}
		f.Close()
	}
}

func copyFile(name string, from *os.File) error {
	to, err := os.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, io.NewSectionReader(from, 0, 2*maxLog))
	return errors.Join(err, to.Close())
}

// logEnd returns the end of a log.
func logEnd(name string) []byte {
	content, err := os.ReadFile(name)
	if err != nil {
		return nil
	}
	return content[max(0, len(content)-2000):]
}
