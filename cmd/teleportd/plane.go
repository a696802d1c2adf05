package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fuse"
)

// newHolderCommand is the process that keeps the plane's connection with the
// kernel.
func newHolderCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "holder SOCKET",
		Short:  "Keep a daemon's connection with the kernel while the daemon restarts",
		Hidden: true,
		Args:   arguments(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return fuse.RunHolder(cmd.Context(), args[0])
		},
	}
}

// openPlane opens the plane, or one that says why there's none, and says how the
// kernel reads EROFS.
func (d *daemon) openPlane(ctx context.Context) (plane.Plane, plane.Mode, error) {
	support, err := plane.Probe(d.config.root, plane.Modes()...)
	if errors.Is(err, plane.ErrNotProbed) {
		// A full disk mustn't cost the mounts that are there their content.
		support, err = plane.Probe(d.config.run, plane.Modes()...)
	}
	d.known.Kernel = support.Kernel
	if err == nil {
		var self string
		if self, err = os.Executable(); err != nil {
			return nil, "", fmt.Errorf("find my own program, which is the holder, too: %w", err)
		}
		d.plane, err = fuse.Open(ctx, fuse.Options{
			Dir: filepath.Join(d.config.run, "plane"), HolderCommand: []string{self, "holder"}, Mode: support.Mode,
			ReadTimeout: d.config.read, Log: d.log,
		})
	}
	var unsupported *plane.UnsupportedError
	switch {
	case errors.As(err, &unsupported):
		d.log.Error("disks can't be mounted on this machine, images are pulled the ordinary way", "error", err)
		d.unusable = unsupported.Reasons
		return mount.NoPlane(err), "", nil
	case err != nil:
		return nil, "", err
	}
	return d.plane, support.Mode, nil
}

// lost is closed when the plane is of no use any more.
func (d *daemon) lost() <-chan struct{} {
	if d.plane == nil {
		return nil
	}
	return d.plane.Lost()
}
