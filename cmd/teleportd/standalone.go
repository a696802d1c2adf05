package main

import (
	"context"
	"errors"
	"os"
	"time"

	"sluice/internal/node/endpoint"
)

// idleTime is how long a standalone daemon stays without a mount.
const idleTime = 5 * time.Second

// serveStandalone answers control clients, until there's nothing mounted for a
// while.
func (d *daemon) serveStandalone(ctx context.Context) error {
	d.images.Settled()
	for {
		l, err := endpoint.Listen(controlSocket(d.config.run))
		if err != nil {
			return err
		}
		serving, stop := context.WithCancel(ctx)
		served := make(chan error, 1)
		go func() { served <- endpoint.Serve(serving, l, d.handler()) }()
		err = d.waitIdle(ctx)
		// Requests that came meanwhile are still answered.
		stop()
		if err := errors.Join(err, <-served); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil // mounts stay
		}
		if d.control.Idle() {
			break
		}
	}
	if err := os.Remove(controlSocket(d.config.run)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if d.plane == nil {
		return nil
	}
	d.control.Close()
	d.control = nil
	d.images.Sweep(ctx, time.Now().Add(time.Hour)) // what lingers goes, too
	err := d.images.Close()
	d.images = nil
	// The holder goes too: nothing of this daemon is left but its files.
	err = errors.Join(err, d.plane.Shutdown(ctx))
	d.plane = nil
	return err
}

// waitIdle returns when nothing has been mounted for a while, or ctx ends.
func (d *daemon) waitIdle(ctx context.Context) error {
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.lost():
			return errLost
		case <-tick.C:
			if !d.control.Idle() {
				last = time.Now()
			} else if time.Since(last) > idleTime {
				return nil
			}
		}
	}
}
