package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"sluice/internal/node/install"
	"sluice/internal/node/install/host"
	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/serve"
	"sluice/internal/node/snapshot"
)

// uninstallFlags are the flags of `sluice node uninstall`.
type uninstallFlags struct {
	daemonFlags
	containerd, snapshotter string
	force, dryRun           bool
	output                  string
	host, restart           string
	wait                    time.Duration
	found                   *install.Installation // that is to go; nil: none
}

// uninstalled is what sluice node uninstall removed, or with DryRun would.
type uninstalled struct {
	DryRun  bool  `json:"dry_run"`
	Daemons []int `json:"daemons"` // processes that were stopped
	snapshot.Withdrawn
	Users   []string `json:"users"`   // where images were mounted for somebody
	Removed []string `json:"removed"` // files and directories
	Kept    []string `json:"kept"`    // what lay in the directories and isn't sluice's
	// Installation is what sluice node install did, and its notes.
	Installation *install.Plan `json:"installation"`
}

func newNodeUninstallCommand() *cobra.Command {
	var f uninstallFlags
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove everything of sluice node, and leave plain containerd",
		Long: `Remove everything of sluice node, and leave plain containerd.

It stops the daemon, removes from containerd the images and snapshots that only
sluice could provide (containerd pulls them again when they're needed), unmounts
all images, and deletes the daemon's state and sockets. Then it takes away what
sluice node install did, gives back what was there before, and restarts
containerd. While containers or mounts of images are there it refuses and changes
nothing. It may be broken off, and run again.

With --wait it first makes containerd use the snapshotter that it had before, so
that new containers don't need sluice any more, and waits until those that do are
gone: drain the node, or restart their workloads.

What wasn't installed by sluice node install stays: disable such a service of the
daemon before, take sluice out of containerd's configuration afterwards, and
restart containerd.`,
		Example: `  sluice node uninstall --dry-run
  sluice node uninstall
  sluice node uninstall --wait=2h
  sluice node uninstall --host /host --wait   # in a privileged pod`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(f.output); err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errNotRoot
			}
			if f.host != "/" && host.Live(f.host) {
				return host.Enter(f.host, withoutHost(os.Args[1:]))
			}
			if err := f.installed(cmd.Flags()); err != nil {
				return err
			}
			u, err := uninstall(cmd.Context(), f, cmd.ErrOrStderr(), slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelError})))
			if err != nil {
				return err
			}
			if f.output == "json" {
				return printJSON(cmd.OutOrStdout(), u)
			}
			return printUninstalled(cmd.OutOrStdout(), u)
		},
	}
	cmd.Flags().StringVar(&f.root, "root", nodeRoot, "the daemon's state is in `DIR`; it and the next two are\nknown if sluice node install was used")
	cmd.Flags().StringVar(&f.run, "run", "", "`DIR` of the daemon's sockets (default: where the\ndaemon of --root says)")
	cmd.Flags().StringVar(&f.containerd, "containerd", "/run/containerd/containerd.sock", "containerd's `SOCKET`; empty if there's none\n")
	cmd.Flags().StringVar(&f.snapshotter, "snapshotter", "sluice", "`NAME` of the snapshotter in containerd's configuration\n")
	cmd.Flags().BoolVar(&f.force, "force", false, "kill and remove containers that use it, and take\nmounts away from who uses them")
	cmd.Flags().DurationVar(&f.wait, "wait", 0, "wait until containers that use it are gone, at most\n`TIME` (30m if none is given)")
	cmd.Flag("wait").NoOptDefVal = "30m"
	cmd.Flags().StringVar(&f.restart, "restart-command", "", "without systemd, restart containerd with the shell\n`COMMAND` (default: say that it must be restarted)")
	cmd.Flags().StringVar(&f.host, "host", "/", "the machine's file system is at `DIR`: in a pod with\nall privileges and hostPID")
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "only say what would be removed")
	registerOutput(cmd, &f.output)
	return cmd
}

// uninstall is all of it: look, wait, stop, withdraw, remove. The daemon of sluice
// mount, whose state is in a directory of the node's, goes too.
func uninstall(ctx context.Context, f uninstallFlags, progress io.Writer, log *slog.Logger) (uninstalled, error) {
	u := uninstalled{DryRun: f.dryRun, Daemons: []int{}, Users: []string{}, Removed: []string{}, Kept: []string{}}
	root, err := filepath.Abs(f.root)
	if err != nil {
		return u, err
	}
	u.Installation = &install.Plan{Changes: []install.Change{}, Restart: []install.Step{}, Notes: []string{}}
	if f.found != nil {
		if u.Installation, err = install.MakeRemoval(f.host); err != nil {
			return u, err
		}
	}
	if f.host != "/" { // nothing runs there
		if !f.dryRun {
			err = errors.Join(u.Installation.Remove(), install.Forget(f.host))
		}
		return u, err
	}
	c := nodeConfig{root: root, run: f.sockets(root), plane: planeAuto, disabled: true, noFill: true}
	nodes := []nodeConfig{c}
	if alone := filepath.Join(root, filepath.Base(standaloneRoot)); exists(alone) {
		s := c
		s.root, s.run = alone, runDir(alone)
		nodes = []nodeConfig{s, c}
	}
	pod, err := f.ownPod(ctx)
	if err != nil {
		return u, err
	}
	if u.Withdrawn, err = f.await(ctx, pod.UID, progress); err != nil {
		return u, err
	}
	if err := u.look(ctx, nodes, pod, f); err != nil || f.dryRun {
		return u, err
	}
	kubelet, err := f.releaseKubelet(ctx, u.Installation, progress)
	if err != nil {
		return u, err
	}
	if err := f.stopDaemons(ctx, u.Daemons); err != nil {
		return u, err
	}
	if f.containerd != "" && (exists(c.root) || len(u.Images) > 0) {
		if u.Withdrawn, err = c.withdraw(ctx, f, pod.UID, log); err != nil {
			return u, err
		}
	}
	for _, n := range nodes {
		if err := n.clear(ctx, f.force || pod.UID != "", log); err != nil {
			return u, err
		}
		if err := n.remove(); err != nil {
			return u, err
		}
	}
	return u, f.removeInstallation(ctx, u.Installation, kubelet)
}

// survey asks containerd who needs the snapshotter.
func survey(ctx context.Context, f uninstallFlags, pod string) (snapshot.Withdrawn, error) {
	if f.containerd == "" {
		return snapshot.Withdrawn{Containers: []string{}, Images: []string{}}, nil
	}
	w, err := snapshot.Survey(ctx, f.containerd, f.snapshotter, pod)
	if snapshot.Unavailable(err) {
		err = fmt.Errorf("%w: start it, say where it is with --containerd SOCKET, or, if it's gone for good, --containerd ''", err)
	}
	if err == nil && len(w.Containers) > 0 && !f.force {
		err = &snapshot.InUseError{Containers: w.Containers}
	}
	return w, err
}

// look finds what there is of the daemons, and refuses when somebody needs it.
func (u *uninstalled) look(ctx context.Context, nodes []nodeConfig, pod snapshot.Pod, f uninstallFlags) error {
	for _, c := range nodes {
		pid, err := control.NewClient(serve.Control(c.run)).Process(ctx)
		switch {
		case errors.Is(err, control.ErrNoDaemon):
		case err != nil:
			return err
		case pid == 0:
			return fmt.Errorf("the daemon at %s runs in a container: stop it there first", serve.Control(c.run))
		default:
			u.Daemons = append(u.Daemons, pid)
		}
		users, err := mount.Users(c.root)
		if err != nil {
			return err
		}
		for _, dir := range users {
			if !slices.ContainsFunc(pod.Containers, func(id string) bool { return strings.Contains(dir, id) }) {
				u.Users = append(u.Users, dir)
			}
		}
		for _, dir := range []struct {
			name string
			ours func(string) bool
		}{{c.run, oursInRun}, {c.root, oursInRoot}} {
			if err := u.sort(dir.name, dir.ours); err != nil {
				return err
			}
		}
	}
	if len(u.Users) > 0 && !f.force {
		return fmt.Errorf("images are still mounted at %s: unmount them (sluice umount), or give --force", strings.Join(u.Users, ", "))
	}
	return nil
}

// sort tells what in a directory is to be removed.
func (u *uninstalled) sort(dir string, ours func(string) bool) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if ours(e.Name()) {
			u.Removed = append(u.Removed, path)
		} else {
			u.Kept = append(u.Kept, path)
		}
	}
	return nil
}

// stopTime bounds how long a daemon may take to end.
const stopTime = 60 * time.Second

// stop asks a daemon to end and waits until it has.
func stop(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("daemon %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop daemon %d: %w", pid, err)
	}
	for end := time.Now().Add(stopTime); time.Now().Before(end) && ctx.Err() == nil; {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(fds, 250); err == nil && n > 0 {
			return nil
		}
	}
	return errors.Join(fmt.Errorf("daemon %d doesn't end: look at its log", pid), ctx.Err())
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

// printUninstalled prints for people what was removed.
func printUninstalled(out io.Writer, u uninstalled) error {
	var b strings.Builder
	list := func(what string, names []string) {
		if len(names) == 0 {
			return
		}
		fmt.Fprintln(&b, what)
		for _, name := range names {
			fmt.Fprintf(&b, "  %s\n", name)
		}
	}
	would := ""
	if u.DryRun {
		would = "would be "
	}
	for _, pid := range u.Daemons {
		fmt.Fprintf(&b, "the daemon, process %d, %sstopped\n", pid, would)
	}
	list("containers, "+would+"killed and removed:", u.Containers)
	list("images, "+would+"removed from containerd, which pulls them again when they're needed:", u.Images)
	if u.Snapshots > 0 {
		fmt.Fprintf(&b, "%s removed from containerd\n", plural(u.Snapshots, "snapshot"))
	}
	list("mounts, "+would+"taken away:", u.Users)
	list("files and directories, "+would+"removed:", u.Removed)
	list("not sluice's, stays:", u.Kept)
	p := u.Installation
	for _, c := range p.Changes {
		fmt.Fprintf(&b, "%s %s: %s\n", c.Action, c.Path, c.Why)
		if u.DryRun && c.Action == install.Edit {
			b.WriteString(c.Diff)
		}
	}
	for _, s := range p.Restart {
		fmt.Fprintf(&b, "%s, %sstarted anew\n", s, would)
	}
	for _, n := range p.Notes {
		fmt.Fprintf(&b, "note: %s\n", n)
	}
	switch {
	case b.Len() == 0:
		fmt.Fprintln(&b, "Nothing of sluice node is here.")
	case !u.DryRun && len(p.Changes) == 0:
		fmt.Fprintln(&b, "Take sluice out of containerd's configuration and restart containerd, if you didn't yet.")
	}
	_, err := io.WriteString(out, b.String())
	return err
}
