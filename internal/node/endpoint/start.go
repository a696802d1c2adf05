package endpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// startTime is how long a daemon may take to answer after its start.
const startTime = 20 * time.Second

// Start starts a daemon that outlives this program, and waits until it answers:
// answers returns nil then. What it says goes to the file log, which is made anew. If
// it ends at once and another answers, which somebody else started, that is as good.
func Start(ctx context.Context, log, program string, args []string, answers func(context.Context) error) error {
	out, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(program, args...) // not tied to ctx
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			if answers(ctx) == nil {
				return nil
			}
			return fmt.Errorf("it ended at once (%w); its log is %s:\n%s", errors.Join(err, errors.New("see why below")), log, tail(log))
		case <-ctx.Done():
			return fmt.Errorf("it doesn't answer within %v; its log is %s", startTime, log)
		case <-tick.C:
			if answers(ctx) == nil {
				return nil
			}
		}
	}
}

// tail returns the end of a log.
func tail(name string) []byte {
	content, err := os.ReadFile(name)
	if err != nil {
		return nil
	}
	return content[max(0, len(content)-2000):]
}
