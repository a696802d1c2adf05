package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/durable"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/plane"
	"sluice/internal/node/serve"
	"sluice/internal/node/snapshot"
)

// oursInRoot and oursInRun say what in a daemon's directories is the daemon's.
// What else lies there is somebody's who shares them.
func oursInRoot(name string) bool {
	return slices.Contains([]string{"cache", "images", "m", "claims", "snapshots", "fanotify", "metadata.db", "daemon.log", filepath.Base(standaloneRoot), runLink}, name) ||
		durable.IsTemp(name) || strings.HasPrefix(name, ".probe-")
}

func oursInRun(name string) bool {
	return slices.Contains([]string{"plane", "fanotify", "control.sock", "snapshotter.sock", "cri.sock", "credentials.json"}, name) ||
		durable.IsTemp(name) || strings.HasPrefix(name, ".listen-")
}

// withdrawTime bounds how long containerd may take to notice that the
// snapshotter answers: it tries to connect every few seconds.
const withdrawTime = 30 * time.Second

// withdraw removes from containerd what needs the snapshotter, which runs in
// this process meanwhile.
func (c nodeConfig) withdraw(ctx context.Context, f uninstallFlags, pod string, log *slog.Logger) (w snapshot.Withdrawn, err error) {
	if err := c.makeDirs(); err != nil {
		return w, err
	}
	serving, end := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- runDaemon(serving, c, log) }()
	ended := false
	defer func() {
		end()
		if !ended {
			err = errors.Join(err, <-served)
		}
	}()
	client := control.NewClient(serve.Control(c.run))
	for limit := time.Now().Add(withdrawTime); ; {
		if _, err = client.Status(ctx); err == nil {
			w, err = snapshot.Withdraw(ctx, f.containerd, f.snapshotter, pod, f.force)
		}
		if err == nil || !errors.Is(err, control.ErrNoDaemon) && !snapshot.Unavailable(err) || time.Now().After(limit) {
			return w, err
		}
		select {
		case err := <-served:
			ended = true
			return w, fmt.Errorf("serve containerd for a last time (if a service manager has started sluice node again, disable that first): %w", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// clear unmounts all images and ends the plane with its holder.
func (c nodeConfig) clear(ctx context.Context, force bool, log *slog.Logger) (err error) {
	if !exists(c.root) && !exists(c.run) {
		return nil
	}
	if err := c.makeDirs(); err != nil {
		return err
	}
	d, err := openDaemon(ctx, c, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.images.Clear(ctx, force); err != nil {
		return fmt.Errorf("unmount the images: %w", err)
	}
	err = d.images.Close()
	d.images = nil
	if err != nil || d.plane == nil {
		return err
	}
	err = d.plane.Shutdown(ctx)
	if errors.Is(err, plane.ErrBusy) {
		// Copies of our mounts in namespaces that don't follow this one: they
		// are of processes that happened to be started meanwhile.
		if err = unmountBelow(c.run); err == nil {
			err = d.plane.Shutdown(ctx)
		}
	}
	if err == nil {
		d.plane = nil
	}
	return err
}

// unmountBelow takes all mounts below dir out of this namespace.
func unmountBelow(dir string) error {
	mounts, err := plane.MountsBelow(dir)
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) {
		if err := plane.Unmount(m, true); err != nil && !errors.Is(err, plane.ErrNotAttached) {
			return err
		}
	}
	return nil
}

// remove deletes what is the daemon's in its directories, and these if nothing
// else is in them. The link to the sockets goes last, so that who is broken off
// finds them again.
func (c nodeConfig) remove() error {
	for _, dir := range []string{c.run, c.root} {
		mounts, err := plane.MountsBelow(dir)
		if err != nil {
			return err
		}
		if len(mounts) > 0 {
			return fmt.Errorf("something is mounted at %s: unmount it; nothing is deleted", mounts[0])
		}
	}
	if err := removeOurs(c.run, oursInRun); err != nil {
		return err
	}
	notLink := func(name string) bool { return oursInRoot(name) && name != runLink }
	if err := removeOurs(c.root, notLink); err != nil {
		return err
	}
	return removeOurs(c.root, oursInRoot)
}

// removeOurs removes what is ours in dir, and dir if it's empty then.
func removeOurs(dir string, ours func(string) bool) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	left := 0
	for _, e := range entries {
		if !ours(e.Name()) {
			left++
		} else if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if left > 0 {
		return nil
	}
	// It may be a file system of its own, which stays.
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrExist) && !errors.Is(err, unix.EBUSY) {
		return err
	}
	return nil
}
