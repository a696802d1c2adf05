package pulled_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"sluice/internal/convert"
	"sluice/internal/node/plane"
	"sluice/internal/node/pulled"
	"sluice/oci"
)

// noise is content that doesn't compress.
func noise(seed uint64, n int) string {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 0))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return string(b)
}

func TestPulledImagesAreMountedMerged(t *testing.T) {
	for _, docker := range []bool{false, true} {
		reg := newRegistry(t)
		big := noise(1, 700_000)
		base := tarOf(t, "etc/a", "base", "etc/b", "base", "gone", "base", "dir/old", "base", "big", big)
		middle := tarOf(t, "etc/a", "middle", ".wh.gone", "", "dir/.wh..wh..opq", "", "dir/new", "middle")
		top := sparseTar(t)
		desc := reg.image("v1", "amd64", docker, nil, base, middle, top, base[:len(base):len(base)], tarOf(t, "etc/a", "last"))
		root := t.TempDir()
		opts := pulled.Options{}
		if _, err := plane.Probe(root, plane.Loop); docker && err == nil {
			opts.Mode = plane.Loop // as on old kernels
		}
		s := open(t, root, reg, opts)
		var steps []pulled.Progress
		img, err := s.Pull(t.Context(), host+"/"+repo+":v1", "me", func(p pulled.Progress) { steps = append(steps, p) })
		if err != nil {
			t.Fatal(err)
		}
		if img.ID != desc.Digest || len(img.DiffIDs) != 5 || img.Platform.Architecture != "amd64" || img.Size < 700_000 {
			t.Errorf("image %+v", img)
		}
		finished := make(map[int]int)
		for _, p := range steps {
			if p.Finished {
				finished[p.Layer]++
			}
			if p.Layers != 5 || p.Done > p.Total {
				t.Errorf("progress %+v", p)
			}
		}
		if diff := cmp.Diff(map[int]int{0: 1, 1: 1, 2: 1, 3: 1, 4: 1}, finished); diff != "" {
			t.Errorf("layers that were finished: %s", diff)
		}
		want := map[string]string{
			"etc/a": "last", "etc/b": "base", "gone": "base", "dir/old": "base", "dir/new": "middle", "big": big,
			"sparse": "head" + strings.Repeat("\x00", 1<<20-8) + "tail",
		}
		// A second process finds it, without the registry.
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		reg.down.Store(true)
		s = open(t, root, reg, opts)
		if again := pull(t, s, host+"/"+repo+"@"+desc.Digest.String(), "me"); !cmp.Equal(again, img) {
			t.Errorf("after a start: %s", cmp.Diff(img, again))
		}
		if config, err := s.Config(t.Context(), img.ID); err != nil || !strings.Contains(string(config), `"linux"`) {
			t.Errorf("config %s, %v", config, err)
		}
		if _, err := s.Pull(t.Context(), host+"/"+repo+":v1", "me", nil); !errors.Is(err, pulled.ErrUnavailable) {
			t.Errorf("what the tag means: %v", err)
		}
		if diff := cmp.Diff(want, show(t, s, img.ID)); diff != "" {
			t.Errorf("(-want +got) %.2000s", diff)
		}
	}
}

func TestPlatformOfAnIndex(t *testing.T) {
	reg := newRegistry(t)
	on := func(d oci.Descriptor, arch string) oci.Descriptor {
		d.Platform = &oci.Platform{OS: "linux", Architecture: arch}
		return d
	}
	amd := reg.image("", "amd64", false, nil, tarOf(t, "arch", "amd64"))
	arm := reg.image("", "arm64", true, nil, tarOf(t, "arch", "arm64"))
	attestation := on(reg.image("", "unknown", false, nil, tarOf(t, "x", "y")), "amd64")
	attestation.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
	index := func(tag string, mediaType string, entries ...oci.Descriptor) oci.Descriptor {
		ix := oci.Index{MediaType: mediaType, Manifests: entries}
		ix.SchemaVersion = 2
		return reg.manifest(tag, mediaType, ix)
	}
	both := index("both", oci.MediaTypeIndex, attestation, on(arm, "arm64"), on(amd, "amd64"))
	index("list", oci.MediaTypeDockerManifestList, on(amd, "amd64"), on(arm, "arm64"))
	index("silent", oci.MediaTypeIndex, arm, amd)
	index("arm", oci.MediaTypeIndex, on(arm, "arm64"))
	s := open(t, t.TempDir(), reg, pulled.Options{})
	for _, tag := range []string{"silent", "both", "list", "both"} {
		if img := pull(t, s, host+"/"+repo+":"+tag, "me"); img.ID != amd.Digest {
			t.Errorf("%s is %s", tag, img.ID)
		}
	}
	reg.down.Store(true)
	if img := pull(t, s, host+"/"+repo+"@"+both.Digest.String(), "me"); img.ID != amd.Digest {
		t.Errorf("by the index's digest it is %s", img.ID)
	}
	reg.down.Store(false)
	if _, err := s.Pull(t.Context(), host+"/"+repo+":arm", "me", nil); err == nil || !strings.Contains(err.Error(), "only for linux/arm64") {
		t.Errorf("an index without this platform: %v", err)
	}
	if n := len(s.Images()); n != 1 {
		t.Errorf("%d images", n)
	}
}

func TestBadImages(t *testing.T) {
	good := tarOf(t, "a", noise(2, 100_000))
	for name, test := range map[string]struct {
		change func(*registry, *oci.ImageManifest, *oci.ImageConfig)
		tars   [][]byte
		opts   pulled.Options
		want   error
		says   string
	}{
		"wrong diff ID": {
			change: func(_ *registry, _ *oci.ImageManifest, c *oci.ImageConfig) { c.RootFS.DiffIDs[1] = oci.DigestOf(nil) },
			want:   convert.ErrContent, says: "diff ID",
		},
		"truncated gzip": {
			change: func(r *registry, m *oci.ImageManifest, _ *oci.ImageConfig) {
				z := gzipped(r.t, good)
				m.Layers[1] = r.blob(oci.MediaTypeLayerGzip, z[:len(z)/2])
			},
			want: convert.ErrContent,
		},
		"damaged on the way": {
			change: func(r *registry, m *oci.ImageManifest, _ *oci.ImageConfig) { r.damaged = m.Layers[1].Digest },
		},
		"no tar": {
			change: func(r *registry, m *oci.ImageManifest, c *oci.ImageConfig) {
				garbage := []byte(noise(3, 5000))
				m.Layers[1] = r.blob(oci.MediaTypeLayer, garbage)
				c.RootFS.DiffIDs[1] = oci.DigestOf(garbage)
			},
			want: convert.ErrContent,
		},
		"out of the root": {tars: [][]byte{tarOf(t, "../../etc/passwd", "x")}, want: convert.ErrContent, says: "leads out"},
		"too large":       {opts: pulled.Options{MaxImage: 150_000}, want: pulled.ErrNoSpace, says: "decompressed"},
		"disk full":       {opts: pulled.Options{KeepFree: 1 << 60}, want: pulled.ErrNoSpace, says: "remove images"},
		"fewer diff IDs": {
			change: func(_ *registry, _ *oci.ImageManifest, c *oci.ImageConfig) { c.RootFS.DiffIDs = c.RootFS.DiffIDs[:1] },
			want:   convert.ErrImageNotRunnable,
		},
		"a layer that never was pushed": {
			change: func(_ *registry, m *oci.ImageManifest, _ *oci.ImageConfig) {
				m.Layers[1].Annotations = map[string]string{"x": "y"} // so that it is another manifest
			},
			want: oci.ErrBlobUnknown,
		},
		"no image at all": {want: oci.ErrNameUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			reg := newRegistry(t)
			tars := append([][]byte{tarOf(t, "b", noise(4, 100_000))}, good)
			tars = append(tars[:2:2], test.tars...)
			var second oci.Digest
			if name != "no image at all" {
				reg.image("v1", "amd64", false, func(m *oci.ImageManifest, c *oci.ImageConfig) {
					second = m.Layers[1].Digest
					if test.change != nil {
						test.change(reg, m, c)
					}
				}, tars...)
			}
			if name == "a layer that never was pushed" {
				if err := reg.DeleteBlob(t.Context(), repo, second); err != nil {
					t.Fatal(err)
				}
			}
			root := t.TempDir()
			s := open(t, root, reg, test.opts)
			img, err := s.Pull(t.Context(), host+"/"+repo+":v1", "me", nil)
			if err == nil {
				t.Fatalf("it was pulled: %+v", img)
			}
			if test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%v; want %v and %q", err, test.want, test.says)
			}
			if errors.Is(err, pulled.ErrUnavailable) {
				t.Errorf("it's the registry's: %v", err)
			}
			s.Collect(t.Context())
			if rest := left(t, root); rest != "" || len(s.Images()) != 0 {
				t.Errorf("it left %s", rest)
			}
		})
	}
}

// A connection that breaks is resumed where it broke, and a pull that was given up
// goes on with the layers that were complete.
func TestPullGoesOn(t *testing.T) {
	reg := newRegistry(t)
	first, second := tarOf(t, "a", noise(5, 300_000)), tarOf(t, "b", noise(6, 300_000))
	var layers []oci.Descriptor
	reg.image("v1", "amd64", false, func(m *oci.ImageManifest, _ *oci.ImageConfig) { layers = m.Layers }, first, second)
	root := t.TempDir()
	s := open(t, root, reg, pulled.Options{Layers: 1})
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.Pull(ctx, host+"/"+repo+":v1", "me", func(p pulled.Progress) {
		if p.Finished {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("a pull that was given up: %v", err)
	}
	reg.cuts.Store(3)
	img := pull(t, s, host+"/"+repo+":v1", "me")
	if n := reg.asked(layers[0].Digest); n != 1 {
		t.Errorf("the first layer was fetched %d times", n)
	}
	if diff := cmp.Diff(map[string]string{"a": noise(5, 300_000), "b": noise(6, 300_000)}, show(t, s, img.ID)); diff != "" {
		t.Errorf("(-want +got) %.200s", diff)
	}
}

func TestConcurrentPullsFetchOnce(t *testing.T) {
	reg := newRegistry(t)
	shared := tarOf(t, "shared", noise(7, 400_000))
	var layer oci.Digest
	note := func(m *oci.ImageManifest, _ *oci.ImageConfig) { layer = m.Layers[0].Digest }
	for i := range 3 {
		reg.image(fmt.Sprint("v", i), "amd64", false, note, shared, tarOf(t, "own", fmt.Sprint(i)))
	}
	s := open(t, t.TempDir(), reg, pulled.Options{})
	atOnce := func(then func(i int, img pulled.Image)) {
		t.Helper()
		var wg sync.WaitGroup
		for i := range 12 {
			wg.Go(func() {
				img, err := s.Pull(t.Context(), fmt.Sprintf("%s/%s:v%d", host, repo, i%3), fmt.Sprint("owner", i), nil)
				if err != nil {
					t.Error(err)
					return
				}
				then(i, img)
			})
		}
		wg.Wait()
	}
	atOnce(func(int, pulled.Image) {})
	if n := reg.asked(layer); n != 1 {
		t.Errorf("the shared layer was fetched %d times", n)
	}
	for i := range 12 {
		if err := s.Release(t.Context(), fmt.Sprint("owner", i)); err != nil {
			t.Error(err)
		}
	}
	s.Collect(t.Context())
	atOnce(func(i int, img pulled.Image) {
		if i%2 == 0 { // others use and collect meanwhile
			if err := s.Release(t.Context(), fmt.Sprint("owner", i)); err != nil {
				t.Error(err)
			}
			s.Collect(t.Context())
		} else if err := s.Hold(t.Context(), img.ID, fmt.Sprint("again", i)); err != nil {
			t.Error(err)
		}
	})
	if n := len(s.Images()); n != 3 {
		t.Errorf("%d images are here", n)
	}
}

func TestCollect(t *testing.T) {
	reg := newRegistry(t)
	shared := tarOf(t, "shared", "x")
	reg.image("a", "amd64", false, nil, shared, tarOf(t, "own", "a"))
	reg.image("b", "amd64", false, nil, shared, tarOf(t, "own", "b"))
	root := t.TempDir()
	s := open(t, root, reg, pulled.Options{})
	a, b := pull(t, s, host+"/"+repo+":a", "holder"), pull(t, s, host+"/"+repo+":b", "other")
	if err := s.Release(t.Context(), "other"); err != nil {
		t.Fatal(err)
	}
	s.Collect(t.Context())
	if _, err := s.Config(t.Context(), b.ID); !errors.Is(err, pulled.ErrUnknownImage) {
		t.Errorf("the image that nobody has: %v", err)
	}
	if n := len(strings.Fields(left(t, root))); n != 2+1 {
		t.Errorf("left are %s", left(t, root))
	}
	if got := show(t, s, a.ID); got["own"] != "a" || got["shared"] != "x" {
		t.Errorf("the other shows %q", got)
	}
	// What is mounted stays, also when its holder went, and what is open stays mounted.
	dirs, err := s.Stack(t.Context(), a.ID, "user")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Release(t.Context(), "holder"); err != nil {
		t.Fatal(err)
	}
	s.Collect(t.Context())
	f, err := os.Open(filepath.Join(dirs[0], "own"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Release(t.Context(), "user"); err != nil {
		t.Error(err)
	}
	s.Collect(t.Context())
	if at, err := plane.MountAt(dirs[0]); err != nil || at == nil {
		t.Errorf("what is open: mounted %v, %v", at, err)
	}
	f.Close()
	s.Collect(t.Context())
	if rest := left(t, root); rest != "" {
		t.Errorf("left are %s", rest)
	}
}

// What the disk has changed is noticed before somebody gets it.
func TestDamageOnTheDisk(t *testing.T) {
	reg := newRegistry(t)
	shared := tarOf(t, "shared", noise(8, 100_000))
	var layer oci.Digest
	reg.image("a", "amd64", false, nil, shared, tarOf(t, "own", "a"))
	reg.image("b", "amd64", false, func(m *oci.ImageManifest, _ *oci.ImageConfig) { layer = m.Layers[0].Digest }, shared, tarOf(t, "own", "b"))
	root := t.TempDir()
	s := open(t, root, reg, pulled.Options{})
	a := pull(t, s, host+"/"+repo+":a", "me")
	tar := filepath.Join(root, "layers", oci.DigestOf(shared).Encoded(), "tar")
	content, err := os.ReadFile(tar)
	if err != nil {
		t.Fatal(err)
	}
	content[50_000] ^= 1
	if err := os.WriteFile(tar, content, 0o600); err != nil {
		t.Fatal(err)
	}
	b := pull(t, s, host+"/"+repo+":b", "me")
	if n := reg.asked(layer); n != 2 {
		t.Errorf("the damaged layer was fetched %d times", n)
	}
	for _, id := range []oci.Digest{a.ID, b.ID} {
		if got := show(t, s, id); got["shared"] != noise(8, 100_000) {
			t.Errorf("%s shows what was damaged", id)
		}
	}
	meta := filepath.Join(root, "images", a.ID.Encoded(), "image.erofs")
	content, err = os.ReadFile(meta)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(meta, bytes.Replace(content, []byte("own"), []byte("OWN"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if dirs, err := s.Stack(t.Context(), a.ID, "me"); err == nil || !strings.Contains(err.Error(), "pull it again") {
		t.Errorf("damaged metadata is mounted at %v: %v", dirs, err)
	}
	// An image of which something is missing isn't here after a start.
	if err := os.Remove(tar); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, root, reg, pulled.Options{})
	if n := len(s.Images()); n != 0 {
		t.Errorf("%d images are here", n)
	}
	if got := show(t, s, pull(t, s, host+"/"+repo+":a", "me").ID); got["own"] != "a" || got["shared"] != noise(8, 100_000) {
		t.Error("pulled again, it shows something else")
	}
}

// A disk that is full fails the pull, leaves nothing behind, and fails nothing else.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small disk needs root")
	}
	reg := newRegistry(t)
	reg.image("big", "amd64", false, nil, tarOf(t, "a", noise(11, 300_000)), tarOf(t, "b", noise(12, 600_000)))
	reg.image("small", "amd64", false, nil, tarOf(t, "a", "small"))
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=700k"); err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = plane.Unmount(root, true) })
	s := open(t, filepath.Join(root, "store"), reg, pulled.Options{})
	for range 2 {
		if _, err := s.Pull(t.Context(), host+"/"+repo+":big", "me", nil); !errors.Is(err, pulled.ErrNoSpace) {
			t.Errorf("what is larger than the disk: %v", err)
		}
		s.Collect(t.Context())
		if rest := left(t, filepath.Join(root, "store")); rest != "" {
			t.Errorf("it left %s", rest)
		}
	}
	pull(t, s, host+"/"+repo+":small", "me")
}

func TestOneProcessAtATime(t *testing.T) {
	root := t.TempDir()
	open(t, root, newRegistry(t), pulled.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if s, err := pulled.Open(ctx, pulled.Options{Root: root}); err == nil {
		s.Close()
		t.Error("two have the same directory")
	}
}
