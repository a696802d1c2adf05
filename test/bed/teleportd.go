package bed

import (
	"context"
	"os"
)

// BuildTeleportd builds teleportd into dir and returns its path.
func BuildTeleportd(ctx context.Context, src, dir string) (string, error) {
	return buildCommand(ctx, src, dir, "teleportd")
}

// NewTeleportNode returns a node with teleportd and its state in dir, which must not
// lie on overlayfs; nothing runs yet. flags are further ones of teleportd.
func NewTeleportNode(t Tools, teleportd, dir string, flags ...string) (*Node, error) {
	return &Node{Dir: dir, tools: t, teleportd: teleportd, flags: flags}, os.MkdirAll(dir, 0o711)
}

// StartTeleportNode is StartNode with teleportd.
func StartTeleportNode(ctx context.Context, t Tools, teleportd, dir string) (*Node, error) {
	n, err := NewTeleportNode(t, teleportd, dir)
	if err != nil {
		return nil, err
	}
	if err := n.StartTeleportd(ctx); err != nil {
		return nil, err
	}
	return n, n.finish(ctx)
}

// StartTeleportd starts teleportd, again after it was stopped or killed.
func (n *Node) StartTeleportd(ctx context.Context) error {
	args := append(n.nodeArgs(), "--cache-free", "0") // however full the disk of this machine is
	p, err := Start(n.Dir, "teleportd", nil, n.teleportd, append(args, n.flags...)...)
	if err != nil {
		return err
	}
	if err := p.AwaitSocket(ctx, "unix", n.socket()); err != nil {
		p.Kill()
		return err
	}
	n.Teleportd = p
	return nil
}

// ColdTeleport is Cold with teleportd.
func ColdTeleport(ctx context.Context, t Tools, teleportd, work string, link *Link, ref string, command ...string) (ColdStart, error) {
	dir, err := os.MkdirTemp(work, "node-")
	if err != nil {
		return ColdStart{}, err
	}
	defer os.RemoveAll(dir)
	n, err := StartTeleportNode(ctx, t, teleportd, dir)
	if err != nil {
		return ColdStart{}, err
	}
	return n.coldOnce(ctx, link, Teleportd, ref, command)
}

// BuildOrca builds orca into dir and returns its path.
func BuildOrca(ctx context.Context, src, dir string) (string, error) {
	return buildCommand(ctx, src, dir, "orca")
}
