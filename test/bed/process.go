package bed

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// Process is a server of the bed: started by it, logging to a file, ended by
// it and by nobody else.
type Process struct {
	Name string
	Log  string // path of what it prints
	cmd  *exec.Cmd
	done chan struct{} // closed once cmd.ProcessState is valid
}

// Start starts a server whose output goes to dir/name.log.
func Start(dir, name string, env []string, path string, args ...string) (*Process, error) {
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), env...)
	return start(dir, name, cmd)
}

// start starts a server that was prepared. Nothing outlives a test that was
// killed: the kernel kills the server when the thread ends that started it. So
// that thread is kept until then: the runtime ends threads of goroutines which
// have locked them, as a Host's do.
func start(dir, name string, cmd *exec.Cmd) (p *Process, err error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan struct{})
	go func() { // ends with the server
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		p, err = launch(dir, name, cmd)
		close(started)
		if q := p; q != nil {
			<-q.done
		}
	}()
	<-started
	return p, err
}

// launch is start for a server that somebody else ends when a test is killed.
func launch(dir, name string, cmd *exec.Cmd) (*Process, error) {
	log, err := os.OpenFile(filepath.Join(dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true // ^C is ours to handle
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	p := &Process{Name: name, Log: log.Name(), cmd: cmd, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // how it ended is in cmd.ProcessState
		close(p.done)
	}()
	return p, nil
}

// Pid is the process's number.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Ended reports whether the process has ended.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Kill ends the process as a crash would and waits for its end.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // it may have ended by itself
	<-p.done
}

// patience bounds what only takes long on a machine that is very busy, or when
// something hangs.
const patience = 2 * time.Minute

// Stop asks the process to end, and insists after half a minute.
func (p *Process) Stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		p.Kill()
	}
}

// AwaitSocket waits until something accepts connections at address.
func (p *Process) AwaitSocket(ctx context.Context, network, address string) error {
	return p.Await(ctx, func() bool {
		c, err := net.DialTimeout(network, address, time.Second)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// AwaitHTTP waits until a GET of url is answered with the status.
func (p *Process) AwaitHTTP(ctx context.Context, url string, status int) error {
	client := &http.Client{Timeout: time.Second}
	defer client.CloseIdleConnections()
	return p.Await(ctx, func() bool {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return false
		}
		resp, err := client.Do(req)
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == status
	})
}

// Await waits until ready says so, as long as the process lives and patience allows.
func (p *Process) Await(ctx context.Context, ready func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for !ready() {
		select {
		case <-p.done:
			return fmt.Errorf("%s ended (%v); its last words:\n%s", p.Name, p.cmd.ProcessState, p.lastWords())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w; its last words:\n%s", p.Name, ctx.Err(), p.lastWords())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

func (p *Process) lastWords() []byte {
	b, err := os.ReadFile(p.Log)
	if err != nil {
		return nil
	}
	return tail(b, 2<<10)
}
