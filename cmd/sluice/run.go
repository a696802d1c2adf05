package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"sluice/cmd/internal/program"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/run"
	"sluice/oci"
)

func newRunCommand() *cobra.Command {
	var f imageFlags
	var env []string
	var runc, user string
	cmd := &cobra.Command{
		Use:   "run IMAGE [COMMAND [ARGUMENT]...]",
		Short: "Run an image's process; its content comes when it is read",
		Long: `Run an image's process; its content comes when it is read.

Needs root and runc, but no containerd. The container has the host's network;
what it writes is thrown away when it ends. It has a terminal if sluice has.

The exit code is the process's; 125 if sluice failed, 126 if the command can't
be run, 127 if the image doesn't have it.`,
		Example: `  sluice run registry.example.com/team/app:v1
  sluice run registry.example.com/team/app:v1 sh -c 'ls -l /'`,
		Args: arguments(1, math.MaxInt),
		RunE: func(cmd *cobra.Command, args []string) error {
			c := run.Container{Args: args[1:], Env: env, Terminal: isTerminal(os.Stdin) && isTerminal(os.Stdout)}
			c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
			c.Config.Config.User = user
			return runImage(cmd.Context(), f, args[0], c, runc)
		},
	}
	f.register(cmd)
	cmd.Flags().StringArrayVarP(&env, "env", "e", nil, "set a variable `KEY=VALUE`, or pass KEY on; may be\nrepeated")
	cmd.Flags().StringVar(&runc, "runc", "runc", "`PROGRAM` with runc's command line")
	cmd.Flags().StringVarP(&user, "user", "u", "", "run as `USER` or USER:GROUP, names or numbers")
	// Always so; for people's habit.
	cmd.Flags().Bool("rm", true, "remove the container when it ends")
	cmd.Flags().BoolP("interactive", "i", true, "keep standard input open")
	cmd.Flags().BoolP("tty", "t", true, "give it a terminal if there is one")
	for _, name := range []string{"rm", "interactive", "tty"} {
		cmd.Flag(name).Hidden = true
	}
	// What follows the image is the container's.
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// runImage mounts an image, runs its process and unmounts it.
func runImage(ctx context.Context, f imageFlags, image string, c run.Container, runc string) (err error) {
	defer func() {
		var exit program.ExitError
		if err != nil && !errors.As(err, &exit) {
			err = &program.CodedError{Err: err, Code: run.CodeFailed} // unlike any that the process has
		}
	}()
	client, err := connect(ctx, f.daemonFlags, f.plainHTTP)
	if err != nil {
		return err
	}
	done, err := mountContainer(ctx, client, f.image(image), &c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	return runContainer(ctx, c, runc)
}

// mountContainer mounts an image for a container and completes that by its
// config. done unmounts it.
func mountContainer(ctx context.Context, client *control.Client, image string, c *run.Container) (done func() error, err error) {
	m, err := mountImage(ctx, client, control.Mount{Reference: image, PID: os.Getpid()}, os.Stderr)
	if err != nil {
		return nil, err
	}
	done = func() error { return client.Unmount(context.WithoutCancel(ctx), m.Claim.ID) }
	var config oci.ImageConfig
	if err := json.Unmarshal(m.Config, &config); err != nil {
		return nil, errors.Join(fmt.Errorf("config of %s: %w", image, err), done())
	}
	if user := c.Config.Config.User; user != "" {
		config.Config.User = user
	}
	c.Rootfs, c.Config = []string{m.Claim.Path}, config
	for i, v := range c.Env {
		if !strings.Contains(v, "=") {
			c.Env[i] = v + "=" + os.Getenv(v)
		}
	}
	return done, nil
}

// runContainer runs a container until its process ends.
func runContainer(ctx context.Context, c run.Container, runc string) error {
	code, err := run.Run(ctx, c, run.Options{
		// Beside the image's mount, which isn't on overlayfs.
		Dir:  filepath.Join(filepath.Dir(filepath.Dir(c.Rootfs[0])), "run"),
		Runc: runc,
		Log:  slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("%w: install runc, or name it with --runc", err)
	}
	if err == nil && code != 0 {
		return program.ExitError(code)
	}
	return err
}

// isTerminal reports whether f is a terminal.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
