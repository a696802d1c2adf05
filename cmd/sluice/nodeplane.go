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
	"sluice/internal/node/plane/fanotify"
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
	planeAuto     = "auto"
	planeFUSE     = "fuse"
	planeLoop     = "fuse-loop"
	planeFanotify = "fanotify"
)

func planeNames() []string { return []string{planeAuto, planeFUSE, planeLoop, planeFanotify} }

func (c *nodeConfig) registerPlane(f *pflag.FlagSet) {
	f.StringVar(&c.plane, "plane", planeAuto, "`HOW` the kernel gets content: fuse (Linux 6.12),\nfuse-loop (6.4: a loop device for each layer),\nfanotify (6.15; nothing in the way of complete\nlayers, but if daemon and holder are killed at\nonce, reads show zeros: docs/decisions/0009),\nor auto: fuse or fuse-loop, what this machine can")
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
		if d.self, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("find my own program, which is the holder, too: %w", err)
		}
		err = d.openSupported(ctx, support)
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

// The directories of the planes' state, beneath that of the sockets.
func (c *nodeConfig) fuseDir() string     { return filepath.Join(c.run, "plane") }
func (c *nodeConfig) fanotifyDir() string { return filepath.Join(c.run, "fanotify") }

// openSupported opens the plane that is wanted, FUSE if this machine can't have
// the other. But a plane that has images at the daemon's start stays: containers
// read through it.
func (d *daemon) openSupported(ctx context.Context, support plane.Support) error {
	// State that can't be read has no images; opening the plane says why.
	ofFUSE, fuseKnown, _ := fuse.Mounted(d.config.fuseDir())
	ofFanotify, fanotifyKnown, _ := fanotify.Mounted(d.config.fanotifyDir())
	wanted := d.config.plane == planeFanotify
	use := wanted && ofFUSE == 0 || ofFanotify > 0
	var reasons []string
	if use != wanted {
		reasons = append(reasons, fmt.Sprintf("--plane=%s has to wait: %d mounted images of the other plane are in use; it's looked at when the daemon starts", d.config.plane, ofFUSE+ofFanotify))
	}
	if use {
		err := d.openFanotify(ctx, support)
		var unsupported *plane.UnsupportedError
		if !errors.As(err, &unsupported) {
			d.info.Plane.Reasons = append(d.info.Plane.Reasons, reasons...)
			if err == nil && fuseKnown {
				d.retire(ctx, "FUSE", func() (servedPlane, error) { return fuse.Open(ctx, d.fuseOptions(support)) })
			}
			return err
		}
		d.log.Warn("the fanotify plane isn't possible on this machine, FUSE is used", "error", err)
		reasons = append(reasons, unsupported.Reasons...)
		fanotifyKnown = false // it can't be opened to be taken down
	}
	if err := d.openFUSE(ctx, support); err != nil {
		return err
	}
	d.info.Plane.Reasons = append(d.info.Plane.Reasons, reasons...)
	// After a reboot there's no state, but files are left.
	if files, _ := os.ReadDir(d.fanotifyOptions().Files); fanotifyKnown || len(files) > 0 {
		d.retire(ctx, "fanotify", func() (servedPlane, error) { return fanotify.Open(ctx, d.fanotifyOptions()) })
	}
	return nil
}

// retire ends a plane that was used before and has no images any more: its
// holder, its mount.
func (d *daemon) retire(ctx context.Context, name string, open func() (servedPlane, error)) {
	p, err := open()
	if err == nil {
		if err = p.Shutdown(ctx); err != nil {
			err = errors.Join(err, p.Close())
		}
	}
	if err != nil {
		d.log.Warn("what the plane that was used before left can't be taken down", "plane", name, "error", err)
	}
}

func (d *daemon) fanotifyOptions() fanotify.Options {
	return fanotify.Options{
		Dir: d.config.fanotifyDir(), Files: filepath.Join(d.config.root, "fanotify"),
		HolderCommand: []string{d.self, "node", "holder", "--plane=" + planeFanotify}, ReadTimeout: d.config.read, Log: d.log,
	}
}

func (d *daemon) fuseOptions(support plane.Support) fuse.Options {
	return fuse.Options{
		Dir: d.config.fuseDir(), HolderCommand: []string{d.self, "node", "holder"}, Mode: support.Mode,
		ReadTimeout: d.config.read, Log: d.log,
	}
}

// openFanotify opens the fanotify plane.
func (d *daemon) openFanotify(ctx context.Context, support plane.Support) error {
	if support.Mode != plane.FileBacked {
		return &plane.UnsupportedError{Reasons: support.Reasons}
	}
	p, err := fanotify.Open(ctx, d.fanotifyOptions())
	if err != nil {
		return err
	}
	d.plane = p
	start := p.Start()
	d.info.Resumed, d.info.Reason = start.Resumed, start.Reason
	d.info.Plane = control.Plane{
		Name: planeFanotify, Kernel: support.Kernel,
		How: "file-backed EROFS on sparse files that fanotify fills; complete layers are read directly",
	}
	return nil
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
	p, err := fuse.Open(ctx, d.fuseOptions(support))
	if err != nil {
		return err
	}
	d.plane = p
	start := p.Start()
	d.info.Resumed, d.info.Reason = start.Resumed, start.Reason
	d.info.Plane = describeFUSE(support, start)
	if d.config.plane == planeFUSE || d.config.plane == planeLoop {
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
