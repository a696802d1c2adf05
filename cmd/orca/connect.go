package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/spf13/cobra"

	"sluice/internal/node/disks/control"
	"sluice/internal/node/endpoint"
)

// Where daemons are: the machine's, and one that orca starts.
const (
	machineSocket  = "/run/teleportd/control.sock"
	standaloneRoot = "/var/lib/orca"
	standaloneRun  = "/run/orca"
)

// daemonFlags say which daemon to ask.
type daemonFlags struct {
	socket, root string
	plainHTTP    []string
}

func (f *daemonFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.socket, "socket", "", "use the teleportd that answers on `SOCKET` (default\n"+machineSocket+", or else one that is\nstarted for the time being)")
	cmd.Flags().StringVar(&f.root, "root", "", "use a teleportd with its state in `DIR`, and start it\nif need be (default, if the machine has none:\n"+standaloneRoot+")")
	cmd.Flags().StringArrayVar(&f.plainHTTP, "plain-http", nil, "speak HTTP without TLS with registry `HOST`; may be\nrepeated (loopback is by itself; a teleportd that runs\nalready keeps its own list)")
	cmd.MarkFlagsMutuallyExclusive("socket", "root")
}

// daemon is a daemon that answers.
type daemon struct {
	*control.Client
	socket string
	info   control.Info
}

// connect returns the daemon that the flags mean, and starts one if need be.
func (f *daemonFlags) connect(ctx context.Context) (*daemon, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("orca mounts file systems: run it as root, with sudo")
	}
	if f.socket != "" {
		return ask(ctx, f.socket)
	}
	root, run := f.root, standaloneRun
	if root == "" {
		d, err := ask(ctx, machineSocket)
		if !errors.Is(err, control.ErrNoDaemon) {
			return d, err
		}
		root = standaloneRoot
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	if root != standaloneRoot {
		sum := sha256.Sum256([]byte(root))
		run = filepath.Join(standaloneRun, fmt.Sprintf("root-%x", sum[:6]))
	}
	socket := filepath.Join(run, "control.sock")
	d, err := ask(ctx, socket)
	if !errors.Is(err, control.ErrNoDaemon) {
		return d, err
	}
	if d, err = start(ctx, socket, root, run, f.plainHTTP); err != nil {
		return nil, fmt.Errorf("start a teleportd with its state in %s: %w", root, err)
	}
	return d, nil
}

// ask returns the daemon at a socket, if it answers.
func ask(ctx context.Context, socket string) (*daemon, error) {
	d := &daemon{Client: control.NewClient(socket), socket: socket}
	status, err := d.Status(ctx)
	d.info = status.Daemon
	if err != nil {
		return nil, err
	}
	return d, nil
}

// findTeleportd returns the teleportd beside this program, or in PATH.
func findTeleportd() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if self, err = filepath.EvalSymlinks(self); err != nil {
		return "", err
	}
	beside := filepath.Join(filepath.Dir(self), "teleportd")
	if _, err := os.Stat(beside); err == nil {
		return beside, nil
	}
	path, err := exec.LookPath("teleportd")
	if err != nil {
		return "", fmt.Errorf("no teleportd in %s nor in PATH: install it there, or start it and name its --socket", filepath.Dir(self))
	}
	return path, nil
}

// start starts a daemon in the background, which ends by itself, and waits until
// it answers.
func start(ctx context.Context, socket, root, run string, plainHTTP []string) (*daemon, error) {
	path, err := findTeleportd()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(root, 0o711); err != nil {
		return nil, err
	}
	args := []string{"--standalone", "--root", root, "--run", run}
	for _, host := range plainHTTP {
		args = append(args, "--plain-http", host)
	}
	var d *daemon
	err = endpoint.Start(ctx, filepath.Join(root, "teleportd.log"), path, args, func(ctx context.Context) (err error) {
		d, err = ask(ctx, socket)
		return err
	})
	return d, err
}
