package fuse_test

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
	"path/filepath"
	"slices"
	"testing"
	"time"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/plane/planetest"
)

// daemonSpec is what a daemon process of the tests is to serve.
type daemonSpec struct {
	Dir      string // of the plane
	Images   []daemonImage
	MaxDelay time.Duration // of each read of content
	DirectIO bool
	Mode     plane.Mode
	// NoResend: as on a kernel before 6.9.
	NoResend bool
	// OrphanGrace as in fuse.Options.
	OrphanGrace time.Duration
}

type daemonImage struct {
	Dir, Metadata string
	Seeds         []uint64
	Sizes         []int64
}

// delayed is content with a random latency.
type delayed struct {
	pattern planetest.Pattern
	max     time.Duration
}

func (d delayed) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if d.max > 0 {
		time.Sleep(rand.N(d.max))
	}
	return d.pattern.ReadAt(ctx, p, off)
}

func (s daemonSpec) image(i int) plane.Image {
	img := plane.Image{Metadata: s.Images[i].Metadata}
	for j, seed := range s.Images[i].Seeds {
		img.Devices = append(img.Devices, plane.Device{
			Name: fmt.Sprintf("test-%016x", seed), Size: s.Images[i].Sizes[j],
			Content: delayed{planetest.Pattern(seed), s.MaxDelay},
		})
	}
	return img
}

const specVariable = "SLUICE_TEST_SPEC"

// runDaemon serves until its standard input ends. It says "ready", with how it
// started, on standard output.
func runDaemon() {
	if err := serveSpec(); err != nil {
		fmt.Fprintln(os.Stderr, "daemon:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serveSpec() error {
	var spec daemonSpec
	if err := json.Unmarshal([]byte(os.Getenv(specVariable)), &spec); err != nil {
		return err
	}
	ctx := context.Background()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	options := fuse.Options{
		Dir: spec.Dir, HolderCommand: holderCommand(), DirectIO: spec.DirectIO, Mode: spec.Mode, OrphanGrace: spec.OrphanGrace, Log: log,
	}
	if spec.NoResend {
		options = options.WithoutResend()
	}
	p, err := fuse.Open(ctx, options)
	if err != nil {
		return err
	}
	for i, img := range spec.Images {
		err := p.Adopt(ctx, spec.image(i), img.Dir)
		if errors.Is(err, plane.ErrNotAttached) || errors.Is(err, plane.ErrStale) {
			err = p.Attach(ctx, spec.image(i), img.Dir)
		}
		if err != nil {
			return err
		}
	}
	p.Ready()
	start, err := json.Marshal(p.Start())
	if err != nil {
		return err
	}
	fmt.Printf("ready %s\n", start)
	io.Copy(io.Discard, os.Stdin)
	return p.Close()
}

// daemon is a running process of the tests.
type daemon struct {
	cmd   *exec.Cmd
	stdin io.Closer
	out   *bufio.Reader
}

func startDaemon(t *testing.T, spec daemonSpec) *daemon {
	t.Helper()
	text, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{cmd: exec.Command(self())}
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

// ready waits until d serves and returns how it started.
func (d *daemon) ready(t *testing.T) fuse.Start {
	t.Helper()
	line, err := d.out.ReadString('\n')
	if err != nil {
		t.Fatalf("the daemon did not become ready: %v", err)
	}
	var start fuse.Start
	if _, err := fmt.Sscanf(line, "ready %s", new(string)); err != nil {
		t.Fatalf("the daemon said %q", line)
	}
	if err := json.Unmarshal([]byte(line[len("ready "):]), &start); err != nil {
		t.Fatal(err)
	}
	return start
}

// kill ends d with SIGKILL.
func (d *daemon) kill() {
	d.cmd.Process.Kill()
	d.stdin.Close()
	d.cmd.Wait()
}

// cleanSpec takes down what daemons of spec left: mounts, the holder. An unmount
// waits for readahead that is under way, so somebody has to answer it.
func cleanSpec(t *testing.T, spec daemonSpec) {
	p, err := fuse.Open(context.Background(), fuse.Options{Dir: spec.Dir, HolderCommand: holderCommand(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Errorf("clean up: %v", err)
		for _, img := range spec.Images {
			plane.Unmount(img.Dir, true)
		}
		plane.Unmount(filepath.Join(spec.Dir, "blobs"), true)
		return
	}
	p.Ready()
	for _, img := range spec.Images {
		if err := p.Detach(context.Background(), img.Dir); err != nil && !errors.Is(err, plane.ErrNotAttached) {
			t.Errorf("clean up: %v", err)
			plane.Unmount(img.Dir, true)
		}
	}
	if err := p.Shutdown(context.Background()); err != nil {
		t.Errorf("clean up: %v", err)
	}
}

// holderPID finds the holder by its lock on dir's socket, 0 if there is none.
// hasFUSE reports whether a process has a descriptor of /dev/fuse.
func hasFUSE(pid int) bool {
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	return slices.ContainsFunc(fds, func(fd string) bool {
		target, err := os.Readlink(fd)
		return err == nil && target == "/dev/fuse"
	})
}

func holderPID(t *testing.T, dir string) int {
	t.Helper()
	pid, err := planetest.HolderPID(dir)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}
