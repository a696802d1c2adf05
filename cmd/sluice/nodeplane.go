package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fuse"
)

// servedPlane is a plane with this process behind it.
type servedPlane interface {
	plane.Plane
	// Lost is closed when the plane is of no use any more: open it again.
	Lost() <-chan struct{}
	// Shutdown ends the plane and what outlives the process, unless images
	// are attached.
	Shutdown(ctx context.Context) error
}

// The values of --plane.
const (
	planeAuto = "auto"
	planeFUSE = "fuse"
	planeLoop = "fuse-loop"
)

func planeNames() []string { return []string{planeAuto, planeFUSE, planeLoop} }

func (c *nodeConfig) registerPlane(f *pflag.FlagSet) {
	f.StringVar(&c.plane, "plane", planeAuto, "`HOW` the kernel gets content: fuse (Linux 6.12),\nfuse-loop (6.4: a loop device for each layer), or\nauto: what this machine can")
}

func (c *nodeConfig) checkPlane() error {
	if !slices.Contains(planeNames(), c.plane) {
		return fmt.Errorf("--plane %q: use one of %s", c.plane, strings.Join(planeNames(), ", "))
	}
	return nil
}

// openPlane opens the plane, or one that says why there's none.
func (d *daemon) openPlane(ctx context.Context) (plane.Plane, error) {
	support, err := d.config.probe()
	d.info.Plane.Kernel = support.Kernel
	if err == nil {
		err = d.openFUSE(ctx, support)
	}
	var unsupported *plane.UnsupportedError
	if errors.As(err, &unsupported) {
		d.log.Error("images can't be streamed on this machine, they are pulled the ordinary way", "error", err)
		d.info.Plane.How, d.info.Plane.Reasons = "none: images are pulled the ordinary way", unsupported.Reasons
		return mount.NoPlane(err), nil
	}
	if err != nil {
		return nil, err
	}
	return d.plane, nil
}

// probe finds out what of the wanted this machine can do.
func (c *nodeConfig) probe() (plane.Support, error) {
	modes := plane.Modes()
	switch c.plane {
	case planeFUSE:
		modes = []plane.Mode{plane.FileBacked}
	case planeLoop:
		modes = []plane.Mode{plane.Loop}
	}
	s, err := plane.Probe(c.root, modes...)
	if errors.Is(err, plane.ErrNotProbed) {
		// A full disk mustn't cost the mounts that are there their content.
		s, err = plane.Probe(c.run, modes...)
	}
	return s, err
}

// openFUSE opens the FUSE plane in the mode that is supported.
func (d *daemon) openFUSE(ctx context.Context, support plane.Support) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find my own program, which keeps the FUSE connection: %w", err)
	}
	p, err := fuse.Open(ctx, fuse.Options{
		Dir: filepath.Join(d.config.run, "plane"), HolderCommand: []string{self, "node", "holder"}, Mode: support.Mode,
		ReadTimeout: d.config.read, Log: d.log,
	})
	if err != nil {
		return err
	}
	d.plane = p
	start := p.Start()
	d.info.Resumed, d.info.Reason = start.Resumed, start.Reason
	d.info.Plane = describeFUSE(support, start)
	if d.config.plane != planeAuto {
		d.info.Plane.Reasons = append(d.info.Plane.Reasons, "it was chosen by --plane")
	}
	return nil
}

// describeFUSE says how the FUSE plane gives images to the kernel, and what
// isn't as it could be.
func describeFUSE(support plane.Support, start fuse.Start) control.Plane {
	p := control.Plane{
		Name: planeFUSE, Kernel: support.Kernel, Reasons: slices.Clone(support.Reasons),
		How: "file-backed EROFS over FUSE; complete layers are read directly",
	}
	if support.Mode == plane.Loop {
		p.Name, p.How = planeLoop, "EROFS on loop devices over FUSE; complete layers by loop devices, too"
	}
	if !start.Resends {
		p.Reasons = append(p.Reasons, "reads that are under way when the daemon dies fail: asking for them again (FUSE_HAS_RESEND) needs Linux 6.9")
	}
	return p
}

// planeText is the line of the status.
func planeText(p control.Plane) string {
	if p.Kernel == "" {
		return p.How
	}
	return p.How + " (Linux " + p.Kernel + ")"
}

// lost is closed when the plane is of no use any more.
func (d *daemon) lost() <-chan struct{} {
	if d.plane == nil {
		return nil
	}
	return d.plane.Lost()
}
