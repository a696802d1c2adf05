package host

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
)

// TestLeave: in version 1 every hierarchy's uppermost group takes the process,
// in version 2 a group of its own, which is made.
func TestLeave(t *testing.T) {
	dir := t.TempDir()
	var mounts []*mountinfo.Info
	for name, kind := range map[string]string{"memory": "cgroup", "unified": "cgroup2"} {
		mounts = append(mounts, &mountinfo.Info{FSType: kind, Mountpoint: filepath.Join(dir, name)})
	}
	files := []string{filepath.Join(dir, "memory/cgroup.procs"), filepath.Join(dir, "unified", group, "cgroup.procs")}
	for _, name := range files { // as the kernel makes them
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := leave(mounts, 42); err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if b, err := os.ReadFile(name); string(b) != "42" || err != nil {
			t.Errorf("%s has %q, %v", name, b, err)
		}
	}
	if err := os.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	if err := leave(mounts, 42); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a group that can't be entered: %v", err)
	}
}

// output is a writer that several goroutines use.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// sleeper is a daemon that is a process which sleeps and has written its number
// to a file.
func sleeper(t *testing.T, script string) Daemon {
	dir := t.TempDir()
	pidFile := filepath.Join(dir, "pid")
	return Daemon{
		Command: []string{"/bin/sh", "-c", script, "sh", pidFile},
		Log:     filepath.Join(dir, "log"),
		Process: func(context.Context) (int, error) {
			b, err := os.ReadFile(pidFile)
			if err != nil {
				return 0, nil
			}
			pid := 0
			for _, c := range strings.TrimSpace(string(b)) {
				pid = 10*pid + int(c-'0')
			}
			if _, err := os.Stat(filepath.Join("/proc", strings.TrimSpace(string(b)))); err != nil {
				return 0, nil
			}
			return pid, nil
		},
		Wanted: func() (bool, error) { return true, nil },
	}
}

const sleeps = `echo it runs; echo $$ >"$1.new"; mv "$1.new" "$1"; exec sleep 1000`

// TestSupervise: a daemon that ends is started again, and the supervisor's end
// isn't the daemon's. All that they log is shown.
func TestSupervise(t *testing.T) {
	d := sleeper(t, sleeps)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	var out output
	go func() { ended <- d.Supervise(ctx, &out, slog.New(slog.NewTextHandler(io.Discard, nil))) }()
	first := await(t, d, 0)
	kill(t, first)
	second := await(t, d, first)
	t.Cleanup(func() { kill(t, second) })
	for end := time.Now().Add(time.Minute); strings.Count(out.String(), "it runs") < 2; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("of the log it has shown %q", out.String())
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if pid, err := d.Process(t.Context()); pid != second || err != nil {
		t.Errorf("then the daemon is %d, %v; was %d", pid, err, second)
	}
}

// await waits for a daemon that isn't the process before.
func await(t *testing.T, d Daemon, before int) int {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		pid, err := d.Process(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if pid != 0 && pid != before {
			return pid
		}
		if time.Now().After(end) {
			t.Fatal("no daemon runs")
		}
	}
}

func kill(t *testing.T, pid int) {
	t.Helper()
	p, err := os.FindProcess(pid)
	if err == nil {
		err = p.Kill()
	}
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
}

// TestStartFails: a daemon that ends at once is told with what it logged.
func TestStartFails(t *testing.T) {
	d := sleeper(t, "echo no such plane >&2; exit 3")
	_, err := d.Start(t.Context(), time.Minute)
	if err == nil || !strings.Contains(err.Error(), "no such plane") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("error %v", err)
	}
}

// TestNotWanted: what is being uninstalled isn't started.
func TestNotWanted(t *testing.T) {
	d := sleeper(t, sleeps)
	d.Wanted = func() (bool, error) { return false, nil }
	if err := d.Supervise(t.Context(), io.Discard, slog.New(slog.NewTextHandler(io.Discard, nil))); !errors.Is(err, ErrNotWanted) {
		t.Errorf("error %v", err)
	}
	if pid, _ := d.Process(t.Context()); pid != 0 {
		t.Errorf("%d was started", pid)
	}
}

// TestRun: what a program of the machine prints is in its error.
func TestRun(t *testing.T) {
	if err := Run(t.Context(), "/bin/sh", "-c", "exit 0"); err != nil {
		t.Error(err)
	}
	err := Run(t.Context(), "/bin/sh", "-c", "echo why; exit 7")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !strings.Contains(err.Error(), "why") {
		t.Errorf("error %v", err)
	}
}

// TestEnterNeedsPrivileges: a machine that isn't there, or is of another PID
// namespace, is told.
func TestEnterNeedsPrivileges(t *testing.T) {
	root := t.TempDir()
	if Live(root) {
		t.Error("an empty directory is a machine that runs")
	}
	if err := Enter(root, nil); err == nil || !strings.Contains(err.Error(), "privileged") {
		t.Errorf("error %v", err)
	}
	if err := os.MkdirAll(filepath.Join(root, "proc/1/ns"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("pid:[1]", filepath.Join(root, "proc/1/ns/pid")); err != nil {
		t.Fatal(err)
	}
	if err := Enter(root, nil); err == nil || !strings.Contains(err.Error(), "hostPID: true") {
		t.Errorf("error %v", err)
	}
}

// TestLogIsBounded: a log that is too long is cut, and goes on.
func TestLogIsBounded(t *testing.T) {
	d := sleeper(t, sleeps)
	if err := os.WriteFile(d.Log, bytes.Repeat([]byte("x"), maxLog+1), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); d.follow(ctx, maxLog+1, io.Discard) }()
	defer func() { stop(); <-done }()
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		now, err := os.Stat(d.Log)
		old, oerr := os.Stat(d.Log + ".1")
		if err == nil && oerr == nil && now.Size() == 0 && old.Size() == maxLog+1 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the log: %v, %v; the old one: %v, %v", now, err, old, oerr)
		}
	}
}
