package planetest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"sluice/internal/node/plane"
)

// Roles are what the test binary is besides, each as a process of its own that
// can be killed.
type Roles struct {
	// Holder keeps what connects mounts with their daemon.
	Holder func(ctx context.Context, socket string) error
	// Open opens the plane in a directory. options are those of DaemonSpec.
	Open func(ctx context.Context, dir string, options json.RawMessage, log *slog.Logger) (Served, Start, error)
}

// Start is how a plane found things when it was opened.
type Start struct {
	Resumed bool
	Stale   []string
}

// Served is a plane that a process serves and that outlives it.
type Served interface {
	plane.Plane
	Shutdown(context.Context) error
}

const (
	roleVariable = "SLUICE_PLANETEST_ROLE"
	specVariable = "SLUICE_PLANETEST_SPEC"
)

// Main is TestMain of a package that tests a plane which outlives its process.
func Main(m *testing.M, roles Roles) {
	Child()
	var err error
	switch os.Getenv(roleVariable) {
	case "":
		os.Exit(m.Run())
	case "holder":
		err = roles.Holder(context.Background(), os.Args[len(os.Args)-1])
	case "daemon":
		err = serveSpec(roles)
	case "readers":
		err = readSpec()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// self is this test binary.
func self() string {
	name, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return name
}

// HolderCommand runs this test binary as a holder.
func HolderCommand() []string {
	return []string{"/usr/bin/env", roleVariable + "=holder", self()}
}

// DaemonSpec is what a daemon process of the tests is to serve.
type DaemonSpec struct {
	Dir      string          // of the plane
	Options  json.RawMessage // of the plane, for Roles.Open
	Image    DaemonImage
	MaxDelay time.Duration // of each read of content
}

// DaemonImage is an image of devices with the patterns Seeds.
type DaemonImage struct {
	Dir, Metadata string
	Seeds         []uint64
	Sizes         []int64
}

// delayed is content with a random latency.
type delayed struct {
	pattern Pattern
	max     time.Duration
}

func (d delayed) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if d.max > 0 {
		time.Sleep(rand.N(d.max))
	}
	return d.pattern.ReadAt(ctx, p, off)
}

func (s DaemonSpec) image() plane.Image {
	img := plane.Image{Metadata: s.Image.Metadata}
	for i, seed := range s.Image.Seeds {
		img.Devices = append(img.Devices, plane.Device{
			Name: fmt.Sprintf("test-%016x", seed), Size: s.Image.Sizes[i],
			Content: delayed{Pattern(seed), s.MaxDelay},
		})
	}
	return img
}

// serveSpec serves until the standard input ends. When it is ready it says how
// it started on standard output.
func serveSpec(roles Roles) error {
	var spec DaemonSpec
	if err := json.Unmarshal([]byte(os.Getenv(specVariable)), &spec); err != nil {
		return err
	}
	ctx := context.Background()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	p, start, err := roles.Open(ctx, spec.Dir, spec.Options, log)
	if err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	err = p.Adopt(ctx, spec.image(), spec.Image.Dir)
	if errors.Is(err, plane.ErrNotAttached) || errors.Is(err, plane.ErrStale) {
		err = p.Attach(ctx, spec.image(), spec.Image.Dir)
	}
	if err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	p.Ready()
	text, err := json.Marshal(start)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n", text)
	io.Copy(io.Discard, os.Stdin)
	return p.Close()
}

// Daemon is a running process of the tests.
type Daemon struct {
	cmd   *exec.Cmd
	stdin io.Closer
	out   *bufio.Reader
}

// StartDaemon starts a process that serves spec.
func StartDaemon(t *testing.T, spec DaemonSpec) *Daemon {
	t.Helper()
	text, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	d := &Daemon{cmd: exec.Command(self())}
	d.cmd.Env = append(os.Environ(), roleVariable+"=daemon", specVariable+"="+string(text))
	d.cmd.Stderr = os.Stderr
	if d.stdin, err = d.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	d.out = bufio.NewReader(out)
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return d
}

// Ready waits until d serves and returns how it started.
func (d *Daemon) Ready(t *testing.T) (start Start) {
	t.Helper()
	line, err := d.out.ReadString('\n')
	if err != nil {
		t.Fatalf("the daemon did not become ready: %v", err)
	}
	if err := json.Unmarshal([]byte(line), &start); err != nil {
		t.Fatalf("the daemon said %q", line)
	}
	return start
}

// Process is d's process.
func (d *Daemon) Process() *os.Process { return d.cmd.Process }

// Kill ends d with SIGKILL.
func (d *Daemon) Kill() {
	d.cmd.Process.Kill()
	d.stdin.Close()
	d.cmd.Wait()
}

// Clean takes down what daemons of spec left: mounts, the holder. An unmount
// waits for readahead that is under way, so somebody has to answer it.
func (s DaemonSpec) Clean(t *testing.T, roles Roles) {
	p, _, err := roles.Open(context.Background(), s.Dir, s.Options, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Errorf("clean up: %v", err)
		plane.Unmount(s.Image.Dir, true)
		return
	}
	p.Ready()
	if err := p.Detach(context.Background(), s.Image.Dir); err != nil && !errors.Is(err, plane.ErrNotAttached) {
		t.Errorf("clean up: %v", err)
		plane.Unmount(s.Image.Dir, true)
	}
	if err := Shutdown(p, s.Dir); err != nil {
		t.Errorf("clean up: %v", err)
	}
}
