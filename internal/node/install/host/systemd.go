package host

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// HasSystemd reports whether systemd started the machine whose file system is
// at root.
func HasSystemd(root string) bool {
	fi, err := os.Stat(filepath.Join(root, "run/systemd/system"))
	return err == nil && fi.IsDir()
}

// commandTime bounds how long a command of the machine may take: containerd with
// many containers takes its time to start.
const commandTime = 3 * time.Minute

// Systemctl runs systemctl.
func Systemctl(ctx context.Context, args ...string) error {
	return Run(ctx, "systemctl", args...)
}

// Run runs a program of the machine. Its error has what the program printed.
func Run(ctx context.Context, program string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(out.String())
		return fmt.Errorf("%s: %w: %s", strings.Join(append([]string{program}, args...), " "), err, text[max(0, len(text)-2000):])
	}
	return nil
}

// Journal returns the last lines that a unit logged, "" if there's no journal.
func Journal(ctx context.Context, unit string) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, _ := exec.CommandContext(ctx, "journalctl", "--unit", unit, "--lines", "20", "--no-pager", "--output", "cat").Output() // its lines are a help, no more
	return string(out)
}
