package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/image-spec/identity"

	"sluice/internal/node/mount"
	"sluice/internal/node/snapshot"
	"sluice/oci"
)

// dirImages is an Images whose mounts are plain directories: <root>/<image's
// first hex digits>/<part>. Each layer i of an image has a file "layer<i>" that
// names the image, and all layers have a file "shared" that names the layer.
type dirImages struct {
	root string

	mu     sync.Mutex
	images map[string]mount.Image // by reference
	reason error                  // if not nil, no image streams
	broken map[oci.Digest]bool    // images whose mounts fail
	lost   map[oci.Digest]bool    // images that have to be pulled again
	pulls  int

	attached  int                 // how often something was mounted
	collected int                 // how often the removal of what nobody holds was asked for
	owners    map[string][]string // what each owner holds or has attached
}

func newDirImages(t *testing.T) *dirImages {
	return &dirImages{
		root: t.TempDir(), images: make(map[string]mount.Image),
		broken: make(map[oci.Digest]bool), lost: make(map[oci.Digest]bool), owners: make(map[string][]string),
	}
}

// add makes an image of the given diff IDs known.
func (d *dirImages) add(t *testing.T, ref string, diffIDs ...oci.Digest) mount.Image {
	t.Helper()
	img := mount.Image{ID: oci.DigestOf([]byte(ref)), Reference: ref, Manifest: oci.DigestOf([]byte("manifest " + ref)), DiffIDs: diffIDs}
	merged := d.dir(img.ID, mount.Merged)
	mustWrite(t, filepath.Join(merged, "merged"), ref)
	for i := range diffIDs {
		own := d.dir(img.ID, mount.Part(i))
		for _, dir := range []string{own, merged} {
			mustWrite(t, filepath.Join(dir, fmt.Sprintf("layer%d", i)), ref)
			mustWrite(t, filepath.Join(dir, "shared"), fmt.Sprint(i))
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.images[ref] = img
	return img
}

func (d *dirImages) dir(image oci.Digest, part mount.Part) string {
	return filepath.Join(d.root, image.Encoded()[:8], part.String())
}

func (d *dirImages) Pull(_ context.Context, ref string, _ oci.Digest) (mount.Image, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pulls++
	if d.reason != nil {
		return mount.Image{}, d.reason
	}
	img, ok := d.images[ref]
	if !ok {
		return mount.Image{}, &mount.NotStreaming{Reason: mount.NoStreamingArtifact, Err: fmt.Errorf("%s has none", ref)}
	}
	delete(d.lost, img.ID)
	return img, nil
}

func (d *dirImages) Hold(_ context.Context, image oci.Digest, _ int, owner string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lost[image] {
		return mount.ErrUnknownImage
	}
	d.owners[owner] = append(d.owners[owner], "hold "+image.Encoded()[:8])
	return nil
}

func (d *dirImages) Own(_ context.Context, image oci.Digest, part mount.Part, owner string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lost[image] {
		return mount.ErrUnknownImage
	}
	d.owners[owner] = append(d.owners[owner], "own "+part.String())
	return nil
}

func (d *dirImages) Collect(context.Context) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.collected++
}

func (d *dirImages) Attach(_ context.Context, image oci.Digest, part mount.Part, owner string) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lost[image] {
		return "", mount.ErrUnknownImage
	}
	if d.broken[image] {
		return "", &mount.NotStreaming{Reason: mount.PlaneUnavailable, Err: fmt.Errorf("%s is broken", image)}
	}
	d.attached++
	d.owners[owner] = append(d.owners[owner], "attach "+part.String())
	return d.dir(image, part), nil
}

func (d *dirImages) Release(_ context.Context, owner string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.owners, owner)
	return nil
}

func (d *dirImages) Usage(_ context.Context, _ oci.Digest, layer int) (int64, error) {
	return int64(1000 + layer), nil
}

func (d *dirImages) owned() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.owners)
}

func mustWrite(t *testing.T, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// diffs returns n diff IDs that begin with the ones of the same stem.
func diffs(stem string, n int) []oci.Digest {
	ids := make([]oci.Digest, n)
	for i := range ids {
		ids[i] = oci.DigestOf([]byte(fmt.Sprint(stem, i)))
	}
	return ids
}

func chains(diffIDs []oci.Digest) []string {
	var names []string
	for _, id := range identity.ChainIDs(append([]oci.Digest(nil), diffIDs...)) {
		names = append(names, id.String())
	}
	return names
}

// pull does what containerd's unpacker does for an image and returns the name
// of the top snapshot and which layers streamed. Layers that don't are
// unpacked: a file "layer<i>" naming the image, and "shared".
func pull(t *testing.T, s *snapshot.Snapshotter, ref string, diffIDs []oci.Digest) (top string, streamed []bool) {
	t.Helper()
	return pullManifest(t, s, ref, oci.DigestOf([]byte("manifest "+ref)), diffIDs)
}

// pullManifest is pull of an image whose manifest has the given digest.
func pullManifest(t *testing.T, s *snapshot.Snapshotter, ref string, manifest oci.Digest, diffIDs []oci.Digest) (top string, streamed []bool) {
	t.Helper()
	ctx := t.Context()
	parent := ""
	for i, chain := range chains(diffIDs) {
		if _, err := s.Stat(ctx, chain); err == nil {
			parent = chain
			streamed = append(streamed, true)
			continue
		}
		labels := map[string]string{
			snapshots.LabelSnapshotRef:             chain,
			snapshotters.TargetRefLabel:            ref,
			snapshotters.TargetManifestDigestLabel: manifest.String(),
		}
		key := "extract " + ref + " " + chain
		mounts, err := s.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
		if errdefs.IsAlreadyExists(err) {
			if info, err := s.Stat(ctx, chain); err != nil || info.Parent != parent || info.Kind != snapshots.KindCommitted {
				t.Fatalf("layer %d: streamed snapshot is %+v, %v; want it committed on top of %q", i, info, err, parent)
			}
			streamed = append(streamed, true)
			parent = chain
			continue
		}
		if err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
		streamed = append(streamed, false)
		within(t, mounts, func(dir string) {
			mustWrite(t, filepath.Join(dir, fmt.Sprintf("layer%d", i)), ref)
			mustWrite(t, filepath.Join(dir, "shared"), fmt.Sprint(i))
		})
		if err := s.Commit(ctx, chain, key, snapshots.WithLabels(labels)); err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
		parent = chain
	}
	return parent, streamed
}

// within mounts, calls fn with the directory, and unmounts.
func within(t *testing.T, mounts []cmount.Mount, fn func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	if err := cmount.All(mounts, dir); err != nil {
		t.Fatalf("mount %+v: %v", mounts, err)
	}
	defer func() {
		if err := cmount.UnmountAll(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	fn(dir)
}

// files returns the names and contents beneath dir.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]string)
	for _, e := range entries {
		content, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		found[e.Name()] = string(content)
	}
	return found
}

func open(t *testing.T, root string, images snapshot.Images) *snapshot.Snapshotter {
	t.Helper()
	s, err := snapshot.Open(t.Context(), snapshot.Options{Root: root, Images: images})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// children returns the snapshots whose parent is name.
func children(t *testing.T, s *snapshot.Snapshotter, name string) []snapshots.Info {
	t.Helper()
	var found []snapshots.Info
	err := s.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
		found = append(found, i)
		return nil
	}, fmt.Sprintf("parent==%q", name))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func lowerdir(t *testing.T, mounts []cmount.Mount) []string {
	t.Helper()
	for _, o := range mounts[0].Options {
		if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
			return strings.Split(dirs, ":")
		}
	}
	t.Fatalf("no lowerdir in %+v", mounts)
	return nil
}

func TestStreamedImageIsOneLowerDirectory(t *testing.T) {
	needRoot(t)
	images := newDirImages(t)
	ids := diffs("a", 28)
	img := images.add(t, "r/a", ids...)
	s := open(t, t.TempDir(), images)

	top, streamed := pull(t, s, "r/a", ids)
	for i, ok := range streamed {
		if !ok {
			t.Errorf("layer %d didn't stream", i)
		}
	}
	mounts, err := s.Prepare(t.Context(), "c1", top)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{images.dir(img.ID, mount.Merged)}
	if diff := cmp.Diff(want, lowerdir(t, mounts)); diff != "" {
		t.Errorf("lower directories (-want +got):\n%s", diff)
	}
	within(t, mounts, func(dir string) {
		if got := files(t, dir)["merged"]; got != "r/a" {
			t.Errorf("the container sees %q", got)
		}
		mustWrite(t, filepath.Join(dir, "new"), "by the container")
	})
	view, err := s.View(t.Context(), "v1", top)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]cmount.Mount{{Type: "bind", Source: want[0], Options: []string{"ro", "rbind"}}}, view); diff != "" {
		t.Errorf("view (-want +got):\n%s", diff)
	}
	if u, err := s.Usage(t.Context(), top); err != nil || u.Size != 1027 {
		t.Errorf("usage is %+v, %v; want what the images say: 1027", u, err)
	}
	again, err := s.Mounts(t.Context(), "c1")
	if diff := cmp.Diff(mounts, again); diff != "" || err != nil {
		t.Errorf("Mounts, %v (-Prepare +Mounts):\n%s", err, diff)
	}
}

func TestPrefixOfStreamedImageStacksLayers(t *testing.T) {
	needRoot(t)
	images := newDirImages(t)
	ids := diffs("a", 3)
	images.add(t, "r/a", ids...)
	s := open(t, t.TempDir(), images)
	pull(t, s, "r/a", ids)

	// Another image begins with the same two layers and doesn't stream.
	other := append(append([]oci.Digest(nil), ids[:2]...), diffs("b", 2)...)
	top, streamed := pull(t, s, "r/b", other)
	if diff := cmp.Diff([]bool{true, true, false, false}, streamed); diff != "" {
		t.Fatalf("streamed layers (-want +got):\n%s", diff)
	}
	mounts, err := s.Prepare(t.Context(), "c", top)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(lowerdir(t, mounts)); n != 4 {
		t.Errorf("%d lower directories, want 4: two ordinary ones on two streamed layers", n)
	}
	within(t, mounts, func(dir string) {
		want := map[string]string{"layer0": "r/a", "layer1": "r/a", "layer2": "r/b", "layer3": "r/b", "shared": "3"}
		if diff := cmp.Diff(want, files(t, dir)); diff != "" {
			t.Errorf("content (-want +got):\n%s", diff)
		}
	})
}

func TestOrdinaryLayersBeneathStreamedOnes(t *testing.T) {
	needRoot(t)
	images := newDirImages(t)
	ids := diffs("a", 3)
	s := open(t, t.TempDir(), images)

	// The base image came before anything of it streamed.
	if _, streamed := pull(t, s, "r/base", ids[:1]); streamed[0] {
		t.Fatal("the base streamed")
	}
	img := images.add(t, "r/a", ids...)
	top, streamed := pull(t, s, "r/a", ids)
	if diff := cmp.Diff([]bool{true, true, true}, streamed); diff != "" {
		t.Fatalf("layers present or streamed (-want +got):\n%s", diff)
	}
	mounts, err := s.Prepare(t.Context(), "c", top)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{images.dir(img.ID, mount.Merged)}, lowerdir(t, mounts)); diff != "" {
		t.Errorf("lower directories (-want +got):\n%s", diff)
	}
	// In the middle of the image: one streamed layer on the ordinary one.
	mid, err := s.View(t.Context(), "v", chains(ids)[1])
	if err != nil {
		t.Fatal(err)
	}
	within(t, mid, func(dir string) {
		want := map[string]string{"layer0": "r/base", "layer1": "r/a", "shared": "1"}
		if diff := cmp.Diff(want, files(t, dir)); diff != "" {
			t.Errorf("content (-want +got):\n%s", diff)
		}
	})
}

func TestFallBack(t *testing.T) {
	needRoot(t)
	for name, arrange := range map[string]func(t *testing.T, d *dirImages){
		"no artifact": func(*testing.T, *dirImages) {},
		"registry is down": func(_ *testing.T, d *dirImages) {
			d.reason = &mount.NotStreaming{Reason: mount.RegistryUnavailable, Err: context.DeadlineExceeded}
		},
		"other layers": func(t *testing.T, d *dirImages) { d.add(t, "r/a", diffs("x", 2)...) },
	} {
		t.Run(name, func(t *testing.T) {
			images := newDirImages(t)
			arrange(t, images)
			s := open(t, t.TempDir(), images)
			top, streamed := pull(t, s, "r/a", diffs("a", 2))
			if diff := cmp.Diff([]bool{false, false}, streamed); diff != "" {
				t.Errorf("streamed layers (-want +got):\n%s", diff)
			}
			mounts, err := s.Prepare(t.Context(), "c", top)
			if err != nil {
				t.Fatal(err)
			}
			within(t, mounts, func(dir string) {
				want := map[string]string{"layer0": "r/a", "layer1": "r/a", "shared": "1"}
				if diff := cmp.Diff(want, files(t, dir)); diff != "" {
					t.Errorf("content (-want +got):\n%s", diff)
				}
			})
		})
	}
}

func TestLayersAreRecordedTogether(t *testing.T) {
	images := newDirImages(t)
	ids := diffs("a", 5)
	images.add(t, "r/a", ids...)
	root := t.TempDir()
	s := open(t, root, images)
	chain := chains(ids)
	labels := map[string]string{snapshots.LabelSnapshotRef: chain[0], snapshotters.TargetRefLabel: "r/a", snapshotters.TargetLayerDigestLabel: "sha256:0"}
	if _, err := s.Prepare(t.Context(), "extract", "", snapshots.WithLabels(labels)); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	parent := ""
	for i, name := range chain {
		info, err := s.Stat(t.Context(), name)
		if err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
		if info.Parent != parent || info.Labels[snapshots.LabelSnapshotRef] != name || (info.Labels[snapshotters.TargetLayerDigestLabel] != "") != (i == 0) {
			t.Errorf("layer %d is %+v", i, info)
		}
		parent = name
	}
	// A pull that goes on with ordinary layers beneath takes names of its own.
	if _, err := s.Prepare(t.Context(), "x", ""); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), "ns2/1/"+chain[1], "x"); err != nil {
		t.Fatal(err)
	}
	labels[snapshots.LabelSnapshotRef] = chain[2]
	if _, err := s.Prepare(t.Context(), "extract 2", "ns2/1/"+chain[1], snapshots.WithLabels(labels)); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	if got := children(t, s, "ns2/1/"+chain[1]); len(got) != 1 || got[0].Labels[snapshots.LabelSnapshotRef] != chain[2] {
		t.Errorf("on top of the other namespace's layer there is %+v", got)
	}
}

func TestNoLabelsMeansOrdinary(t *testing.T) {
	images := newDirImages(t)
	s := open(t, t.TempDir(), images)
	opt := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: chains(diffs("a", 1))[0]})
	if _, err := s.Prepare(t.Context(), "k", "", opt); err != nil {
		t.Fatal(err)
	}
	if images.pulls != 0 {
		t.Errorf("%d look-ups without a reference", images.pulls)
	}
}

func TestTwoNamespacesOfContainerd(t *testing.T) {
	// containerd gives the layers of each namespace other names; a streamed
	// layer must be found under its label and the parent it was asked with.
	images := newDirImages(t)
	ids := diffs("a", 2)
	images.add(t, "r/a", ids...)
	s := open(t, t.TempDir(), images)
	chain := chains(ids)
	labels := func(i int) snapshots.Opt {
		return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: chain[i], snapshotters.TargetRefLabel: "r/a"})
	}
	for _, base := range []string{"ns1/1/" + chain[0], "ns2/7/" + chain[0]} {
		if _, err := s.Prepare(t.Context(), base+" extract", ""); err != nil {
			t.Fatal(err)
		}
		if err := s.Commit(t.Context(), base, base+" extract"); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second time, it exists
			if _, err := s.Prepare(t.Context(), "extract on "+base, base, labels(1)); !errdefs.IsAlreadyExists(err) {
				t.Fatalf("on %s: %v, want already exists", base, err)
			}
		}
		var found []string
		filter := fmt.Sprintf("labels.%q==%s,parent==%q", snapshots.LabelSnapshotRef, chain[1], base)
		err := s.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
			found = append(found, i.Name)
			return nil
		}, filter)
		if err != nil || len(found) != 1 {
			t.Errorf("on %s: found %q, %v; want one snapshot", base, found, err)
		}
	}
}

func TestRestart(t *testing.T) {
	needRoot(t)
	images := newDirImages(t)
	ids := diffs("a", 2)
	images.add(t, "r/a", ids...)
	bad := images.add(t, "r/bad", diffs("bad", 1)...)
	root := t.TempDir()
	s, err := snapshot.Open(t.Context(), snapshot.Options{Root: root, Images: images})
	if err != nil {
		t.Fatal(err)
	}
	top, _ := pull(t, s, "r/a", ids)
	mounts, err := s.Prepare(t.Context(), "c", top)
	if err != nil {
		t.Fatal(err)
	}
	badTop, _ := pull(t, s, "r/bad", diffs("bad", 1))
	if _, err := s.Prepare(t.Context(), "cbad", badTop); err != nil {
		t.Fatal(err)
	}
	want := images.owned()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// The next process: no registry, one image broken.
	images.owners, images.attached = make(map[string][]string), 0
	images.reason = &mount.NotStreaming{Reason: mount.RegistryUnavailable, Err: context.DeadlineExceeded}
	images.broken[bad.ID] = true
	s = open(t, root, images)
	if got := images.owned(); got != want || images.attached != 0 {
		t.Errorf("%d owners after the restart, want %d; %d were mounted, which may take long: want none", got, want, images.attached)
	}
	again, err := s.Mounts(t.Context(), "c")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(mounts, again); diff != "" {
		t.Errorf("mounts (-before +after the restart):\n%s", diff)
	}
	if _, err := s.Mounts(t.Context(), "cbad"); !errdefs.IsUnavailable(err) {
		t.Errorf("mounts of the broken image: %v, want unavailable", err)
	}
}

// What the node lost of an image that containerd has is pulled again when a
// container needs it.
func TestLostImageIsPulledAgain(t *testing.T) {
	needRoot(t)
	images := newDirImages(t)
	ids := diffs("a", 3)
	img := images.add(t, "r/a", ids...)
	root := t.TempDir()
	s, err := snapshot.Open(t.Context(), snapshot.Options{Root: root, Images: images})
	if err != nil {
		t.Fatal(err)
	}
	top, _ := pull(t, s, "r/a", ids)
	if _, err := s.Prepare(t.Context(), "old", top); err != nil {
		t.Fatal(err)
	}
	want := images.owned()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	images.owners, images.lost[img.ID], images.pulls = make(map[string][]string), true, 0
	s = open(t, root, images)
	if images.pulls != 0 {
		t.Error("the start asks the registry")
	}
	images.reason = &mount.NotStreaming{Reason: mount.RegistryUnavailable, Err: context.DeadlineExceeded}
	if _, err := s.Prepare(t.Context(), "new", top); !errdefs.IsUnavailable(err) || mount.ReasonOf(err) != mount.RegistryUnavailable {
		t.Errorf("without the registry: %v, want unavailable and why", err)
	}
	images.reason = nil
	if _, err := s.Prepare(t.Context(), "new", top); err != nil {
		t.Errorf("a new container: %v", err)
	}
	if _, err := s.Mounts(t.Context(), "old"); err != nil {
		t.Errorf("the old container: %v", err)
	}
	if got := images.owned(); got != want+1 {
		t.Errorf("%d owners, want %d: all from before, and the new container", got, want+1)
	}
}

func TestRemoveGivesUpImages(t *testing.T) {
	images := newDirImages(t)
	ids := diffs("a", 2)
	images.add(t, "r/a", ids...)
	s := open(t, t.TempDir(), images)
	top, _ := pull(t, s, "r/a", ids)
	if _, err := s.Prepare(t.Context(), "c", top); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), top); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("removing an image in use: %v, want a failed precondition", err)
	}
	if got := images.owned(); got != 3 {
		t.Fatalf("%d owners, want one per layer and the container's", got)
	}
	for _, key := range []string{"c", top, chains(ids)[0]} { // children first
		if err := s.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if got := images.owned(); got != 0 {
		t.Errorf("%d owners after everything was removed: %v", got, images.owners)
	}
}

func TestFailedMountLeavesNothing(t *testing.T) {
	images := newDirImages(t)
	img := images.add(t, "r/a", diffs("a", 1)...)
	root := t.TempDir()
	s := open(t, root, images)
	top, _ := pull(t, s, "r/a", img.DiffIDs)
	images.broken[img.ID] = true
	if _, err := s.Prepare(t.Context(), "c", top); !errdefs.IsUnavailable(err) {
		t.Fatalf("preparing on an image that can't be mounted: %v, want unavailable", err)
	}
	if _, err := s.Stat(t.Context(), "c"); !errdefs.IsNotFound(err) {
		t.Errorf("the failed snapshot: %v, want not found", err)
	}
	entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
	if err != nil || len(entries) != 0 {
		t.Errorf("left over: %v, %v", entries, err)
	}
}

func TestReservedLabels(t *testing.T) {
	images := newDirImages(t)
	img := images.add(t, "r/a", diffs("a", 1)...)
	s := open(t, t.TempDir(), images)
	forged := map[string]string{"sluice.image": img.ID.String(), "sluice.layer": "0", "sluice.layers": "1"}
	if _, err := s.Prepare(t.Context(), "k", "", snapshots.WithLabels(forged)); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), "forged", "k", snapshots.WithLabels(forged)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(t.Context(), snapshots.Info{Name: "forged", Labels: forged}, "labels.sluice.image", "labels.sluice.layer"); err != nil {
		t.Fatal(err)
	}
	if info, err := s.Stat(t.Context(), "forged"); err != nil || info.Labels["sluice.image"] != "" {
		t.Errorf("a client made its snapshot a streamed one: %v, %v", info.Labels, err)
	}
	top, _ := pull(t, s, "r/a", img.DiffIDs)
	if _, err := s.Update(t.Context(), snapshots.Info{Name: top, Labels: map[string]string{"x": "y"}}); err != nil {
		t.Fatal(err)
	}
	if info, err := s.Stat(t.Context(), top); err != nil || info.Labels["sluice.image"] != img.ID.String() || info.Labels["x"] != "y" {
		t.Errorf("a client's update left the labels %v, %v", info.Labels, err)
	}
}

func TestCleanup(t *testing.T) {
	root := t.TempDir()
	images := newDirImages(t)
	s := open(t, root, images)
	if _, err := s.Prepare(t.Context(), "k", ""); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, filepath.Join(root, "snapshots", "new-123", "fs", "x"), "left by a crash")
	mustWrite(t, filepath.Join(root, "snapshots", "999", "fs", "x"), "left by a crash")
	if err := s.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
	if err != nil || len(entries) != 1 || entries[0].Name() != "1" {
		t.Errorf("left: %v, %v; want only the snapshot's own", entries, err)
	}
	if images.collected != 1 {
		t.Errorf("images were collected %d times, want once", images.collected)
	}
}

// A snapshot whose record couldn't be stored leaves a directory with the ID that
// the next one gets, which may be made while left-over directories are removed.
func TestCleanupSparesTheNextSnapshot(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, nil)
	big := filepath.Join(root, "snapshots", "0")
	for i := range 3000 {
		mustWrite(t, filepath.Join(big, "fs", fmt.Sprint(i)), "")
	}
	next := filepath.Join(root, "snapshots", "1", "fs")
	mustWrite(t, filepath.Join(next, "old"), "")
	cleaned := make(chan error)
	go func() { cleaned <- s.Cleanup(t.Context()) }()
	for { // until the removal has begun
		if left, err := os.ReadDir(filepath.Join(big, "fs")); err != nil || len(left) < 3000 {
			break
		}
	}
	_, err := s.Prepare(t.Context(), "k", "")
	if err := errors.Join(err, <-cleaned); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(next); err != nil || len(left) != 0 {
		t.Fatalf("the new snapshot's directory has %v, %v", left, err)
	}
}
