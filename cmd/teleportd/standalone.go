package main

import (
	"context"
	"errors"
	"time"

	"sluice/internal/node/endpoint"
	"sluice/internal/node/serve"
)

// serveStandalone answers control clients, until there's nothing mounted for a
// while.
func (d *daemon) serveStandalone(ctx context.Context) error {
	d.images.Settled()
	idle, err := endpoint.ServeWhileUsed(ctx, serve.Control(d.config.run), d.handler(), func() (bool, error) {
		return !d.control.Idle(), serve.Lost(d.lost())
	})
	if err != nil || !idle { // mounts stay
		return err
	}
	if d.plane == nil {
		return nil
	}
	d.control.Close()
	d.control = nil
	d.images.Sweep(ctx, time.Now().Add(time.Hour)) // what lingers goes, too
	err = d.images.Close()
	d.images = nil
	// The holder goes too: nothing of this daemon is left but its files.
	err = errors.Join(err, d.plane.Shutdown(ctx))
	d.plane = nil
	return err
}
