package snapshot_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"sluice/internal/node/mount"
	"sluice/internal/node/snapshot"
	"sluice/oci"
)

// addLayered makes an image known that has no merged mount.
func (d *dirImages) addLayered(t *testing.T, ref string, diffIDs ...oci.Digest) mount.Image {
	t.Helper()
	img := d.add(t, ref, diffIDs...)
	if err := os.RemoveAll(d.dir(img.ID, mount.Merged)); err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	img.Layered = true
	d.images[ref] = img
	return img
}

// layerDirs returns the directories of an image's layers, the topmost first.
func (d *dirImages) layerDirs(img mount.Image) []string {
	var dirs []string
	for i := range img.DiffIDs {
		dirs = append(dirs, d.dir(img.ID, mount.Part(i)))
	}
	slices.Reverse(dirs)
	return dirs
}

func TestLayeredImageIsItsLayers(t *testing.T) {
	needRoot(t)
	images := newDirImages(t)
	ids := diffs("a", 28)
	img := images.addLayered(t, "r/a", ids...)
	root := t.TempDir()
	s, err := snapshot.Open(t.Context(), snapshot.Options{Root: root, Images: images})
	if err != nil {
		t.Fatal(err)
	}
	top, streamed := pull(t, s, "r/a", ids)
	if slices.Contains(streamed, false) {
		t.Fatalf("streamed layers: %v", streamed)
	}
	mounts, err := s.Prepare(t.Context(), "c", top)
	if err != nil {
		t.Fatal(err)
	}
	want := images.layerDirs(img)
	if diff := cmp.Diff(want, lowerdir(t, mounts)); diff != "" {
		t.Errorf("lower directories (-want +got):\n%s", diff)
	}
	within(t, mounts, func(dir string) {
		got := files(t, dir)
		if len(got) != 29 || got["layer0"] != "r/a" || got["layer27"] != "r/a" || got["shared"] != "27" {
			t.Errorf("the container sees %v", got)
		}
		mustWrite(t, filepath.Join(dir, "shared"), "by the container")
	})
	view, err := s.View(t.Context(), "v", top)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, lowerdir(t, view)); diff != "" {
		t.Errorf("lower directories of a view (-want +got):\n%s", diff)
	}
	owners := images.owned()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// The next process knows from its own records how the image is mounted.
	images.owners, images.attached = make(map[string][]string), 0
	images.reason = &mount.NotStreaming{Reason: mount.RegistryUnavailable, Err: context.DeadlineExceeded}
	s = open(t, root, images)
	if got := images.owned(); got != owners || images.attached != 0 {
		t.Errorf("%d owners after the restart, want %d; %d were mounted, want none", got, owners, images.attached)
	}
	for owner, owned := range images.owners {
		if slices.Contains(owned, "own merged") {
			t.Errorf("%s owns the merged mount of an image that has none", owner)
		}
	}
	again, err := s.Mounts(t.Context(), "c")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(mounts, again); diff != "" {
		t.Errorf("mounts (-before +after the restart):\n%s", diff)
	}
}

// Layers of an image that has a merged mount, of one that has none, and ordinary
// ones lie on each other in any order.
func TestLayeredChainsMix(t *testing.T) {
	needRoot(t)
	images := newDirImages(t)
	layered := diffs("layered", 3)
	img := images.addLayered(t, "r/layered", layered...)
	s := open(t, t.TempDir(), images)
	pull(t, s, "r/layered", layered)

	// Ordinary layers on a layered image's.
	mixed := append(slices.Clone(layered), diffs("own", 1)...)
	top, streamed := pull(t, s, "r/mixed", mixed)
	if diff := cmp.Diff([]bool{true, true, true, false}, streamed); diff != "" {
		t.Fatalf("streamed layers (-want +got):\n%s", diff)
	}
	mounts, err := s.Prepare(t.Context(), "mixed", top)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(images.layerDirs(img), lowerdir(t, mounts)[1:]); diff != "" {
		t.Errorf("beneath the ordinary layer (-want +got):\n%s", diff)
	}
	within(t, mounts, func(dir string) {
		want := map[string]string{"layer0": "r/layered", "layer1": "r/layered", "layer2": "r/layered", "layer3": "r/mixed", "shared": "3"}
		if diff := cmp.Diff(want, files(t, dir)); diff != "" {
			t.Errorf("content (-want +got):\n%s", diff)
		}
	})

	// A merged image on a layered one's layers covers all of them.
	onTop := append(slices.Clone(layered[:2]), diffs("top", 1)...)
	merged := images.add(t, "r/merged", onTop...)
	top, _ = pull(t, s, "r/merged", onTop)
	if mounts, err = s.Prepare(t.Context(), "merged", top); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{images.dir(merged.ID, mount.Merged)}, lowerdir(t, mounts)); diff != "" {
		t.Errorf("lower directories (-want +got):\n%s", diff)
	}

	// A layered image on layers that came with a merged one.
	base := diffs("base", 2)
	images.add(t, "r/base", base...)
	pull(t, s, "r/base", base)
	all := append(slices.Clone(base), diffs("more", 1)...)
	above := images.addLayered(t, "r/above", all...)
	top, _ = pull(t, s, "r/above", all)
	if mounts, err = s.Prepare(t.Context(), "above", top); err != nil {
		t.Fatal(err)
	}
	dirs := lowerdir(t, mounts)
	if len(dirs) != 2 || dirs[0] != images.dir(above.ID, 2) || !strings.HasSuffix(dirs[1], mount.Merged.String()) {
		t.Errorf("lower directories: %q", dirs)
	}
}

// A layer that an image has twice is one mount, of which overlayfs wants no second.
func TestLayeredImageHasALayerTwice(t *testing.T) {
	needRoot(t)
	images := newDirImages(t)
	ids := diffs("a", 2)
	twice := []oci.Digest{ids[0], ids[1], ids[0]}
	img := images.addLayered(t, "r/a", twice...)
	first, third := images.dir(img.ID, 0), images.dir(img.ID, 2)
	if err := os.RemoveAll(third); err != nil {
		t.Fatal(err)
	}
	s := open(t, t.TempDir(), sameDir{images, first, third})
	top, _ := pull(t, s, "r/a", twice)
	mounts, err := s.Prepare(t.Context(), "c", top)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{first, images.dir(img.ID, 1)}, lowerdir(t, mounts)); diff != "" {
		t.Errorf("lower directories (-want +got):\n%s", diff)
	}
	within(t, mounts, func(dir string) {
		if got := files(t, dir)["shared"]; got != "0" {
			t.Errorf("the topmost layer is hidden: shared is %q", got)
		}
	})
}

// sameDir is an Images in which two mounts are one.
type sameDir struct {
	*dirImages
	dir, is string
}

func (d sameDir) Attach(ctx context.Context, image oci.Digest, part mount.Part, owner string) (string, error) {
	dir, err := d.dirImages.Attach(ctx, image, part, owner)
	if dir == d.is {
		dir = d.dir
	}
	return dir, err
}

// What is lost of an image is pulled again, also of one that is its layers.
func TestLostLayeredImage(t *testing.T) {
	needRoot(t)
	images := newDirImages(t)
	ids := diffs("a", 3)
	img := images.addLayered(t, "r/a", ids...)
	s := open(t, t.TempDir(), images)
	top, _ := pull(t, s, "r/a", ids)
	images.mu.Lock()
	images.lost[img.ID] = true
	images.mu.Unlock()
	mounts, err := s.Prepare(t.Context(), "c", top)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(images.layerDirs(img), lowerdir(t, mounts)); diff != "" {
		t.Errorf("lower directories (-want +got):\n%s", diff)
	}
	images.mu.Lock()
	images.lost[img.ID] = true
	images.reason = fmt.Errorf("the share is gone")
	images.mu.Unlock()
	if _, err := s.Mounts(t.Context(), "c"); !errdefs.IsUnavailable(err) {
		t.Errorf("with nowhere to pull it from: %v", err)
	}
}

func TestLayeredLabelIsReserved(t *testing.T) {
	images := newDirImages(t)
	ids := diffs("a", 1)
	images.add(t, "r/a", ids...)
	s := open(t, t.TempDir(), images)
	top, _ := pull(t, s, "r/a", ids)
	forged := snapshots.Info{Name: top, Labels: map[string]string{"sluice.layered": "true"}}
	for _, paths := range [][]string{nil, {"labels.sluice.layered"}} {
		if _, err := s.Update(t.Context(), forged, paths...); err != nil {
			t.Fatal(err)
		}
		if info, err := s.Stat(t.Context(), top); err != nil || info.Labels["sluice.layered"] != "" {
			t.Errorf("a client made it a layered one: %v, %v", info.Labels, err)
		}
	}
	layered := images.addLayered(t, "r/b", diffs("b", 2)...)
	top, _ = pull(t, s, "r/b", layered.DiffIDs)
	for _, paths := range [][]string{nil, {"labels.sluice.layered"}} {
		if _, err := s.Update(t.Context(), snapshots.Info{Name: top}, paths...); err != nil {
			t.Fatal(err)
		}
		if info, err := s.Stat(t.Context(), top); err != nil || info.Labels["sluice.layered"] != "true" {
			t.Errorf("a client made it another one: %v, %v", info.Labels, err)
		}
	}
}
