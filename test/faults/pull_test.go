package faults

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/test/bed"
)

// withContainerd starts a node with containerd.
func (s *stage) withContainerd(t *testing.T, flags ...string) *node {
	t.Helper()
	n := s.node(t, flags...)
	if err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

// Bounds of what containerd is asked for.
const (
	pullBound = mountBound + slack
	runBound  = 2 * slack
)

// pull pulls an image as containerd does it, within the bound.
func (n *node) pull(t *testing.T, img *image) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), pullBound)
	defer cancel()
	err := n.Pull(ctx, bed.Sluice, n.ref(img))
	if ctx.Err() != nil {
		return errHangs
	}
	return err
}

// run runs a container that reads all files, and returns what is wrong with
// what it saw.
func (n *node) run(t *testing.T, img *image) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runBound)
	defer cancel()
	r, err := n.Run(ctx, bed.Sluice, n.ref(img), fmt.Sprintf("c%d", time.Now().UnixNano()))
	switch {
	case ctx.Err() != nil:
		return errHangs
	case err != nil:
		return err
	}
	return img.files.compare(r.Output)
}

// compare holds what a container printed against the truth.
func (t truth) compare(got string) error {
	want := t.listing()
	if got == want {
		return nil
	}
	lines := strings.Split(want, "\n")
	for line := range strings.Lines(got) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasSuffix(line, "input/output error") {
			return fmt.Errorf("a container sees %q", line)
		}
		if !slices.Contains(lines, line) {
			return fmt.Errorf("%w: a container sees %q", errWrong, line)
		}
	}
	return fmt.Errorf("a container sees %d bytes of listing instead of %d", len(got), len(want))
}

// streams returns an error unless the image's last pull streams.
func (n *node) streams(t *testing.T, img *image) error {
	t.Helper()
	s := n.status(t)
	for _, i := range s.Images {
		if i.Reference == n.ref(img) {
			if reason, message := s.whyNot(n.ref(img)); reason != "" {
				return fmt.Errorf("%s: %s", reason, message)
			}
			return nil
		}
	}
	return errors.New("sluice node status doesn't know the image")
}

// remove removes an image, and waits for what containerd's garbage collection
// then removes.
func (n *node) remove(t *testing.T, img *image) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runBound)
	defer cancel()
	_, err := n.Ctr(ctx, "images", "rm", "--sync", n.ref(img))
	if ctx.Err() != nil {
		return errHangs
	}
	return err
}

// ordinary are faults of every kind that make streaming impossible.
var ordinary = []string{
	"stall-before-headers", "drip", "close-before-headers", "reset-in-body", "flip-bit", "401", "403", "404", "404-name-unknown",
	"429", "429-retry-in-an-hour", "500", "redirect-in-circles", "garbage", "login-page", "nothing-with-200", "header-of-a-megabyte",
}

// TestPullFallsBack pulls by containerd while what streaming needs, and only
// that, is broken: every pull works and says why it doesn't stream; afterwards
// the same image streams.
func TestPullFallsBack(t *testing.T) {
	s := theStage(t)
	for _, k := range []Kind{Referrers, Artifact, Metadata, Table} {
		t.Run(string(k), func(t *testing.T) {
			t.Parallel()
			n := s.withContainerd(t)
			for i, f := range Catalog() {
				at := slices.Index(ordinary, f.Name)
				if at < 0 || !f.happens(k) || !everything() && (at+slices.Index(requests, k))%3 != 0 {
					continue
				}
				n.proxy.Arm(f, k, -1)
				if err := n.pull(t, s.app); err != nil {
					t.Errorf("%s: the pull fails: %v", f.Name, err)
					continue
				}
				if n.proxy.Disarm() == 0 {
					t.Errorf("%s: nothing was tested", f.Name)
				}
				if err := n.streams(t, s.app); err == nil {
					t.Errorf("%s: it streams though it can't", f.Name)
				}
				if reason, message := n.status(t).whyNot(n.ref(s.app)); reason == "" || f.Reason != "" && reason != f.Reason {
					t.Errorf("%s: sluice node status says %q (%s), want %q", f.Name, reason, message, f.Reason)
				}
				if i%4 == 0 {
					if err := n.run(t, s.app); err != nil {
						t.Errorf("%s: a container of the ordinary pull: %v", f.Name, err)
					}
				}
				if err := n.remove(t, s.app); err != nil {
					t.Errorf("%s: removing the image: %v", f.Name, err)
				}
				time.Sleep(recheck)
			}
			n.heals(t, s.app)
		})
	}
}

// heals checks that an image can be pulled, streams, and is right.
func (n *node) heals(t *testing.T, img *image) {
	t.Helper()
	// containerd connects to a snapshotter that was away again within 3 s.
	eventually(t, 3*time.Second+slack, "pulling after the fault", func() error { return n.pull(t, img) })
	if err := n.streams(t, img); err != nil {
		t.Errorf("after the fault the image doesn't stream: %v", err)
	}
	if err := n.run(t, img); err != nil {
		t.Errorf("a container after the fault: %v", err)
	}
}
