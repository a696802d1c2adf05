package bed

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// ColdStart is one cold start of a container, measured: the pull of an image that
// the node has never seen, and the run up to the first output.
type ColdStart struct {
	Pull        time.Duration
	FirstOutput time.Duration // of the run, after the pull
	Bytes       int64         // that crossed the link from the registry up to the end of the run
	Connections int64         // made over the link meanwhile
	Mounts      int           // made for this container, on the node
	Output      string
}

// Total is what a person waits for.
func (c ColdStart) Total() time.Duration { return c.Pull + c.FirstOutput }

// Cold starts a fresh node in a new directory below work, pulls ref over link
// with the snapshotter, runs command in a container and takes the node down.
func Cold(ctx context.Context, t Tools, sluice, work string, link *Link, snapshotter, ref string, command ...string) (ColdStart, error) {
	dir, err := os.MkdirTemp(work, "node-")
	if err != nil {
		return ColdStart{}, err
	}
	defer os.RemoveAll(dir)
	// What comes for later, after a few seconds, isn't the start's, however slow the
	// machine is.
	n, err := StartNode(ctx, t, sluice, dir, "--no-fill")
	if err != nil {
		return ColdStart{}, err
	}
	return n.coldOnce(ctx, link, snapshotter, ref, command)
}

// ColdStargz is Cold with the peer's snapshotter.
func ColdStargz(ctx context.Context, t Tools, stargz StargzTools, work string, link *Link, ref string, command ...string) (ColdStart, error) {
	dir, err := os.MkdirTemp(work, "node-")
	if err != nil {
		return ColdStart{}, err
	}
	defer os.RemoveAll(dir)
	n, err := StartStargzNode(ctx, t, stargz, link.Addr(), dir)
	if err != nil {
		return ColdStart{}, err
	}
	return n.coldOnce(ctx, link, Stargz, ref, command)
}

// coldOnce measures one cold start and takes the node down.
func (n *Node) coldOnce(ctx context.Context, link *Link, snapshotter, ref string, command []string) (ColdStart, error) {
	c, err := n.cold(ctx, link, snapshotter, ref, command)
	if stopErr := n.Stop(); err == nil {
		err = stopErr
	}
	return c, err
}

func (n *Node) cold(ctx context.Context, link *Link, snapshotter, ref string, command []string) (ColdStart, error) {
	if err := DropCaches(); err != nil {
		return ColdStart{}, err
	}
	mounts, err := Mounts(n.Dir)
	if err != nil {
		return ColdStart{}, err
	}
	before := link.Stats()
	start := time.Now()
	if err := n.Pull(ctx, snapshotter, ref); err != nil {
		return ColdStart{}, err
	}
	c := ColdStart{Pull: time.Since(start)}
	// The runtime's names are the machine's, not the node's.
	ran, err := n.RunToOutput(ctx, snapshotter, ref, filepath.Base(n.Dir), command...)
	if err != nil {
		return c, fmt.Errorf("%s: %w", snapshotter, err)
	}
	after := link.Stats()
	c.FirstOutput, c.Output = ran.FirstOutput, ran.Output
	c.Bytes, c.Connections = after.Down-before.Down, after.Connections-before.Connections
	c.Mounts = ran.Mounts - len(mounts)
	return c, nil
}
