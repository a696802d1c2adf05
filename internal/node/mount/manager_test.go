package mount_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/artifact"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/oci"
)

func TestPullAttachRelease(t *testing.T) {
	n, manifest := prepared(t)
	m := n.start()
	m.Settled()
	img, dir := n.pulled(manifest, "a")
	if len(img.DiffIDs) != 3 || img.Manifest != manifest || img.Reference != testRef {
		t.Errorf("image is %+v", img)
	}
	checkImage(t, dir)
	again, err := m.Attach(t.Context(), img.ID, mount.Merged, "b")
	if err != nil || again != dir {
		t.Errorf("a second owner got %q, %v; want the same mount", again, err)
	}
	for _, owner := range []string{"a", "b", "nobody"} {
		m.Sweep(t.Context(), time.Now().Add(time.Hour))
		if owner != "nobody" {
			if at, err := plane.MountAt(dir); err != nil || at == nil {
				t.Fatalf("while %s owns it the mount went: %v", owner, err)
			}
		}
		if err := m.Release(t.Context(), owner); err != nil {
			t.Fatal(err)
		}
	}
	m.Sweep(t.Context(), time.Now().Add(time.Hour))
	if at, err := plane.MountAt(dir); err != nil || at != nil {
		t.Errorf("nobody owns it and it's mounted: %v, %v", at, err)
	}
	if _, err := m.Attach(t.Context(), img.ID, mount.Merged, "a"); !errors.Is(err, mount.ErrUnknownImage) {
		t.Errorf("attaching a removed image: %v", err)
	}
	entries, err := os.ReadDir(filepath.Join(n.root, "node", "images"))
	if err != nil || len(entries) != 0 {
		t.Errorf("left of the image: %v, %v", entries, err)
	}
}

func TestHoldKeepsImageNotMount(t *testing.T) {
	n, manifest := prepared(t)
	m := n.start()
	img, dir := n.pulled(manifest, "")
	m.Sweep(t.Context(), time.Now().Add(time.Hour))
	if at, _ := plane.MountAt(dir); at == nil {
		t.Error("something was collected before Settled")
	}
	m.Settled()
	if err := m.Hold(t.Context(), img.ID, 2, "h"); err != nil {
		t.Fatal(err)
	}
	m.Sweep(t.Context(), time.Now().Add(time.Hour))
	if at, _ := plane.MountAt(dir); at != nil {
		t.Error("a mount without owner stays")
	}
	n.reg.down.Store(true)
	if _, err := m.Pull(t.Context(), testRef, manifest); err != nil {
		t.Errorf("an image that is here, without the registry: %v", err)
	}
}

func TestOneLookupPerPull(t *testing.T) {
	n, manifest := prepared(t)
	n.start()
	var wg sync.WaitGroup
	for range 28 {
		wg.Go(func() {
			if _, err := n.m.Pull(t.Context(), testRef, manifest); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := n.reg.listings.Load(); got != 1 {
		t.Errorf("%d look-ups for 28 layers", got)
	}
	other := oci.DigestOf([]byte("not converted"))
	for range 28 {
		if _, err := n.m.Pull(t.Context(), testRef, other); mount.ReasonOf(err) != mount.NoStreamingArtifact {
			t.Fatalf("an image without artifact: %v", err)
		}
	}
	// Its own, and that of what the tag names.
	if got := n.reg.listings.Load(); got > 3 {
		t.Errorf("%d look-ups in all", got)
	}
}

func TestPullByTagOnly(t *testing.T) {
	n, manifest := prepared(t)
	n.start()
	for range 3 {
		img, err := n.m.Pull(t.Context(), testRef, "")
		if err != nil || img.Manifest != manifest {
			t.Fatalf("by tag: %+v, %v", img, err)
		}
	}
	if got := n.reg.listings.Load(); got != 1 {
		t.Errorf("%d look-ups", got)
	}
}

func TestIndexAndPlatforms(t *testing.T) {
	n := newNode(t)
	arm := oci.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
	n.opts.Platform = here
	descs := n.push(testRepo, "v1", testLayers(), here, arm)
	n.convert(testRepo, "v1")
	m := n.start()
	for what, digest := range map[string]oci.Digest{"platform manifest": descs[0].Digest, "index": descs[2].Digest, "tag": ""} {
		img, err := m.Pull(t.Context(), testRef, digest)
		if err != nil {
			t.Fatalf("by %s: %v", what, err)
		}
		dir, err := m.Attach(t.Context(), img.ID, mount.Merged, what)
		if err != nil {
			t.Fatalf("by %s: %v", what, err)
		}
		checkImage(t, dir)
	}
	if _, err := m.Pull(t.Context(), testRef, descs[1].Digest); mount.ReasonOf(err) != mount.PlatformUnsupported {
		t.Errorf("another platform's image: %v", err)
	}
}

// artifactOf returns the digest and parsed blobs of the test image's artifact.
func (n *node) artifactOf(manifest oci.Digest) oci.Descriptor {
	n.t.Helper()
	for d, err := range n.reg.Registry.Referrers(n.t.Context(), testRepo, manifest, oci.ArtifactTypeStreaming) {
		if err != nil {
			n.t.Fatal(err)
		}
		return d
	}
	n.t.Fatal("no artifact")
	return oci.Descriptor{}
}

func TestWhyNot(t *testing.T) {
	for name, test := range map[string]struct {
		arrange func(n *node, manifest oci.Digest)
		want    mount.Reason
	}{
		"down": {func(n *node, _ oci.Digest) { n.reg.down.Store(true) }, mount.RegistryUnavailable},
		"hangs": {func(n *node, _ oci.Digest) {
			n.reg.hang.Store(true)
			n.opts.Decide = 300 * time.Millisecond
		}, mount.RegistryUnavailable},
		"denied":        {func(n *node, _ oci.Digest) { n.reg.denied.Store(true) }, mount.Unauthorized},
		"disabled":      {func(n *node, _ oci.Digest) { n.opts.Disabled = true }, mount.Disabled},
		"not from here": {func(n *node, _ oci.Digest) { n.opts.From = []string{"elsewhere.example.com"} }, mount.Disabled},
		"corrupt manifest": {func(n *node, d oci.Digest) {
			n.reg.setCorrupt(n.artifactOf(d).Digest)
		}, mount.IntegrityFailure},
		"artifact of another image": {func(n *node, _ oci.Digest) {
			other := n.push(testRepo, "other", testLayers()[:1], here)[0]
			n.convert(testRepo, "other")
			lie := n.artifactOf(other.Digest)
			n.reg.referrers = func([]oci.Descriptor) []oci.Descriptor { return []oci.Descriptor{lie} }
		}, mount.IntegrityFailure},
		"artifact that isn't there": {func(n *node, _ oci.Digest) {
			n.reg.referrers = func(l []oci.Descriptor) []oci.Descriptor {
				l[0].Digest = oci.DigestOf([]byte("nothing"))
				return l
			}
		}, mount.NoStreamingArtifact},
		"artifact for another platform": {func(n *node, _ oci.Digest) {
			n.opts.Platform = oci.Platform{OS: "linux", Architecture: "riscv64"}
		}, mount.PlatformUnsupported},
		"platform lie": {func(n *node, _ oci.Digest) {
			n.opts.Platform = oci.Platform{OS: "linux", Architecture: "riscv64"}
			n.reg.referrers = func(l []oci.Descriptor) []oci.Descriptor {
				l[0].Annotations = nil
				return l
			}
		}, mount.PlatformUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			n, manifest := prepared(t)
			test.arrange(n, manifest)
			m := n.start()
			began := time.Now()
			_, err := m.Pull(t.Context(), testRef, manifest)
			if got := mount.ReasonOf(err); got != test.want {
				t.Errorf("reason %q, want %q: %v", got, test.want, err)
			}
			if d := time.Since(began); d > 5*time.Second {
				t.Errorf("deciding took %v", d)
			}
			status := m.Status(t.Context())
			if len(status.Pulls) != 1 || status.Pulls[0].Reason != test.want || len(status.NotStreaming) != 1 || status.NotStreaming[0].Remedy == "" {
				t.Errorf("status says %+v", status.Pulls)
			}
		})
	}
}

func TestEveryCorruptPieceIsFound(t *testing.T) {
	n, manifest := prepared(t)
	n.unembed(manifest)
	content := n.manifest(testRepo, n.artifactOf(manifest).Digest)
	seen := make(map[string]bool)
	for _, d := range blobsOf(t, content) {
		seen[d.MediaType] = true
		t.Run(d.MediaType, func(t *testing.T) {
			n, manifest := prepared(t)
			n.unembed(manifest)
			n.reg.setCorrupt(d.Digest)
			m := n.start()
			img, err := m.Pull(t.Context(), testRef, manifest)
			needed := d.MediaType == artifact.MediaTypeMetadata || d.MediaType == artifact.MediaTypeTable
			if needed || err != nil {
				if got := mount.ReasonOf(err); got != mount.IntegrityFailure || !needed {
					t.Errorf("reason %q: %v", got, err)
				}
				return
			}
			// What isn't needed to mount may be bad; no wrong byte may come of
			// it.
			dir, err := m.Attach(t.Context(), img.ID, mount.Merged, "a")
			if err != nil {
				t.Fatal(err)
			}
			for name, want := range map[string][]byte{"big": noise(1, 3<<20), "top": noise(2, 700_000), "etc/hello": []byte("second"), "bin/true": program()} {
				got, err := os.ReadFile(filepath.Join(dir, name))
				if err != nil && !errors.Is(err, unix.EIO) {
					t.Errorf("%s: %v", name, err)
				}
				if err == nil && !bytes.Equal(got, want) {
					t.Errorf("%s has wrong bytes", name)
				}
			}
			if d.MediaType == artifact.MediaTypeLayerMetadata {
				for i := range img.DiffIDs {
					if _, err := m.Attach(t.Context(), img.ID, mount.Part(i), "a"); mount.ReasonOf(err) == mount.IntegrityFailure {
						return
					}
				}
				t.Error("no layer's metadata was found corrupt")
			}
		})
	}
	if len(seen) != 5 {
		t.Errorf("the artifact has blobs of types %v; want metadata, table, boot pack, layers and their metadata", seen)
	}
}

func TestInUseStays(t *testing.T) {
	n, manifest := prepared(t)
	m := n.start()
	m.Settled()
	_, dir := n.pulled(manifest, "")
	merged, upper, work := filepath.Join(n.root, "merged"), filepath.Join(n.root, "upper"), filepath.Join(n.root, "work")
	for _, d := range []string{merged, upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("overlay", merged, "overlay", 0, "lowerdir="+dir+",upperdir="+upper+",workdir="+work); err != nil {
		t.Fatal(err)
	}
	m.Sweep(t.Context(), time.Now().Add(time.Hour))
	checkImage(t, merged)
	eventually(t, "the overlay is unmounted", func() bool { // see unmount
		err := plane.Unmount(merged, false)
		if err != nil && !errors.Is(err, plane.ErrBusy) {
			t.Fatal(err)
		}
		return err == nil
	})
	m.Sweep(t.Context(), time.Now().Add(time.Hour))
	if at, _ := plane.MountAt(dir); at != nil {
		t.Error("it stays when nobody uses it any more")
	}
}

// The mount table knows nothing of the symbolic link by which the root is named.
func TestRootBehindSymlink(t *testing.T) {
	n, manifest := prepared(t)
	n.opts.Root = filepath.Join(n.root, "link")
	real := filepath.Join(n.root, "node")
	if err := errors.Join(os.Mkdir(real, 0o700), os.Symlink("node", n.opts.Root)); err != nil {
		t.Fatal(err)
	}
	m := n.start()
	m.Settled()
	_, dir := n.pulled(manifest, "")
	bound := filepath.Join(n.root, "bound")
	if err := errors.Join(os.Mkdir(bound, 0o755), unix.Mount(dir, bound, "", unix.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	m.Sweep(t.Context(), time.Now().Add(time.Hour))
	if at, err := plane.MountAt(filepath.Join(real, "m", filepath.Base(dir))); err != nil || at == nil {
		t.Errorf("a mount in use was unmounted: %v", err)
	}
	n.stop()
	n.start()
	checkImage(t, bound)
}

func TestRestart(t *testing.T) {
	n, manifest := prepared(t)
	n.opts.NoFill = false
	n.start()
	img, dir := n.pulled(manifest, "container")
	open, err := os.Open(filepath.Join(dir, "big"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	n.waitComplete(img.ID)
	n.stop()

	// The registry is down while the daemon starts again.
	n.reg.down.Store(true)
	m := n.start()
	if _, err := m.Attach(t.Context(), img.ID, mount.Merged, "container"); err != nil {
		t.Fatal(err)
	}
	m.Settled()
	m.Sweep(t.Context(), time.Now().Add(time.Hour))
	checkImage(t, dir)
	b := make([]byte, 100)
	if _, err := open.ReadAt(b, 2<<20); err != nil || string(b) != string(noise(1, 3<<20)[2<<20:][:100]) {
		t.Errorf("a file that was open before the restart: %v", err)
	}
	if _, err := m.Attach(t.Context(), img.ID, mount.Part(1), "other"); err != nil {
		t.Errorf("a layer's own mount without the registry: %v", err)
	}
	open.Close()

	n.reboot()
	m = n.start()
	dir, err = m.Attach(t.Context(), img.ID, mount.Merged, "container")
	if err != nil {
		t.Fatalf("after a reboot: %v", err)
	}
	checkImage(t, dir)
}

// waitComplete waits until all of an image is here.
func (n *node) waitComplete(id oci.Digest) {
	n.t.Helper()
	eventually(n.t, "the image is complete", func() bool {
		for _, img := range n.m.Status(n.t.Context()).Images {
			if img.Artifact == id && img.Complete {
				return true
			}
		}
		return false
	})
}

func TestRestartBeforeEverythingCame(t *testing.T) {
	n, manifest := prepared(t)
	n.start()
	_, dir := n.pulled(manifest, "container")
	n.stop()
	read := make(chan error, 1)
	go func() { // blocks until there's a daemon again
		_, err := os.ReadFile(filepath.Join(dir, "big"))
		read <- err
	}()
	n.start()
	select {
	case err := <-read:
		if err != nil {
			t.Errorf("a read during the restart: %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("a read during the restart never ended")
	}
	checkImage(t, dir)
}

func TestBrokenImageIsAlone(t *testing.T) {
	n, manifest := prepared(t)
	n.start()
	img, _ := n.pulled(manifest, "container")
	n.push(testRepo, "v2", testLayers()[:2], here)
	n.convert(testRepo, "v2")
	good, err := n.m.Pull(t.Context(), testHost+"/"+testRepo+":v2", "")
	if err != nil {
		t.Fatal(err)
	}
	n.reboot()
	dirs, err := filepath.Glob(filepath.Join(n.root, "node", "images", img.ID.Encoded()[:8]+"*", "manifest.json"))
	if err != nil || len(dirs) != 1 {
		t.Fatal(dirs, err)
	}
	if err := os.Truncate(dirs[0], 10); err != nil {
		t.Fatal(err)
	}
	m := n.start()
	if _, err := m.Attach(t.Context(), good.ID, mount.Merged, "x"); err != nil {
		t.Errorf("the good image: %v", err)
	}
	if _, err := m.Attach(t.Context(), img.ID, mount.Merged, "x"); !errors.Is(err, mount.ErrUnknownImage) {
		t.Errorf("the broken image: %v", err)
	}
	if _, dir := n.pulled(manifest, "y"); t.Failed() == false {
		checkImage(t, dir) // pulled anew, it's whole
	}
}

func TestLayersOwnMounts(t *testing.T) {
	n, manifest := prepared(t)
	m := n.start()
	img, _ := n.pulled(manifest, "")
	dir, err := m.Attach(t.Context(), img.ID, mount.Part(1), "p")
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(dir, "etc/gone"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("the second layer's whiteout is %o %d, %v", st.Mode, st.Rdev, err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "etc/hello")); err != nil || string(got) != "second" {
		t.Errorf("the second layer's file: %q, %v", got, err)
	}
	if _, err := m.Attach(t.Context(), img.ID, mount.Part(3), "p"); err == nil {
		t.Error("a layer that the image doesn't have was mounted")
	}
}

func TestUsageGrows(t *testing.T) {
	n, manifest := prepared(t)
	m := n.start()
	img, dir := n.pulled(manifest, "a")
	if _, err := os.ReadFile(filepath.Join(dir, "big")); err != nil {
		t.Fatal(err)
	}
	// Readers have content before the disk does.
	eventually(t, "layer 0 uses the 3 MiB that were read", func() bool {
		got, err := m.Usage(t.Context(), img.ID, 0)
		return err == nil && got >= 3<<20
	})
	if _, err := m.Usage(t.Context(), img.ID, 7); err == nil {
		t.Error("a layer that isn't there has a size")
	}
}

func TestPullEndsWithItsCaller(t *testing.T) {
	n, manifest := prepared(t)
	n.reg.hang.Store(true)
	m := n.start()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := m.Pull(ctx, testRef, manifest); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a caller who gave up got %v", err)
	}
}

func TestBigTableFollows(t *testing.T) {
	n, manifest := prepared(t)
	n.unembed(manifest)
	n.opts.SetWholeTable(1)
	n.start()
	img, dir := n.pulled(manifest, "a")
	if root, _ := filepath.Glob(filepath.Join(n.root, "node", "images", "*", "root")); len(root) != 1 {
		t.Errorf("stored roots of tables: %q, want one", root)
	}
	checkImage(t, dir)
	eventually(t, "the whole table is here", func() bool {
		table, _ := filepath.Glob(filepath.Join(n.root, "node", "images", "*", "table"))
		return len(table) == 1
	})
	n.stop()
	n.reg.down.Store(true)
	m := n.start()
	if _, err := m.Attach(t.Context(), img.ID, mount.Merged, "a"); err != nil {
		t.Fatal(err)
	}
	checkImage(t, dir) // what was read before is here
}

func TestBigTableCorrupt(t *testing.T) {
	n, manifest := prepared(t)
	n.unembed(manifest)
	n.opts.SetWholeTable(1)
	for _, d := range blobsOf(t, n.manifest(testRepo, n.artifactOf(manifest).Digest)) {
		if d.MediaType == artifact.MediaTypeTable {
			n.reg.setCorrupt(d.Digest)
		}
	}
	n.start()
	if _, err := n.m.Pull(t.Context(), testRef, manifest); mount.ReasonOf(err) != mount.IntegrityFailure {
		t.Errorf("a corrupt table's root: %v", err)
	}
}
