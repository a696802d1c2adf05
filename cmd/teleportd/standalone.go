package main

import (
	"context"
	"errors"
	"time"

	"sluice/internal/node/endpoint"
)

// serveStandalone answers control clients, until there's nothing mounted for a
// while.
func (d *daemon) serveStandalone(ctx context.Context) error {
	d.images.Settled()
	idle, err := endpoint.ServeWhileUsed(ctx, controlSocket(d.config.run), d.handler(), func() (bool, error) {
		return !d.control.Idle(), d.isLost()
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

// isLost is errLost once the plane is of no use any more.
func (d *daemon) isLost() error {
	select {
	case <-d.lost():
		return errLost
	default:
		return nil
	}
}
