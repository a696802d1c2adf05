package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"sluice/internal/node/mount/control"
	"sluice/internal/node/run"
	"sluice/oci"
)

// exitError is the exit code of a process that ran in a container.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("the process ended with exit code %d", int(e)) }

func newRunCommand() *cobra.Command {
	var f imageFlags
	var env []string
	var runc string
	cmd := &cobra.Command{
		Use:   "run IMAGE [COMMAND [ARGUMENT]...]",
		Short: "Run an image's process; its content comes when it is read",
		Long: `Run an image's process; its content comes when it is read.

Needs root and runc, but no containerd. The container has the host's network;
what it writes is thrown away when it ends.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c := run.Container{Args: args[1:], Env: env, Terminal: isTerminal(os.Stdin) && isTerminal(os.Stdout)}
			c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
			return runImage(cmd.Context(), f, args[0], c, runc)
		},
	}
	f.register(cmd)
	cmd.Flags().StringArrayVarP(&env, "env", "e", nil, "environment variable KEY=VALUE, or KEY to pass it on; may be repeated")
	cmd.Flags().StringVar(&runc, "runc", "runc", "OCI runtime with runc's command line")
	cmd.Flags().Bool("rm", true, "remove the container when it ends: always so, for people's habit")
	cmd.Flag("rm").Hidden = true
	// What follows the image is the container's.
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// runImage mounts an image, runs its process and unmounts it.
func runImage(ctx context.Context, f imageFlags, image string, c run.Container, runc string) (err error) {
	client, err := connect(ctx, f.daemonFlags, f.plainHTTP)
	if err != nil {
		return err
	}
	m, err := mountImage(ctx, client, control.Mount{Reference: f.image(image), PID: os.Getpid()}, os.Stderr)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, client.Unmount(context.WithoutCancel(ctx), m.Claim.ID))
	}()
	var config oci.ImageConfig
	if err := json.Unmarshal(m.Config, &config); err != nil {
		return fmt.Errorf("config of %s: %w", image, err)
	}
	c.Rootfs, c.Config = m.Claim.Path, config
	for i, v := range c.Env {
		if !strings.Contains(v, "=") {
			c.Env[i] = v + "=" + os.Getenv(v)
		}
	}
	code, err := run.Run(ctx, c, run.Options{
		// Beside the image's mount, which isn't on overlayfs.
		Dir:  filepath.Join(filepath.Dir(filepath.Dir(c.Rootfs)), "run"),
		Runc: runc,
		Log:  slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err == nil && code != 0 {
		return exitError(code)
	}
	return err
}

// isTerminal reports whether f is a terminal.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
