// Package program is how every program of the project begins and ends: signals, what
// is printed of an error, exit codes, and the version.
package program

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// Main runs a program's root command and ends the process, with code 0 or, after an
// error, that of an ExitError or a CodedError, or else 1. The command's context ends
// with SIGINT and SIGTERM. An error is printed, unless it's an ExitError.
func Main(root *cobra.Command) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := root.ExecuteContext(ctx)
	stop()
	if err == nil {
		return
	}
	var exit ExitError
	if errors.As(err, &exit) {
		os.Exit(int(exit)) // what the process had to say, it has said
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", root.Name(), err)
	var coded *CodedError
	if errors.As(err, &coded) {
		os.Exit(coded.Code)
	}
	os.Exit(1)
}

// ExitError is the exit code of a process that ran in a container.
type ExitError int

func (e ExitError) Error() string { return fmt.Sprintf("the process ended with exit code %d", int(e)) }

// CodedError is an error with which the program ends with another code than 1.
type CodedError struct {
	Err  error
	Code int
}

func (e *CodedError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *CodedError) Unwrap() error { return e.Err }

// Version returns what the Go toolchain recorded about this build.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version + " " + info.GoVersion
}
