// Package run runs the process of an image with runc, on a root file system
// that streams: an overlayfs of the image's mount, or of its layers' mounts, and
// a directory for what the process writes, which is thrown away.
//
// It is a container runtime's smallest part and no more: the host's network, no
// resource limits, no volumes. Its uses are `sluice run` and `orca run`, which
// start an image on a machine without containerd.
//
// Run does it all; spec.go makes the OCI runtime configuration from the image's
// config, user.go finds out who the process runs as.
package run

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
	"sluice/oci"
)

// Container is a process to run.
type Container struct {
	// Rootfs are the directories whose stack, the topmost first, is the
	// image's root file system: one, or one a layer with overlayfs's
	// whiteouts. They stay as they are.
	Rootfs []string

	// Config is the image's config. Args, unless empty, replace its Cmd; Env
	// elements "KEY=VALUE" replace its variables of the same name.
	Config oci.ImageConfig
	Args   []string
	Env    []string

	// Terminal gives the process a terminal. Stdin must be one.
	Terminal bool

	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// Options says how to run.
type Options struct {
	// Dir is a directory for what belongs to running containers, made if
	// need be, on a file system that overlayfs can write to. What killed
	// processes left in it is cleared away.
	Dir string

	// Runc is the program, an OCI runtime with runc's command line; default
	// "runc" from PATH.
	Runc string

	// Patience is how long the process has to end when ctx does, before it's
	// killed; default 10 s.
	Patience time.Duration

	// Starting, if not nil, is called when the container is made, before its
	// process is started.
	Starting func()

	// Log receives what went wrong in clearing up. Nil discards it.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.Runc == "" {
		o.Runc = "runc"
	}
	if o.Patience <= 0 {
		o.Patience = 10 * time.Second
	}
	if o.Starting == nil {
		o.Starting = func() {}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// The exit codes of processes that couldn't be started are docker's and the
// shell's.
const (
	CodeFailed      = 125 // the runtime failed
	CodeNotRunnable = 126 // the command can't be executed
	CodeNotFound    = 127 // there's no such command
)

// Run runs c until its process ends and returns the process's exit code, as a
// shell counts: 128 plus the number for a signal, and one of the codes above if
// the runtime couldn't start it, which has then said why on Stderr. When ctx
// ends the process gets SIGTERM. Nothing of the container is left when Run
// returns.
//
// The error is about the container, not of what runs in it.
func Run(ctx context.Context, c Container, opts Options) (code int, err error) {
	opts = opts.withDefaults()
	runc, err := exec.LookPath(opts.Runc)
	if err != nil {
		return 0, fmt.Errorf("find the OCI runtime: %w", err)
	}
	if err := os.MkdirAll(opts.Dir, 0o700); err != nil {
		return 0, err
	}
	sweep(opts, runc)
	b, err := newBundle(opts.Dir, runc)
	if err != nil {
		return 0, fmt.Errorf("prepare a container: %w", err)
	}
	defer func() { err = errors.Join(err, b.remove()) }()
	if err := plane.MountOverlay(c.Rootfs, b.dir, b.rootfs()); err != nil {
		return 0, fmt.Errorf("prepare a container: %w", err)
	}
	spec, err := newSpec(c, b.id, b.rootfs())
	if err != nil {
		return 0, fmt.Errorf("prepare a container: %w", err)
	}
	content, err := json.MarshalIndent(spec, "", " ")
	if err != nil {
		return 0, err
	}
	if err := os.WriteFile(filepath.Join(b.dir, "config.json"), content, 0o600); err != nil {
		return 0, err
	}
	opts.Starting()
	return b.run(ctx, c, opts)
}

// bundle is a container's directory:
//
//	lock         held by the process that runs it
//	config.json  the runtime's configuration
//	upper, work  what the container writes
//	rootfs       where it is mounted
//	state        the runtime's own state
//	log.json     the runtime's log
type bundle struct {
	id, dir, runc string
	lock          *os.File
}

const bundlePrefix = "run-"

func newBundle(dir, runc string) (*bundle, error) {
	var b *bundle
	err := alone(dir, func() error {
		path, err := os.MkdirTemp(dir, bundlePrefix)
		if err != nil {
			return err
		}
		b = &bundle{id: "sluice-" + strings.TrimPrefix(filepath.Base(path), bundlePrefix), dir: path, runc: runc}
		if err := b.take(); err != nil {
			return errors.Join(err, os.RemoveAll(path))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, d := range []string{"rootfs", "state"} {
		if err := os.Mkdir(filepath.Join(b.dir, d), 0o755); err != nil {
			return nil, errors.Join(err, b.remove())
		}
	}
	return b, nil
}

// alone does something while no other process makes a bundle in dir, or takes one: a
// new one has its name before it's locked. It's to be quick.
func alone(dir string, do func() error) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", dir, err)
	}
	return do()
}

// take locks the bundle for this process.
func (b *bundle) take() error {
	f, err := os.OpenFile(filepath.Join(b.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return errors.Join(err, f.Close())
	}
	b.lock = f
	return nil
}

func (b *bundle) rootfs() string { return filepath.Join(b.dir, "rootfs") }

// run starts the runtime and waits for it.
func (b *bundle) run(ctx context.Context, c Container, opts Options) (int, error) {
	cmd := exec.CommandContext(ctx, b.runc, "--root", filepath.Join(b.dir, "state"),
		"--log", b.log(), "--log-format", "json", "run", "--bundle", b.dir, b.id)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Stdin, c.Stdout, c.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // runc passes it on
	cmd.WaitDelay = opts.Patience
	// Who is killed can't pass anything on: then the kernel does. It takes the end
	// of this thread for that of this process.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit):
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return 128 + int(status.Signal()), nil
		}
		if code := b.startFailure(); code != 0 {
			return code, nil
		}
		return exit.ExitCode(), nil
	case ctx.Err() != nil && cmd.ProcessState != nil:
		return 128 + int(syscall.SIGTERM), nil
	}
	return 0, fmt.Errorf("run %s: %w", b.runc, err)
}

func (b *bundle) log() string { return filepath.Join(b.dir, "log.json") }

// maxLog bounds what is read of the runtime's log.
const maxLog = 1 << 20

// startFailure returns the code of why the process didn't start, or 0 if it
// did: the runtime itself ends with 1 in both cases, but logs an error only in
// the former. Its texts are those that docker looks for, too.
func (b *bundle) startFailure() int {
	f, err := os.Open(b.log())
	if err != nil {
		return 0
	}
	defer f.Close()
	for d := json.NewDecoder(io.LimitReader(f, maxLog)); ; {
		var line struct{ Level, Msg string }
		if err := d.Decode(&line); err != nil {
			return 0
		}
		switch {
		case line.Level != "error":
		case strings.Contains(line.Msg, "executable file not found"), strings.Contains(line.Msg, "no such file or directory"):
			return CodeNotFound
		case strings.Contains(line.Msg, "permission denied"), strings.Contains(line.Msg, "exec format error"), strings.Contains(line.Msg, "is a directory"):
			return CodeNotRunnable
		default:
			return CodeFailed
		}
	}
}

// removeTimeout bounds how long the runtime may take to kill a container.
const removeTimeout = 30 * time.Second

// remove ends what is left of the container and removes its directory.
func (b *bundle) remove() error {
	ctx, cancel := context.WithTimeout(context.Background(), removeTimeout)
	defer cancel()
	var errs []error
	state := filepath.Join(b.dir, "state")
	if entries, err := os.ReadDir(state); err == nil && len(entries) > 0 {
		out, err := exec.CommandContext(ctx, b.runc, "--root", state, "delete", "--force", b.id).CombinedOutput()
		if err != nil {
			errs = append(errs, fmt.Errorf("delete container %s: %w: %.200s", b.id, err, out))
		}
	}
	for {
		// A process that couldn't be killed yet keeps its own view.
		err := unix.Unmount(b.rootfs(), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // nothing is mounted there, or any more
		}
		if err != nil {
			return errors.Join(append(errs, fmt.Errorf("unmount %s: %w", b.rootfs(), err))...)
		}
	}
	// What takes long first, and the lock's file last: others make it again, to look
	// whether somebody holds it.
	for _, name := range []string{"upper", "work", "rootfs", "state"} {
		errs = append(errs, os.RemoveAll(filepath.Join(b.dir, name)))
	}
	errs = append(errs, alone(filepath.Dir(b.dir), func() error { return os.RemoveAll(b.dir) }))
	if b.lock != nil {
		errs = append(errs, b.lock.Close())
	}
	return errors.Join(errs...)
}

// sweep removes what killed processes left.
func sweep(opts Options, runc string) {
	dirs, err := filepath.Glob(filepath.Join(opts.Dir, bundlePrefix+"*"))
	if err != nil {
		return // the pattern is ours
	}
	for _, dir := range dirs {
		b := &bundle{id: "sluice-" + strings.TrimPrefix(filepath.Base(dir), bundlePrefix), dir: dir, runc: runc}
		if alone(opts.Dir, b.take) != nil {
			continue // it runs
		}
		if err := b.remove(); err != nil {
			opts.Log.Warn("what an ended container left can't be removed", "directory", dir, "error", err)
		}
	}
}
