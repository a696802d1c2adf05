package mount_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/durable"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/oci"
)

// entries lists a directory of the node.
func (n *node) entries(dir ...string) []string {
	n.t.Helper()
	all, err := os.ReadDir(filepath.Join(append([]string{n.root}, dir...)...))
	if err != nil {
		n.t.Fatal(err)
	}
	var names []string
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

// layers lists the cache's layers.
func (n *node) layers() []string {
	n.t.Helper()
	all, err := filepath.Glob(filepath.Join(n.root, "cache", "sha256-*"))
	if err != nil {
		n.t.Fatal(err)
	}
	return all
}

// When containerd has removed an image nothing of it stays, without anybody's
// waiting for Linger. What is used otherwise does.
func TestCollect(t *testing.T) {
	n, manifest := prepared(t)
	m := n.start()
	m.Settled()
	never := n.push("app/other", "v1", testLayers()[:2], here)[0]
	n.convert("app/other", "v1")
	if _, err := m.Pull(t.Context(), testHost+"/app/other:v1", never.Digest); err != nil {
		t.Fatal(err)
	}
	img, dir := n.pulled(manifest, "snapshot/9")
	if err := m.Hold(t.Context(), img.ID, 2, "snapshot/1"); err != nil {
		t.Fatal(err)
	}
	checkImage(t, dir)
	release := func(owner string) {
		t.Helper()
		if err := m.Release(t.Context(), owner); err != nil {
			t.Fatal(err)
		}
		m.Collect(t.Context())
	}
	release("snapshot/9")
	if at, err := plane.MountAt(dir); err != nil || at == nil {
		t.Errorf("the mount of an image that is held went: %v", err)
	}
	if _, err := m.Attach(t.Context(), img.ID, mount.Merged, "claim/1"); err != nil {
		t.Fatal(err)
	}
	release("snapshot/1")
	if at, err := plane.MountAt(dir); err != nil || at == nil {
		t.Errorf("a mount that has an owner went: %v", err)
	}
	if err := m.Hold(t.Context(), img.ID, 2, "snapshot/2"); err != nil { // pulled again
		t.Fatal(err)
	}
	release("claim/1")
	release("snapshot/2")
	if at, err := plane.MountAt(dir); err != nil || at != nil {
		t.Errorf("%s is still mounted: %v", dir, err)
	}
	if left := n.entries("node", "images"); len(left) != 1 {
		t.Errorf("images on disk: %q, want only the one that was never held", left)
	}
	// A boot pack that is still arriving has them a moment longer.
	eventually(t, "the cache has only the layers of the image that was never held", func() bool { return len(n.layers()) == 2 })
}

// An image that is removed stays as far as its lowest layers are those of
// another image, too, and is whole again when it's pulled again.
func TestCollectLeavesSharedLayers(t *testing.T) {
	n, manifest := prepared(t)
	n.opts.NoFill = false
	m := n.start()
	m.Settled()
	img, _ := n.pulled(manifest, "snapshot/9")
	for layer, owner := range []string{"snapshot/1", "snapshot/2", "snapshot/3"} {
		if err := m.Hold(t.Context(), img.ID, layer, owner); err != nil {
			t.Fatal(err)
		}
	}
	n.waitComplete(img.ID)
	release := func(owners ...string) {
		t.Helper()
		for _, o := range owners {
			if err := m.Release(t.Context(), o); err != nil {
				t.Fatal(err)
			}
		}
		m.Collect(t.Context())
	}
	release("snapshot/3", "snapshot/2")
	if left := n.layers(); len(left) != 3 {
		t.Errorf("%d layers in the cache of an image that is mounted, want 3", len(left))
	}
	release("snapshot/9")
	if left := n.layers(); len(left) != 1 {
		t.Errorf("%d layers in the cache, want one: the others aren't another image's", len(left))
	}
	m.Sweep(t.Context(), time.Now().Add(time.Hour))
	if _, err := m.Attach(t.Context(), img.ID, mount.Part(0), "snapshot/4"); err != nil {
		t.Errorf("the layer that is left: %v", err)
	}
	_, dir := n.pulled(manifest, "snapshot/9")
	checkImage(t, dir)
	release("snapshot/9", "snapshot/4", "snapshot/1")
	if left := n.layers(); len(left) != 0 {
		t.Errorf("in the end the cache has %q", left)
	}
}

// Background work for an image ends with it, and leaves nothing.
func TestCollectEndsFill(t *testing.T) {
	n, manifest := prepared(t)
	n.unembed(manifest)
	layers := make(map[oci.Digest]bool)
	for _, d := range blobsOf(t, n.manifest(testRepo, n.artifactOf(manifest).Digest)) {
		layers[d.Digest] = d.MediaType == artifact.MediaTypeLayer
	}
	var filling atomic.Bool
	n.reg.asked = func(ctx context.Context, d oci.Digest) {
		if layers[d] {
			filling.Store(true)
			<-ctx.Done()
		}
	}
	n.opts.NoFill, n.opts.Linger = false, 400*time.Millisecond // which fills are queued after, too
	m := n.start()
	img, err := m.Pull(t.Context(), testRef, manifest)
	if err == nil {
		err = m.Hold(t.Context(), img.ID, 2, "snapshot/1")
	}
	if err != nil {
		t.Fatal(err)
	}
	m.Settled() // not before: an image that nobody holds lingers only shortly
	eventually(t, "the fill asks the registry, which doesn't answer", filling.Load)
	if err := m.Release(t.Context(), "snapshot/1"); err != nil {
		t.Fatal(err)
	}
	m.Collect(t.Context())
	eventually(t, "nothing is left in the cache", func() bool { return len(n.layers()) == 0 })
	if left := n.entries("node", "images"); len(left) != 0 {
		t.Errorf("images on disk: %q", left)
	}
}

// An image that isn't mounted keeps what its owners will need.
func TestOwn(t *testing.T) {
	n, manifest := prepared(t)
	n.start()
	img, dir := n.pulled(manifest, "snapshot/1")
	n.stop()
	m := n.start()
	if err := m.Own(t.Context(), img.ID, mount.Merged, "snapshot/1"); err != nil {
		t.Fatal(err)
	}
	if err := m.Own(t.Context(), oci.DigestOf(nil), mount.Merged, "snapshot/2"); err == nil {
		t.Error("an image that isn't here has an owner")
	}
	m.Settled()
	m.Sweep(t.Context(), time.Now().Add(time.Hour))
	if at, err := plane.MountAt(dir); err != nil || at == nil {
		t.Errorf("an owner's mount went: %v", err)
	}
	checkImage(t, dir)
	n.reboot()
	m = n.start()
	if err := m.Own(t.Context(), img.ID, mount.Merged, "snapshot/1"); err != nil {
		t.Fatal(err)
	}
	m.Settled()
	if at, err := plane.MountAt(dir); err != nil || at != nil {
		t.Errorf("after a reboot it's mounted before anybody needs it: %v", err)
	}
	m.Sweep(t.Context(), time.Now().Add(time.Hour))
	if _, err := m.Attach(t.Context(), img.ID, mount.Merged, "snapshot/1"); err != nil {
		t.Errorf("an image that has an owner: %v", err)
	}
	checkImage(t, dir)
}

// Mounts have short names, because 127 of them must fit into overlayfs's
// options; those that an earlier version made keep theirs.
func TestMountNames(t *testing.T) {
	n, manifest := prepared(t)
	n.start()
	img, dir := n.pulled(manifest, "a")
	if want := img.ID.Encoded()[:8] + ".merged"; filepath.Base(dir) != want {
		t.Errorf("the mount is %s, want %s", dir, want)
	}
	n.reboot()
	file := filepath.Join(n.root, "node", "images", img.ID.Encoded()[:32], "image.json")
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	rename := func(from, to string) {
		t.Helper()
		if !strings.Contains(string(content), from) {
			t.Fatalf("%s has no %s:\n%s", file, from, content)
		}
		if err := os.WriteFile(file, []byte(strings.Replace(string(content), from, to, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	entry := `"mount": "` + img.ID.Encoded()[:8] + `",`
	rename(entry, "")
	n.start()
	if _, dir = n.pulled(manifest, "a"); filepath.Base(dir) != img.ID.Encoded()[:32]+".merged" {
		t.Errorf("an image of an earlier version is mounted on %s", dir)
	}
	n.stop()
	n.start() // which adopts it
	checkImage(t, dir)
	n.reboot()
	rename(entry, `"mount": "../../etc",`)
	n.start()
	if s := n.m.Status(t.Context()); len(s.Images) != 0 {
		t.Errorf("an image whose mounts have another's name is taken for whole: %+v", s.Images)
	}
}

// What a killed process was writing is gone after the next start.
func TestStartRemovesHalfMadeFiles(t *testing.T) {
	n, manifest := prepared(t)
	n.start()
	img, _ := n.pulled(manifest, "a")
	n.stop()
	var half []string
	for _, dir := range []string{"images", "claims", "images/" + img.ID.Encoded()[:32]} {
		name := filepath.Join(n.root, "node", dir, durable.TempPrefix+"1")
		if err := os.WriteFile(name, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
		half = append(half, name)
	}
	n.start()
	for _, name := range half {
		if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", name, err)
		}
	}
	_, dir := n.pulled(manifest, "a")
	checkImage(t, dir)
}
