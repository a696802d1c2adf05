package main

import (
	"context"
	"errors"
	"fmt"

	"sluice/internal/kube"
	teleport "sluice/internal/node/disks/control"
	"sluice/internal/node/happening"
	"sluice/internal/node/happening/feed"
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
	return d.client.Events(ctx, after.String(), true, counting(each))
}

// counting calls each with the events of a stream, and how many were lost before.
func counting(each func(happening.Event, uint64) error) func(feed.Line) error {
	lost := uint64(0)
	return func(l feed.Line) error {
		if l.Lost > 0 {
			lost += l.Lost
			return nil
		}
		err := each(l.Event, lost)
		lost = 0
		return err
	}
}

// SetStreaming implements kube.Daemon.
func (d daemon) SetStreaming(ctx context.Context, on bool, why string) error {
	return d.client.SetStreaming(ctx, on, why)
}

// teleportDaemon is the machine's teleportd, as the reporter sees it.
type teleportDaemon struct{ client *teleport.Client }

var _ kube.Daemon = teleportDaemon{}

// Streams implements kube.Daemon.
func (d teleportDaemon) Streams(ctx context.Context) (string, error) {
	s, err := d.client.Status(ctx)
	switch {
	case err != nil:
		return "", err
	case len(s.Daemon.Unusable) > 0:
		return fmt.Sprintf("disks can't be mounted: %v", s.Daemon.Unusable), nil
	}
	return "", nil
}

// Follow implements kube.Daemon.
func (d teleportDaemon) Follow(ctx context.Context, after happening.Cursor, each func(happening.Event, uint64) error) error {
	return d.client.Events(ctx, after.String(), true, counting(each))
}

// SetStreaming implements kube.Daemon: teleportd is always on.
func (d teleportDaemon) SetStreaming(_ context.Context, on bool, _ string) error {
	if !on {
		return errors.New("teleportd can't be switched off by a label of the node")
	}
	return nil
}
