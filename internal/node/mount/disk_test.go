package mount_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"sluice/internal/node/cache"
	"sluice/internal/node/mount"
	"sluice/oci"
)

// alsoPushed pushes and converts an image with some of the test image's layers,
// and returns its reference and manifest.
func (n *node) alsoPushed(layers [][]file) (ref string, manifest oci.Digest) {
	n.t.Helper()
	desc := n.push(testRepo, "other", layers, here)[0]
	n.convert(testRepo, "other")
	return testHost + "/" + testRepo + ":other", desc.Digest
}

// waitWhole waits until all images are here, and nobody fills them any more.
func (n *node) waitWhole() (u mount.DiskUsage) {
	n.t.Helper()
	eventually(n.t, "all images are complete", func() bool {
		for _, i := range n.m.Status(n.t.Context()).Images {
			if !i.Complete {
				return false
			}
		}
		u = n.m.DiskUsage(n.t.Context())
		for _, i := range u.Images {
			if !i.Complete {
				return false
			}
		}
		return true
	})
	return u
}

func TestDiskUsage(t *testing.T) {
	n, manifest := prepared(t)
	n.opts.NoFill = false
	otherRef, otherManifest := n.alsoPushed(testLayers()[:1])
	m := n.start()
	if u := m.DiskUsage(t.Context()); u.Images == nil || u.Layers != 0 || u.Cache != 0 || u.DiskSize == 0 {
		t.Errorf("an empty node uses %+v", u)
	}
	n.pulled(manifest, "container")
	if _, err := m.Pull(t.Context(), otherRef, otherManifest); err != nil {
		t.Fatal(err)
	}
	u := n.waitWhole()
	if len(u.Images) != 2 || u.Layers != 3 || u.Unneeded != 0 || u.High != 0 {
		t.Fatalf("usage %+v", u)
	}
	other, whole := u.Images[0], u.Images[1] // by reference
	if other.InUse || !whole.InUse || other.Pinned || whole.Pinned || other.Reference != otherRef || whole.Reference != testRef {
		t.Errorf("images %+v", u.Images)
	}
	if other.Shared < 3<<20 || other.Shared != whole.Shared || whole.Own < 700_000 || other.Own > 100_000 {
		t.Errorf("the layer of 3 MiB is shared, that of 700 kB isn't: %+v", u.Images)
	}
	for _, i := range u.Images {
		if i.Here != i.Own+i.Shared || i.Size < 3<<20 || i.Used.IsZero() || i.Artifact == "" {
			t.Errorf("%+v", i)
		}
	}
	if u.Cache < whole.Size || u.Cache > whole.Size+1<<20 {
		t.Errorf("the cache has %d bytes, for content of %d", u.Cache, whole.Size)
	}
}

// why returns the reasons for which layers were kept.
func why(p mount.Pruned) map[string]int {
	kept := make(map[string]int)
	for _, l := range p.Kept {
		kept[l.Why]++
	}
	return kept
}

func TestPrune(t *testing.T) {
	n, manifest := prepared(t)
	n.opts.NoFill = false
	otherRef, otherManifest := n.alsoPushed(testLayers()[2:])
	m := n.start()
	prune := func(opts mount.PruneOptions) mount.Pruned {
		t.Helper()
		p, err := m.Prune(t.Context(), opts)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	img, dir := n.pulled(manifest, "container")
	other, err := m.Pull(t.Context(), otherRef, otherManifest)
	if err != nil {
		t.Fatal(err)
	}
	n.waitWhole()
	if p, err := m.Prune(t.Context(), mount.PruneOptions{All: true}); !errors.Is(err, cache.ErrUnsettled) || p.Freed != 0 {
		t.Errorf("before it's known what is in use: %+v, %v", p, err)
	}
	m.Settled()
	if p := prune(mount.PruneOptions{All: true}); why(p)[cache.KeptInUse] != 3 || p.Freed != 0 {
		t.Errorf("what a mount has: %+v", p)
	}
	checkImage(t, dir)
	if err := m.Release(t.Context(), "container"); err != nil {
		t.Fatal(err)
	}
	dry := prune(mount.PruneOptions{All: true, DryRun: true})
	if len(dry.Removed) != 3 || dry.Freed == 0 {
		t.Errorf("a dry run while the mount lingers says %+v", dry)
	}
	checkImage(t, dir) // which is still there
	for _, test := range []struct {
		opts mount.PruneOptions
		kept string
	}{
		{mount.PruneOptions{All: true, OlderThan: time.Hour, DryRun: true}, cache.KeptInUse},
		{mount.PruneOptions{All: true, Keep: 1 << 30, DryRun: true}, cache.KeptRoom},
		{mount.PruneOptions{}, cache.KeptInUse}, // the mount lingers
		{mount.PruneOptions{All: true, OlderThan: time.Hour}, cache.KeptInUse},
		{mount.PruneOptions{All: true, Keep: 1 << 30}, cache.KeptRoom},
		{mount.PruneOptions{}, cache.KeptNeeded},
		{mount.PruneOptions{All: true, OlderThan: time.Hour}, cache.KeptRecent},
	} {
		if p := prune(test.opts); why(p)[test.kept] != 3 || p.Freed != 0 || len(p.Removed) != 0 || p.Left == 0 {
			t.Errorf("%+v: %+v, want three layers kept because %q", test.opts, p, test.kept)
		}
	}
	dry = prune(mount.PruneOptions{All: true, DryRun: true})
	if u := m.DiskUsage(t.Context()); u.Layers != 3 || dry.Freed < u.Cache || len(dry.Removed) != 3 {
		t.Errorf("a dry run says %+v and leaves %+v", dry, u)
	}
	if err := m.Pin(t.Context(), other.ID.String()); err != nil {
		t.Fatal(err)
	}
	p := prune(mount.PruneOptions{All: true})
	if len(p.Removed) != 2 || why(p)[cache.KeptPinned] != 1 || len(p.Kept[0].Images) != 2 || p.Removed[0].Images[0] != testRef {
		t.Errorf("beside a pinned image: %+v", p)
	}
	if u := m.DiskUsage(t.Context()); u.Layers != 1 || !u.Images[0].Complete || u.Images[1].Complete || u.Images[1].Shared != p.Left {
		t.Errorf("after that: %+v, %+v", u, p)
	}
	// It is an image of this node all the same.
	if dir, err = m.Attach(t.Context(), img.ID, mount.Merged, "container"); err != nil {
		t.Fatal(err)
	}
	checkImage(t, dir)
}

// TestPruneUnneeded: what no image has goes without being asked for, and only
// that.
func TestPruneUnneeded(t *testing.T) {
	n, manifest := prepared(t)
	n.opts.NoFill = false
	otherRef, otherManifest := n.alsoPushed(testLayers()[2:])
	m := n.start()
	img, _ := n.pulled(manifest, "")
	if _, err := m.Pull(t.Context(), otherRef, otherManifest); err != nil {
		t.Fatal(err)
	}
	n.waitWhole()
	n.reboot()
	images, err := filepath.Glob(filepath.Join(n.root, "node", "images", img.ID.Encoded()[:8]+"*"))
	if err != nil || len(images) != 1 {
		t.Fatal(images, err)
	}
	if err := os.RemoveAll(images[0]); err != nil {
		t.Fatal(err)
	}
	m = n.start()
	m.Settled()
	if u := m.DiskUsage(t.Context()); u.Unneeded < 3<<20 || len(u.Images) != 1 {
		t.Errorf("usage %+v", u)
	}
	p, err := m.Prune(t.Context(), mount.PruneOptions{})
	if err != nil || len(p.Removed) != 2 || len(p.Kept) != 1 || len(p.Removed[0].Images) != 0 || p.Removed[0].Images == nil {
		t.Errorf("pruned %+v, %v", p, err)
	}
	if u := m.DiskUsage(t.Context()); u.Unneeded != 0 || !u.Images[0].Complete {
		t.Errorf("after that %+v", u)
	}
}

// TestPin: a pinned image is fetched and stays, whoever else needs it, also
// over restarts.
func TestPin(t *testing.T) {
	n, manifest := prepared(t) // with NoFill
	m := n.start()
	m.Settled()
	img, _ := n.pulled(manifest, "container")
	for _, name := range []string{"", "no.such/image:1", "NO REFERENCE", "../../etc", manifest.String(), testRef + "2"} {
		if err := m.Pin(t.Context(), name); !errors.Is(err, mount.ErrUnknownImage) {
			t.Errorf("pinning %q: %v, want ErrUnknownImage", name, err)
		}
	}
	for range 2 { // the second time nothing changes
		if err := m.Pin(t.Context(), testRef); err != nil {
			t.Fatal(err)
		}
	}
	n.waitWhole()
	if err := m.Release(t.Context(), "container"); err != nil {
		t.Fatal(err)
	}
	far := func() time.Time { return time.Now().Add(time.Hour) }
	stays := func() {
		t.Helper()
		m.Settled()
		n.waitWhole()
		m.Sweep(t.Context(), far())
		if p, err := m.Prune(t.Context(), mount.PruneOptions{All: true}); err != nil || p.Freed != 0 || why(p)[cache.KeptPinned] != 3 {
			t.Errorf("pruned %+v, %v", p, err)
		}
		u := m.DiskUsage(t.Context())
		if len(u.Images) != 1 || !u.Images[0].Pinned || !u.Images[0].Complete || u.Images[0].InUse {
			t.Errorf("usage %+v", u)
		}
	}
	stays()
	n.reg.down.Store(true)
	n.reboot()
	m = n.start()
	stays()
	if dir, err := m.Attach(t.Context(), img.ID, mount.Merged, "again"); err != nil {
		t.Error(err)
	} else {
		checkImage(t, dir)
	}
	if err := m.Release(t.Context(), "again"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.Unpin(t.Context(), img.ID.String()); err != nil {
			t.Fatal(err)
		}
	}
	m.Sweep(t.Context(), far())
	if u := m.DiskUsage(t.Context()); len(u.Images) != 0 || u.Layers != 0 {
		t.Errorf("after unpinning: %+v", u)
	}
}

// TestPruneBesideAll: everything is mounted, read, released, pinned and filled
// while it is pruned again and again; every byte read is right.
func TestPruneBesideAll(t *testing.T) {
	n, manifest := prepared(t)
	n.opts.NoFill = false
	otherRef, otherManifest := n.alsoPushed(testLayers()[:2])
	m := n.start()
	m.Settled()
	done := make(chan struct{})
	var workers, pruner sync.WaitGroup
	for w := range 3 {
		workers.Go(func() {
			owner := fmt.Sprint("worker ", w)
			for range 8 {
				img, err := m.Pull(t.Context(), testRef, manifest)
				if err != nil {
					t.Error(err)
					return
				}
				dir, err := m.Attach(t.Context(), img.ID, mount.Merged, owner)
				if err != nil {
					t.Error(err)
					return
				}
				checkImage(t, dir)
				if _, err := m.Pull(t.Context(), otherRef, otherManifest); err != nil {
					t.Error(err)
				}
				if err := m.Release(t.Context(), owner); err != nil {
					t.Error(err)
				}
			}
		})
	}
	pruner.Go(func() {
		for k := 0; ; k++ {
			select {
			case <-done:
				return
			case <-time.After(time.Millisecond):
			}
			if _, err := m.Prune(t.Context(), mount.PruneOptions{All: true, DryRun: k%4 == 0}); err != nil {
				t.Error(err)
			}
			m.DiskUsage(t.Context())
			set := m.Pin
			if k%3 > 0 {
				set = m.Unpin
			}
			if err := set(t.Context(), otherRef); err != nil && !errors.Is(err, mount.ErrUnknownImage) {
				t.Error(err)
			}
		}
	})
	workers.Wait()
	close(done)
	pruner.Wait()
}
