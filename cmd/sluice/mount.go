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
)

// imageFlags are the flags of verbs that take an image.
type imageFlags struct {
	daemonFlags
	registry  string
	plainHTTP []string
}

func (f *imageFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.registry, "registry", "", "registry of images whose name has none, instead of docker.io")
	cmd.Flags().StringArrayVar(&f.plainHTTP, "plain-http", nil, "registry to speak HTTP without TLS with; may be repeated (loopback is by itself; a daemon that runs already keeps its own list)")
	f.daemonFlags.register(cmd)
}

// daemonFlags say which daemon to ask.
type daemonFlags struct{ root, run string }

func (f *daemonFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.root, "root", "", "use the daemon with its state in this directory, and start it if need be (default: the machine's node daemon; without one, that of "+standaloneRoot+")")
	cmd.Flags().StringVar(&f.run, "run", "", "directory of the daemon's sockets (default: where the daemon of --root says)")
}

// sockets returns the directory of the sockets of the daemon with its state in
// root.
func (f *daemonFlags) sockets(root string) string {
	if f.run != "" {
		return f.run
	}
	return runDir(root)
}

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
		Short: "Mount an image on a directory; its content comes when it is read",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir, err := filepath.Abs(args[1])
			if err != nil {
				return err
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
	cmd.Flags().BoolVar(&writable, "writable", false, "let the directory be written to; umount throws the changes away")
	return cmd
}

func newUmountCommand() *cobra.Command {
	var f daemonFlags
	cmd := &cobra.Command{
		Use:   "umount DIR",
		Short: "Undo sluice mount",
		Args:  cobra.ExactArgs(1),
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
	roots := []string{f.root}
	if f.root == "" {
		roots = []string{nodeRoot, standaloneRoot}
	}
	for _, r := range roots {
		r, err := filepath.Abs(r)
		if err != nil {
			return err
		}
		client := control.NewClient(controlSocket(f.sockets(r)))
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
		fmt.Fprintf(stderr, "sluice: fetching the index of %s ...\n", req.Reference)
	})
	defer notice.Stop()
	m, err := client.Mount(ctx, req)
	switch mount.ReasonOf(err) {
	case mount.NoStreamingArtifact:
		return m, fmt.Errorf("%s has no streaming artifact (%w): make one with sluice artifact-streaming create", req.Reference, err)
	case "":
		return m, err
	}
	return m, fmt.Errorf("%s can't be streamed: %w", req.Reference, err)
}
