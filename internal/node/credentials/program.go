package credentials

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

const (
	// maxOutput bounds what a program with credentials may print, in bytes.
	maxOutput = 1 << 20

	// maxComplaint bounds how much of its standard error is shown.
	maxComplaint = 300
)

// errTooMuch ends a program that prints without end.
var errTooMuch = fmt.Errorf("it printed more than %d bytes", maxOutput)

// runProgram runs a program, writes input to it and returns what it prints. When
// ctx ends, the program and its children are killed. The error has the beginning
// of what it complained of.
func runProgram(ctx context.Context, input []byte, env []string, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env, cmd.Stdin = env, bytes.NewReader(input)
	// A group of its own, so that children that keep its pipes go with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	stdout := &bounded{limit: maxOutput, full: errTooMuch}
	stderr := &bounded{limit: maxComplaint}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	err := cmd.Run()
	switch {
	case stdout.over:
		err = errTooMuch
	case err == nil:
		return stdout.content, nil
	}
	if text := printable(stderr.content); text != "" {
		err = fmt.Errorf("%w: %s", err, text)
	}
	return stdout.content, err
}

// bounded keeps the beginning of what is written to it. What is too much is an
// error, or without one goes nowhere.
type bounded struct {
	content []byte
	limit   int
	full    error
	over    bool
}

// Write implements io.Writer.
func (b *bounded) Write(p []byte) (int, error) {
	n := min(len(p), b.limit-len(b.content))
	b.content = append(b.content, p[:n]...)
	b.over = b.over || n < len(p)
	if b.over && b.full != nil {
		return n, b.full
	}
	return len(p), nil
}

// printable is foreign text as one line.
func printable(b []byte) string {
	return strings.Join(strings.Fields(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return ' '
		}
		return r
	}, string(b))), " ")
}
