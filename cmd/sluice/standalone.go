package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"sluice/internal/node/endpoint"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/serve"
)

// serveStandalone answers control clients, until there's nothing mounted for a
// while.
func (d *daemon) serveStandalone(ctx context.Context) error {
	d.images.Settled()
	idle, err := endpoint.ServeWhileUsed(ctx, serve.Control(d.config.run), d.controlHandler(), func() (bool, error) {
		return len(d.images.Claims()) > 0, serve.Lost(d.lost())
	})
	if err != nil || !idle { // mounts stay
		return err
	}
	d.images.SweepMounts(ctx, time.Now().Add(time.Hour))
	if d.plane == nil {
		return nil
	}
	err = d.images.Close()
	d.images = nil
	// The holder goes too: nothing of this daemon is left but its files.
	err = errors.Join(err, d.plane.Shutdown(ctx))
	d.plane = nil
	return err
}

// connect returns a client of the machine's node daemon, or of a standalone
// one, which it starts if need be. With a root, only of the one there.
func connect(ctx context.Context, f daemonFlags, plainHTTP []string) (*control.Client, error) {
	if os.Geteuid() != 0 {
		return nil, errNotRoot
	}
	root := f.root
	if root == "" {
		client := control.NewClient(serve.Control(f.sockets(nodeRoot)))
		_, err := client.Status(ctx)
		if !errors.Is(err, control.ErrNoDaemon) {
			return client, err
		}
		root = standaloneRoot
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	run := f.sockets(root)
	client := control.NewClient(serve.Control(run))
	if _, err := client.Status(ctx); !errors.Is(err, control.ErrNoDaemon) {
		return client, err
	}
	if err := startStandalone(ctx, client, root, run, plainHTTP); err != nil {
		return nil, fmt.Errorf("start a daemon for %s: %w", root, err)
	}
	return client, nil
}

// startStandalone starts a daemon in the background and waits until it
// answers.
func startStandalone(ctx context.Context, client *control.Client, root, run string, plainHTTP []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(root, 0o711); err != nil {
		return err
	}
	args := []string{"node", "--standalone", "--root", root, "--run", run}
	for _, host := range plainHTTP {
		args = append(args, "--plain-http", host)
	}
	return endpoint.Start(ctx, filepath.Join(root, "daemon.log"), self, args, func(ctx context.Context) error {
		_, err := client.Status(ctx)
		return err
	})
}
