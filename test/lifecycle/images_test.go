package lifecycle

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/test/bed"
)

// box makes an image of files that no other seed has. All have the shell's
// layers in common.
func (s *stage) box(t *testing.T, seed uint64, sizes ...int) bed.Toolbox {
	t.Helper()
	b, err := bed.NewToolbox(t.Context(), filepath.Join(t.TempDir(), "box"), seed, sizes...)
	must(t, err)
	return b
}

// push pushes an image.
func (s *stage) push(t *testing.T, reg *bed.Registry, box bed.Toolbox, name string) (ref string) {
	t.Helper()
	must(t, reg.Push(t.Context(), s.Tools, box.Layout, name))
	return reg.Addr + "/" + name
}

// convert converts an image of a registry.
func (s *stage) convert(t *testing.T, ref string) {
	t.Helper()
	must(t, s.Convert(t.Context(), ref))
}

// remove removes an image, and waits for what containerd's garbage collection
// then removes.
func remove(t *testing.T, n *bed.Node, ref string) {
	t.Helper()
	_, err := n.Ctr(t.Context(), "images", "rm", "--sync", ref)
	must(t, err)
}

// detached starts a container that a test looks into by exec.
func detached(t *testing.T, n *bed.Node, ref, id string) {
	t.Helper()
	_, err := n.Ctr(t.Context(), "run", "--detach", "--net-host", "--snapshotter", bed.Sluice, ref, id)
	must(t, err)
}

// look compares what a container of detached is made of.
func look(t *testing.T, n *bed.Node, id string, box bed.Toolbox) {
	t.Helper()
	out, err := n.Exec(t.Context(), id, checkSums()...)
	if err != nil || out != sumsOf(box) {
		t.Errorf("container %s has %s, %v", id, out, err)
	}
}

// end ends and removes a container of detached.
func end(t *testing.T, n *bed.Node, id string) {
	t.Helper()
	_, err := n.Ctr(t.Context(), "containers", "rm", "--force", id)
	if err != nil { // older ones don't have it
		_, err = n.Ctr(t.Context(), "tasks", "rm", "--force", id)
		must(t, err)
		_, err = n.Ctr(t.Context(), "containers", "rm", id)
	}
	must(t, err)
}

// connected waits until containerd has its snapshotter again. What it removes before
// that stays in the snapshotter until containerd removes some other snapshot: it doesn't
// try again.
func connected(t *testing.T, n *bed.Node) {
	t.Helper()
	must(t, n.AwaitConnection(t.Context()))
}

// isEmpty waits until nothing is left of images that were removed.
func isEmpty(t *testing.T, n *bed.Node) {
	t.Helper()
	collected(t, n, "nothing is left of the removed images", func() bool {
		images, _ := os.ReadDir(filepath.Join(n.Dir, "sluice", "images"))
		snapshots, _ := os.ReadDir(filepath.Join(n.Dir, "sluice", "snapshots"))
		mounts, _ := os.ReadDir(filepath.Join(n.Dir, "sluice", "m"))
		return len(images)+len(snapshots)+len(mounts)+cachedLayers(t, n) == 0
	})
}

// collected waits for what comes of containerd's collection of garbage. What is
// deleted while it collects it doesn't know to be garbage until something else is
// deleted, and so something is.
func collected(t *testing.T, n *bed.Node, what string, is func() bool) {
	t.Helper()
	deleted := time.Now()
	eventually(t, patience, what, func() bool {
		if is() {
			return true
		}
		if time.Since(deleted) > time.Second {
			collect(t, n)
			deleted = time.Now()
		}
		return false
	})
}

// collect has containerd collect garbage.
func collect(t *testing.T, n *bed.Node) {
	t.Helper()
	lease := fmt.Sprint("collect-", time.Now().UnixNano())
	_, err := n.Ctr(t.Context(), "leases", "create", "--id", lease)
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err = n.Ctr(ctx, "leases", "delete", "--sync", lease)
	if err != nil && ctx.Err() == nil { // the next collection may be a while off
		t.Fatal(err)
	}
}

// TestRemovedWhileRunning removes an image whose container runs: that goes on
// reading what had not arrived, also after restarts, and takes the image along
// when it ends.
func TestRemovedWhileRunning(t *testing.T) {
	s := theStage(t)
	n := s.newNode(t, s.Tools, "--no-fill")
	start(t, n)
	must(t, n.Pull(t.Context(), bed.Sluice, s.Ref("app:1")))
	id := filepath.Base(n.Dir)
	detached(t, n, s.Ref("app:1"), id)
	remove(t, n, s.Ref("app:1"))
	n.Sluice.Kill()
	must(t, n.StartSluice(t.Context()))
	look(t, n, id, s.app)
	connected(t, n)
	if len(status(t, n).Images) != 1 {
		t.Error("the image of a running container is gone")
	}
	end(t, n, id)
	isEmpty(t, n)
}

// TestConvertedLater pulls an image before it is converted. It stays what it is
// while containerd has it, and streams when it's pulled again.
func TestConvertedLater(t *testing.T) {
	s := theStage(t)
	n := s.newNode(t, s.Tools, "--recheck", "1s")
	start(t, n)
	box := s.box(t, 11, 100_000, 50_000)
	ref := s.push(t, s.Registry, box, "later:1")
	must(t, n.Pull(t.Context(), bed.Sluice, ref))
	if st := status(t, n); len(st.Images) != 0 || len(st.Pulls) == 0 || st.Pulls[0].Reason != "NoStreamingArtifact" {
		t.Errorf("before it is converted: images %+v, pulls %+v", st.Images, st.Pulls)
	}
	id := filepath.Base(n.Dir)
	detached(t, n, ref, id)
	s.convert(t, ref)
	must(t, n.Pull(t.Context(), bed.Sluice, ref))
	look(t, n, id, box)
	s.runs(t, n, bed.Sluice, "later:1", box)
	end(t, n, id)
	remove(t, n, ref)
	eventually(t, patience, "the image streams when it is pulled again", func() bool {
		must(t, n.Pull(t.Context(), bed.Sluice, ref))
		if len(status(t, n).Images) == 1 {
			return true
		}
		remove(t, n, ref)
		return false
	})
	s.runs(t, n, bed.Sluice, "later:1", box)
	remove(t, n, ref)
	isEmpty(t, n)
}

// TestSharedLayers has two images that begin with the same layers, one more that
// does and doesn't stream, and removes them in the order in which they came.
func TestSharedLayers(t *testing.T) {
	s := theStage(t)
	n := s.newNode(t, s.Tools)
	start(t, n)
	second, third := s.box(t, 21, 200_000), s.box(t, 22, 30_000)
	refs := []string{s.Ref("app:1"), s.push(t, s.Registry, second, "second:1"), s.push(t, s.Registry, third, "third:1")}
	s.convert(t, refs[1])
	for _, ref := range refs {
		must(t, n.Pull(t.Context(), bed.Sluice, ref))
	}
	check := func(names ...string) {
		t.Helper()
		for _, name := range names {
			s.runs(t, n, bed.Sluice, name, map[string]bed.Toolbox{"app:1": s.app, "second:1": second, "third:1": third}[name])
		}
	}
	check("app:1", "second:1", "third:1")
	if st := status(t, n); len(st.Images) != 2 {
		t.Errorf("streamed images: %+v, want app:1 and second:1", st.Images)
	}
	eventually(t, patience, "the cache has each layer once", func() bool { return cachedLayers(t, n) == len(s.app.Sums)+2+len(second.Sums) })
	remove(t, n, refs[0])
	n.Sluice.Kill()
	must(t, n.StartSluice(t.Context()))
	connected(t, n)
	check("second:1", "third:1")
	remove(t, n, refs[1])
	check("third:1")
	remove(t, n, refs[2])
	isEmpty(t, n)
}

// TestTwoRegistries pulls the same image from two registries: it is here once,
// and either name may be removed. (containerd doesn't tell a snapshotter of
// layers that it has: what hasn't arrived when the second name is pulled comes
// from the first registry, and its mirrors.)
func TestTwoRegistries(t *testing.T) {
	s := theStage(t)
	n := s.newNode(t, s.Tools)
	start(t, n)
	first, err := bed.StartRegistry(t.Context(), s.Sluice, t.TempDir())
	must(t, err)
	t.Cleanup(first.Stop)
	refs := []string{s.push(t, first, s.app, "app:1"), s.Ref("app:1")}
	s.convert(t, refs[0])
	for _, ref := range refs {
		must(t, n.Pull(t.Context(), bed.Sluice, ref))
	}
	eventually(t, patience, "all content has arrived, once", func() bool {
		i := status(t, n).Images
		return len(i) == 1 && i[0].Complete
	})
	first.Stop()
	remove(t, n, refs[0])
	must(t, bed.DropCaches())
	s.runs(t, n, bed.Sluice, "app:1", s.app)
	remove(t, n, refs[1])
	isEmpty(t, n)
}

// TestDeepImages has as many layers as there may be: streamed, and all but one
// of them streamed, each mounted by itself then.
func TestDeepImages(t *testing.T) {
	s := theStage(t)
	n := s.newNode(t, s.Tools)
	start(t, n)
	sizes := make([]int, 125) // and two of the shell
	for i := range sizes {
		sizes[i] = 1000
	}
	deep := s.box(t, 31, sizes...)
	sizes[124] = 1001
	other := s.box(t, 31, sizes...)
	refs := []string{s.push(t, s.Registry, deep, "deep:1"), s.push(t, s.Registry, other, "other:1")}
	s.convert(t, refs[0])
	must(t, n.Pull(t.Context(), bed.Sluice, refs[0]))
	streams(t, n, refs[0])
	s.runs(t, n, bed.Sluice, "deep:1", deep)

	must(t, n.Pull(t.Context(), bed.Sluice, refs[1]))
	began := time.Now()
	s.runs(t, n, bed.Sluice, "other:1", other)
	t.Logf("FIGURE a container on 126 streamed layers, each mounted by itself, and one more: %.2f s", time.Since(began).Seconds())
	if st := status(t, n); len(st.Images) != 1 || len(st.Images[0].Mounts) < 126 {
		t.Errorf("images %+v, want one of which each layer is mounted", st.Images)
	}
	id := filepath.Base(n.Dir)
	detached(t, n, refs[1], id)
	n.Sluice.Kill()
	must(t, n.StartSluice(t.Context()))
	must(t, bed.DropCaches())
	look(t, n, id, other)
	connected(t, n)
	end(t, n, id)
	for _, ref := range refs {
		remove(t, n, ref)
	}
	isEmpty(t, n)
}

// TestOthersAreLeftAlone holds that images of other snapshotters don't need the
// daemon, nor does anything of theirs go through it.
func TestOthersAreLeftAlone(t *testing.T) {
	s := theStage(t)
	n := s.newNode(t, s.Tools)
	start(t, n)
	must(t, n.Pull(t.Context(), bed.Sluice, s.Ref("app:1")))
	must(t, n.Pull(t.Context(), bed.Overlayfs, s.Ref("app:1")))
	before := len(status(t, n).Pulls)
	s.runs(t, n, bed.Overlayfs, "app:1", s.app)
	if now := len(status(t, n).Pulls); now != before {
		t.Errorf("the daemon had to do with another snapshotter's image: %d pulls, %d before", now, before)
	}
	n.Sluice.Stop()
	s.runs(t, n, bed.Overlayfs, "app:1", s.app)
	must(t, n.Pull(t.Context(), bed.Overlayfs, s.Ref("plain:1")))
	s.runs(t, n, bed.Overlayfs, "plain:1", s.plain)
	must(t, n.StartSluice(t.Context()))
	connected(t, n)
	// Images go even though their layers lie with two snapshotters.
	remove(t, n, s.Ref("app:1"))
	remove(t, n, s.Ref("plain:1"))
	out, err := n.Ctr(t.Context(), "snapshots", "--snapshotter", bed.Overlayfs, "ls")
	if must(t, err); strings.Contains(out, "sha256:") {
		t.Errorf("left with the other snapshotter:\n%s", out)
	}
	isEmpty(t, n)
}
