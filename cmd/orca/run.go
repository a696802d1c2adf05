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
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"sluice/cmd/internal/program"
	"sluice/internal/node/disks/control"
	"sluice/internal/node/run"
	"sluice/oci"
)

// runConfig is the flags of orca run.
type runConfig struct {
	daemonFlags
	env        []string
	runc, user string
	ordinary   bool
	debug      bool
}

func newRunCommand() *cobra.Command {
	var c runConfig
	cmd := &cobra.Command{
		Use:   "run [OPTION]... IMAGE [-e KEY=VALUE]... [COMMAND [ARGUMENT]...]",
		Short: "Run an image's process",
		Long: `Run an image's process.

The container has the host's network; what it writes is thrown away when it ends.
It has a terminal if orca has. Variables may also be set directly after the image;
a command that begins with -e itself comes after --.

What orca does is told on standard error, so that standard output is the
process's. The exit code is the process's; 125 if orca failed, 126 if the command
can't be run, 127 if the image doesn't have it.

The image stays on the machine (orca images, orca rm). While the registry can't be
reached, it is run as it was pulled last.`,
		Example: `  orca run registry.example.com/team/app:v1
  orca run --debug -e MODE=test registry.example.com/team/app:v1 sh -c 'ls -l /'`,
		DisableFlagsInUseLine: true,

		Args:              arguments(1, math.MaxInt),
		ValidArgsFunction: completeImages(&c.daemonFlags, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			image, rest := args[0], args[1:]
			env, command, err := leadingEnv(rest)
			if err != nil {
				return err
			}
			c.env = append(c.env, env...)
			return c.run(cmd.Context(), image, command)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringArrayVarP(&c.env, "env", "e", nil, "set a variable `KEY=VALUE`, or pass KEY on; may be\nrepeated")
	f.StringVarP(&c.user, "user", "u", "", "run as `USER` or USER:GROUP, names or numbers")
	f.BoolVar(&c.debug, "debug", false, "tell how long everything takes, and what is mounted")
	f.BoolVar(&c.ordinary, "ordinary", false, "pull the image the ordinary way in any case")
	f.StringVar(&c.runc, "runc", "runc", "`PROGRAM` with runc's command line")
	c.daemonFlags.register(cmd)
	// Always so; for people's habit.
	f.Bool("rm", true, "remove the container when it ends")
	f.BoolP("interactive", "i", true, "keep standard input open")
	f.BoolP("tty", "t", true, "give it a terminal if there is one")
	for _, name := range []string{"rm", "interactive", "tty"} {
		cmd.Flag(name).Hidden = true
	}
	// What follows the image is the container's.
	f.SetInterspersed(false)
	return cmd
}

// leadingEnv takes the variables from what follows the image, "-e K=V", "--env K=V"
// and "--env=K=V", until something else comes, or "--", which is dropped.
func leadingEnv(args []string) (env, command []string, err error) {
	for len(args) > 0 {
		value, inside := strings.CutPrefix(args[0], "--env=")
		switch {
		case inside:
			env, args = append(env, value), args[1:]
		case args[0] == "-e" || args[0] == "--env":
			if len(args) < 2 {
				return nil, nil, fmt.Errorf("%s after the image lacks its KEY=VALUE", args[0])
			}
			env, args = append(env, args[1]), args[2:]
		case args[0] == "--":
			return env, args[1:], nil
		default:
			return env, args, nil
		}
	}
	return env, args, nil
}

// run mounts an image, runs its process and unmounts it.
func (c *runConfig) run(ctx context.Context, image string, args []string) (err error) {
	defer func() {
		var exit program.ExitError
		if err != nil && !errors.As(err, &exit) {
			err = &program.CodedError{Err: err, Code: run.CodeFailed} // unlike any that the process has
		}
	}()
	s := newStages(image, os.Stderr, c.debug)
	d, err := c.connect(ctx)
	if err != nil {
		return err
	}
	m, err := s.mount(ctx, d, control.Mount{Reference: image, PID: os.Getpid(), Ordinary: c.ordinary})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Unmount(context.WithoutCancel(ctx), m.ID)) }()
	s.say("the container", lineMounted+"\n")
	for i, dir := range m.Dirs {
		s.note("mount %d of %d, from the top: %s", i+1, len(m.Dirs), dir)
	}
	container := run.Container{Rootfs: m.Dirs, Args: args, Env: variables(c.env), Terminal: isTerminal(os.Stdin) && isTerminal(os.Stdout)}
	container.Stdin, container.Stdout, container.Stderr = os.Stdin, os.Stdout, os.Stderr
	var config oci.ImageConfig
	if err := json.Unmarshal(m.Config, &config); err != nil {
		return fmt.Errorf("config of %s: %w", image, err)
	}
	if container.Config = config; c.user != "" {
		container.Config.Config.User = c.user
	}
	fmt.Fprintln(os.Stderr, lineCreating)
	return c.start(ctx, container, filepath.Join(d.info.Root, "containers"), s)
}

// variables gives those without a value the one that this process has.
func variables(env []string) []string {
	env = slices.Clone(env)
	for i, v := range env {
		if !strings.Contains(v, "=") {
			env[i] = v + "=" + os.Getenv(v)
		}
	}
	return env
}

// start runs a container until its process ends.
func (c *runConfig) start(ctx context.Context, container run.Container, dir string, s *stages) error {
	code, err := run.Run(ctx, container, run.Options{
		Dir: dir, Runc: c.runc,
		Starting: func() {
			s.end()
			fmt.Fprintln(os.Stderr, lineStarting)
		},
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
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
