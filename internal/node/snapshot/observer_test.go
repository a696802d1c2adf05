package snapshot_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"

	"sluice/internal/node/snapshot"
	"sluice/oci"
)

// notes is what an observer was told.
type notes struct {
	mu  sync.Mutex
	all []string
}

func (n *notes) Asked(ref string, manifest oci.Digest, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.all = append(n.all, fmt.Sprintf("asked %s %t %v", ref, manifest != "", err))
}

func (n *notes) Created(key string, image oci.Digest) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.all = append(n.all, fmt.Sprintf("created %s %s", key, image))
}

// An observer is told of layers that are asked for, and of containers' snapshots,
// of no others.
func TestObserver(t *testing.T) {
	needRoot(t)
	images := newDirImages(t)
	img := images.add(t, "r/a", diffs("a", 3)...)
	n := new(notes)
	s, err := snapshot.Open(t.Context(), snapshot.Options{Root: t.TempDir(), Images: images, Observer: n})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	told := func(what string, want ...string) {
		t.Helper()
		n.mu.Lock()
		defer n.mu.Unlock()
		if !slices.Equal(n.all, want) {
			t.Errorf("%s: told %q, want %q", what, n.all, want)
		}
		n.all = nil
	}
	top, _ := pull(t, s, "r/a", img.DiffIDs)
	told("a streamed image", "asked r/a true <nil>") // containerd finds the other layers there
	for _, key := range []string{"k8s.io/3/c1", "k8s.io/3/c1"} {
		_, _ = s.Prepare(t.Context(), key, top)
	}
	told("a container, and one whose snapshot can't be made", "created k8s.io/3/c1 "+img.ID.String())
	if _, err := s.View(t.Context(), "view", top); err != nil {
		t.Error(err)
	}
	if _, err := s.Prepare(t.Context(), "empty", ""); err != nil {
		t.Error(err)
	}
	if _, err := s.Prepare(t.Context(), "unnamed", top, snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: diffs("x", 1)[0].String()})); err != nil {
		t.Error(err)
	}
	told("what is no container's")
	images.reason = errors.New("no")
	top, _ = pull(t, s, "r/b", diffs("b", 2))
	told("an ordinary image", "asked r/b true no", "asked r/b true no")
	if _, err := s.Prepare(t.Context(), "k8s.io/4/c2", top); err != nil {
		t.Error(err)
	}
	told("its container", "created k8s.io/4/c2 ")
}
