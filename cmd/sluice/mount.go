package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/plane"
	"sluice/internal/node/serve"
)

// imageFlags are the flags of verbs that take an image.
type imageFlags struct {
	daemonFlags
	registry  string
	plainHTTP []string
}

func (f *imageFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.registry, "registry", "", "`HOST` or HOST:PORT to put before the image's name")
	cmd.Flags().StringArrayVar(&f.plainHTTP, "plain-http", nil, "speak HTTP without TLS with registry `HOST`; may be\nrepeated (loopback is by itself; a daemon that runs\nalready keeps its own list)")
	f.daemonFlags.register(cmd)
}

// daemonFlags say which daemon to ask.
type daemonFlags struct{ root, run string }

func (f *daemonFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.root, "root", "", "use the daemon with its state in `DIR`, and start\nit if need be (default: the machine's sluice node,\nor else "+standaloneRoot+")")
	cmd.Flags().StringVar(&f.run, "run", "", "`DIR` of the daemon's sockets (default: where the\ndaemon of --root says)")
}

// sockets returns the directory of the sockets of the daemon with its state in
// root.
func (f *daemonFlags) sockets(root string) string {
	if f.run != "" {
		return f.run
	}
	return runDir(root)
}

// errNotRoot is the error of verbs that mount.
var errNotRoot = errors.New("mounting and unmounting need root: run it with sudo")

// image returns the reference to ask for.
func (f *imageFlags) image(name string) string {
	if f.registry == "" {
		return name
	}
	return strings.TrimSuffix(f.registry, "/") + "/" + name
}

func newMountCommand() *cobra.Command {
	var f imageFlags
	var writable bool
	cmd := &cobra.Command{
		Use:   "mount IMAGE DIR",
		Short: "Mount an image; its content comes when it is read",
		Long: `Mount an image; its content comes when it is read.

Needs root. DIR must exist; sluice umount DIR undoes it. Without a
sluice node on the machine a daemon of its own is started, which ends after the
last unmount.`,
		Example: `  sluice mount registry.example.com/team/app:v1 /mnt`,
		Args:    arguments(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir, err := filepath.Abs(args[1])
			if err != nil {
				return err
			}
			if fi, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("%s doesn't exist: make the directory first", dir)
			} else if err == nil && !fi.IsDir() {
				return fmt.Errorf("%s isn't a directory", dir)
			}
			client, err := connect(cmd.Context(), f.daemonFlags, f.plainHTTP)
			if err != nil {
				return err
			}
			req := control.Mount{Reference: f.image(args[0]), Dir: dir, Writable: writable}
			m, err := mountImage(cmd.Context(), client, req, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is mounted on %s. Unmount with: sluice umount %s\n", m.Claim.Reference, dir, args[1])
			return nil
		},
	}
	f.register(cmd)
	cmd.Flags().BoolVar(&writable, "writable", false, "let DIR be written to; umount throws changes away")
	return cmd
}

func newUmountCommand() *cobra.Command {
	var f daemonFlags
	cmd := &cobra.Command{
		Use:   "umount DIR",
		Short: "Undo sluice mount",
		Long:  `Undo sluice mount. What was written to a --writable mount is thrown away.`,
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			return unmountImage(cmd.Context(), f, dir)
		},
	}
	f.register(cmd)
	return cmd
}

// unmountImage asks the daemon that has mounted dir: the node's, or the
// standalone one.
func unmountImage(ctx context.Context, f daemonFlags, dir string) error {
	if os.Geteuid() != 0 {
		return errNotRoot
	}
	roots := []string{f.root}
	if f.root == "" {
		roots = []string{nodeRoot, standaloneRoot}
	}
	for _, r := range roots {
		r, err := filepath.Abs(r)
		if err != nil {
			return err
		}
		client := control.NewClient(serve.Control(f.sockets(r)))
		err = client.Unmount(ctx, dir)
		if errors.Is(err, control.ErrNoDaemon) && r != nodeRoot {
			if _, serr := os.Stat(r); serr == nil {
				// It was killed. The next one knows what it had mounted.
				if client, err = connect(ctx, daemonFlags{root: r, run: f.run}, nil); err == nil {
					err = client.Unmount(ctx, dir)
				}
			}
		}
		switch {
		case errors.Is(err, mount.ErrUnknownClaim), errors.Is(err, control.ErrNoDaemon):
			continue
		case errors.Is(err, plane.ErrBusy):
			return fmt.Errorf("%s is in use: end what has files of it open (fuser -vm %s tells), then try again", dir, dir)
		default:
			return err
		}
	}
	return fmt.Errorf("%s was not mounted with sluice mount", dir)
}

// mountImage asks the daemon for a mount. When that takes longer it tells that
// it is at work, and when the image doesn't stream, what can be done.
func mountImage(ctx context.Context, client *control.Client, req control.Mount, stderr io.Writer) (control.Mounted, error) {
	notice := time.AfterFunc(time.Second, func() {
		fmt.Fprintf(stderr, "sluice: looking up %s ...\n", req.Reference)
	})
	defer notice.Stop()
	m, err := client.Mount(ctx, req)
	switch mount.ReasonOf(err) {
	case mount.NoStreamingArtifact:
		return m, fmt.Errorf("%s has no streaming artifact. Make one with: sluice artifact-streaming create %s\n(%w)", req.Reference, req.Reference, err)
	case "":
		if ctx.Err() != nil {
			return m, errors.New("interrupted")
		}
		return m, err
	}
	return m, fmt.Errorf("%s can't be streamed: %w", req.Reference, err)
}
