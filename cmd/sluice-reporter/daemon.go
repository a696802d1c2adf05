package main

import (
	"context"
	"fmt"

	"sluice/internal/kube"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount/control"
)

// daemon is the machine's sluice node, as the reporter sees it.
type daemon struct{ client *control.Client }

var _ kube.Daemon = daemon{}

// Streams implements kube.Daemon.
func (d daemon) Streams(ctx context.Context) (string, error) {
	s, err := d.client.Status(ctx)
	switch {
	case err != nil:
		return "", err
	case s.Daemon.Plane.Name == "":
		return fmt.Sprintf("images can't be mounted: %v", s.Daemon.Plane.Reasons), nil
	case s.Switch.Off:
		return "streaming is switched off: " + s.Switch.Why, nil
	}
	return "", nil
}

// Follow implements kube.Daemon.
func (d daemon) Follow(ctx context.Context, after happening.Cursor, each func(happening.Event, uint64) error) error {
	lost := uint64(0)
	return d.client.Events(ctx, after.String(), true, func(h control.Happening) error {
		if h.Lost > 0 {
			lost += h.Lost
			return nil
		}
		err := each(h.Event, lost)
		lost = 0
		return err
	})
}

// SetStreaming implements kube.Daemon.
func (d daemon) SetStreaming(ctx context.Context, on bool, why string) error {
	return d.client.SetStreaming(ctx, on, why)
}
