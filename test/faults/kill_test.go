package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sluice/test/bed"
)

// victim is what is killed.
type victim struct {
	name string
	kill func(t *testing.T, n *node)
	// revive starts it again, as systemd would.
	revive func(ctx context.Context, n *node) error
}

func victims() []victim {
	daemon := func(t *testing.T, n *node) { n.Sluice.Kill() }
	startDaemon := func(ctx context.Context, n *node) error { return n.StartSluice(ctx) }
	return []victim{
		{"daemon", daemon, startDaemon},
		{"holder", killHolder, func(context.Context, *node) error { return nil }},
		{"daemon-and-holder", func(t *testing.T, n *node) { killHolder(t, n); daemon(t, n) }, startDaemon},
		{"containerd", func(t *testing.T, n *node) { n.Containerd.Kill() }, func(ctx context.Context, n *node) error { return n.StartContainerd(ctx) }},
	}
}

// killHolder kills the process that keeps the node's FUSE connection.
func killHolder(t *testing.T, n *node) {
	for _, p := range processes(n.Dir) {
		pid, rest, _ := strings.Cut(p, " ")
		if !strings.Contains(rest, " node holder ") {
			continue
		}
		number, err := strconv.Atoi(pid)
		if err != nil {
			t.Error(err)
			continue
		}
		if err := syscall.Kill(number, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Error(err)
		}
	}
}

// steps is how many requests a streaming pull makes before containerd has its
// image: counted once, and one more for what comes after.
func (s *stage) steps(t *testing.T) int {
	t.Helper()
	n := s.withContainerd(t)
	n.proxy.Watch(nil)
	if err := n.pull(t, s.app); err != nil {
		t.Fatal(err)
	}
	if err := n.streams(t, s.app); err != nil {
		t.Fatal(err)
	}
	seen := n.proxy.Seen()
	t.Logf("a pull makes the requests %v", seen)
	return len(seen) + 1
}

// TestKilledDuringPull kills each of the processes when each of the requests of
// a pull arrives. The pull may fail when it is the daemon or containerd that
// died; what follows must not.
func TestKilledDuringPull(t *testing.T) {
	s := theStage(t)
	steps := s.steps(t)
	for i, v := range victims() {
		for step := 1; step <= steps; step++ {
			if !everything() && (step+i)%3 != 0 {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d", v.name, step), func(t *testing.T) {
				t.Parallel()
				n := s.withContainerd(t)
				var once sync.Once
				n.proxy.Watch(func(at int, _ Kind) {
					if at >= step {
						once.Do(func() { v.kill(t, n) })
					}
				})
				err := n.pull(t, s.app)
				once.Do(func() { v.kill(t, n) }) // it made fewer requests this time
				n.proxy.Watch(nil)
				if errors.Is(err, errHangs) || err != nil && v.name == "holder" {
					t.Errorf("the pull: %v", err)
				}
				if err := v.revive(t.Context(), n); err != nil {
					t.Fatalf("starting the %s again: %v", v.name, err)
				}
				n.heals(t, s.app)
				checkState(t, n)
			})
		}
	}
}

// checkState looks for what a kill may have left behind.
func checkState(t *testing.T, n *node) {
	t.Helper()
	eventually(t, slack, "the removal of temporary files", func() error {
		if l := leftovers(n.Dir); len(l) > 0 {
			return fmt.Errorf("%d are left: %s", len(l), strings.Join(l, ", "))
		}
		return nil
	})
	blobs := 0
	mounts, err := bed.Mounts(n.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if strings.HasSuffix(m, "/plane/blobs") {
			blobs++
		}
	}
	if blobs != 1 {
		t.Errorf("%d FUSE mounts, want one: %q", blobs, mounts)
	}
	holders := 0
	for _, p := range processes(n.Dir) {
		if strings.Contains(p, " node holder ") {
			holders++
		}
	}
	if holders != 1 {
		t.Errorf("%d holders, want one: %q", holders, processes(n.Dir))
	}
}

// TestKilledDuringStart kills each of the processes when each of the requests
// that a container's reads cause arrives, and starts it again at once. A
// container sees only right bytes, and no error unless daemon and holder died
// together.
func TestKilledDuringStart(t *testing.T) {
	s := theStage(t)
	for _, v := range victims() {
		for _, step := range []int{1, 2, 3, 5} {
			if !everything() && step == 3 {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d", v.name, step), func(t *testing.T) {
				t.Parallel()
				n := s.withContainerd(t)
				if err := n.pull(t, s.app); err != nil {
					t.Fatal(err)
				}
				var once sync.Once
				var revived error
				var killed sync.WaitGroup
				die := func() {
					v.kill(t, n)
					killed.Go(func() { revived = v.revive(t.Context(), n) })
				}
				n.proxy.Watch(func(at int, _ Kind) {
					if at >= step {
						once.Do(die)
					}
				})
				err := n.run(t, s.app)
				once.Do(die)
				n.proxy.Watch(nil)
				killed.Wait()
				if revived != nil {
					t.Fatalf("starting the %s again: %v", v.name, revived)
				}
				switch {
				case errors.Is(err, errWrong), errors.Is(err, errHangs):
					t.Errorf("the container: %v", err)
				case err != nil && v.name != "containerd" && v.name != "daemon-and-holder":
					t.Errorf("the container: %v", err)
				}
				n.heals(t, s.app)
				checkState(t, n)
			})
		}
	}
}

// TestKilledDuringRemoval kills the daemon and containerd in the middle of the
// removal of an image, which is then removed again.
func TestKilledDuringRemoval(t *testing.T) {
	s := theStage(t)
	for _, v := range victims() {
		if v.name == "holder" {
			continue
		}
		for _, after := range []time.Duration{0, 3 * time.Millisecond, 10 * time.Millisecond, 30 * time.Millisecond} {
			t.Run(fmt.Sprintf("%s/%v", v.name, after), func(t *testing.T) {
				t.Parallel()
				n := s.withContainerd(t)
				for _, img := range []*image{s.app, s.other} {
					if err := n.pull(t, img); err != nil {
						t.Fatal(err)
					}
				}
				removed := make(chan error, 1)
				go func() { removed <- n.remove(t, s.app) }()
				time.Sleep(after)
				v.kill(t, n)
				if err := <-removed; errors.Is(err, errHangs) {
					t.Errorf("the removal: %v", err)
				}
				if err := v.revive(t.Context(), n); err != nil {
					t.Fatalf("starting the %s again: %v", v.name, err)
				}
				// Whether it was removed or not, it can be pulled and removed.
				n.heals(t, s.app)
				if err := n.remove(t, s.app); err != nil {
					t.Errorf("removing the image again: %v", err)
				}
				if err := n.run(t, s.other); err != nil {
					t.Errorf("a container of the image that stays: %v", err)
				}
				if err := n.remove(t, s.other); err != nil {
					t.Error(err)
				}
				n.checkEmpty(t)
			})
		}
	}
}

// checkEmpty checks that nothing is left of images that were removed: no
// snapshot, no directory of one, and no image that somebody holds.
func (n *node) checkEmpty(t *testing.T) {
	t.Helper()
	eventually(t, slack, "garbage collection", func() error {
		out, err := n.Ctr(t.Context(), "snapshots", "--snapshotter", bed.Sluice, "ls")
		if err != nil {
			return err
		}
		if strings.Contains(out, "sha256:") {
			return fmt.Errorf("snapshots:\n%s", out)
		}
		dirs, err := os.ReadDir(filepath.Join(n.Dir, "sluice", "snapshots"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if len(dirs) > 0 {
			return fmt.Errorf("directories of %d snapshots", len(dirs))
		}
		for _, i := range n.status(t).Images {
			if i.Holders > 0 {
				return fmt.Errorf("%s is still held by %d", i.Reference, i.Holders)
			}
		}
		return nil
	})
}
