package snapshot_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"sluice/internal/convert"
	"sluice/internal/node/cache"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/node/plane/local"
	"sluice/oci"
	"sluice/oci/ocimem"
)

// entry is an entry of a layer's tar.
type entry struct {
	name, content string
	kind          byte
	link          string
}

// pushImage pushes and converts an image and returns its manifest's digest and
// its diff IDs.
func pushImage(t *testing.T, reg *ocimem.Registry, repo string, layers [][]entry) (oci.Digest, []oci.Digest) {
	t.Helper()
	push := func(mediaType string, content []byte) oci.Descriptor {
		desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
		if _, err := reg.PushBlob(t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	config := oci.ImageConfig{Platform: oci.Platform{OS: "linux", Architecture: runtime.GOARCH}}
	config.RootFS.Type = "layers"
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest}
	for _, entries := range layers {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, e := range entries {
			h := &tar.Header{Name: e.name, Mode: 0o755, Size: int64(len(e.content)), Typeflag: tar.TypeReg, Linkname: e.link, ModTime: time.Unix(1e9, 0)}
			if e.kind != 0 {
				h.Typeflag = e.kind
			}
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write([]byte(e.content)); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf(b.Bytes()))
		m.Layers = append(m.Layers, push(oci.MediaTypeLayer, b.Bytes()))
	}
	content, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	m.Config = push(oci.MediaTypeImageConfig, content)
	if content, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	desc, err := reg.PushManifest(t.Context(), repo, "v1", m.MediaType, content)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := convert.Convert(t.Context(), reg, repo, "v1", convert.Options{}); err != nil {
		t.Fatal(err)
	}
	return desc.Digest, config.RootFS.DiffIDs
}

// manager returns a mount manager over a registry in memory, with the plane
// that needs no daemon.
func manager(t *testing.T, reg mount.Registry) *mount.Manager {
	t.Helper()
	dir := t.TempDir()
	devices := filepath.Join(dir, "devices")
	if err := os.Mkdir(devices, 0o700); err != nil {
		t.Fatal(err)
	}
	c, err := cache.Open(t.Context(), cache.Options{Dir: filepath.Join(dir, "cache")})
	if err != nil {
		t.Fatal(err)
	}
	p := local.New(devices)
	m, err := mount.Open(t.Context(), mount.Options{
		Root: filepath.Join(dir, "node"), Cache: c, Plane: p, Log: slog.New(slog.DiscardHandler),
		Registry: func(_, _ string) (mount.Registry, error) { return reg, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		mounts, err := filepath.Glob(filepath.Join(dir, "node", "m", "*"))
		for _, dir := range mounts {
			err = errors.Join(err, plane.Unmount(dir, true))
		}
		if err := errors.Join(err, m.Close(), p.Close(), c.Close()); err != nil {
			t.Error(err)
		}
	})
	return m
}

// tree returns the files beneath dir with their contents, and directories.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			found[name] = "/"
			return nil
		}
		content, err := os.ReadFile(path)
		found[name] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestRealLayers stacks the layers of a real streamed image in every way that
// there is, and looks at what the kernel shows.
func TestRealLayers(t *testing.T) {
	needRoot(t)
	reg := ocimem.New()
	layers := [][]entry{
		{
			{name: "a/", kind: tar.TypeDir}, {name: "a/one", content: "1"}, {name: "a/two", content: "2"},
			{name: "gone", content: "soon"}, {name: "dir/", kind: tar.TypeDir}, {name: "dir/old", content: "old"},
			{name: "target", content: "linked"},
		},
		{
			{name: ".wh.gone"}, {name: "dir/", kind: tar.TypeDir}, {name: "dir/.wh..wh..opq"}, {name: "dir/new", content: "new"},
			{name: "a/two", content: "changed"}, {name: "hard", kind: tar.TypeLink, link: "target"},
		},
		{{name: "a/.wh.one"}, {name: "a/three", content: "3"}},
	}
	manifest, ids := pushImage(t, reg, "app", layers)
	states := []map[string]string{
		{"a": "/", "a/one": "1", "a/two": "2", "gone": "soon", "dir": "/", "dir/old": "old", "target": "linked"},
		{"a": "/", "a/one": "1", "a/two": "changed", "dir": "/", "dir/new": "new", "target": "linked", "hard": "linked"},
		{"a": "/", "a/three": "3", "a/two": "changed", "dir": "/", "dir/new": "new", "target": "linked", "hard": "linked"},
	}
	s := open(t, t.TempDir(), manager(t, reg))
	ref := "registry.test/app:v1"
	if _, streamed := pullManifest(t, s, ref, manifest, ids); !streamed[0] || !streamed[1] || !streamed[2] {
		t.Fatalf("streamed layers: %v", streamed)
	}
	for i, chain := range chains(ids) {
		mounts, err := s.Prepare(t.Context(), "c "+chain, chain)
		if err != nil {
			t.Fatalf("on layer %d: %v", i, err)
		}
		within(t, mounts, func(dir string) {
			if diff := cmp.Diff(states[i], tree(t, dir)); diff != "" {
				t.Errorf("on layer %d (-want +got):\n%s", i, diff)
			}
			if err := os.WriteFile(filepath.Join(dir, "a", "two"), []byte("by the container"), 0o644); err != nil {
				t.Errorf("on layer %d: %v", i, err)
			}
			if err := os.RemoveAll(filepath.Join(dir, "dir")); err != nil {
				t.Errorf("on layer %d: %v", i, err)
			}
		})
		view, err := s.View(t.Context(), "v "+chain, chain)
		if err != nil {
			t.Fatalf("on layer %d: %v", i, err)
		}
		if i == 0 {
			continue // one layer alone is a bind of its mount, which shows no whiteouts as it has none
		}
		within(t, view, func(dir string) {
			if diff := cmp.Diff(states[i], tree(t, dir)); diff != "" {
				t.Errorf("view of layer %d (-want +got):\n%s", i, diff)
			}
			if err := unix.Access(dir, unix.W_OK); !errors.Is(err, unix.EROFS) {
				t.Errorf("view of layer %d is writable: %v", i, err)
			}
		})
	}
	// An image that begins with two of the layers and goes on with ordinary
	// ones.
	other := append(append([]oci.Digest(nil), ids[:2]...), diffs("other", 1)...)
	top, streamed := pull(t, s, "registry.test/other:v1", other)
	if streamed[2] {
		t.Fatal("an image that nobody has converted streams")
	}
	mounts, err := s.Prepare(t.Context(), "other", top)
	if err != nil {
		t.Fatal(err)
	}
	within(t, mounts, func(dir string) {
		want := map[string]string{"layer2": "registry.test/other:v1", "shared": "2"}
		for name, content := range states[1] {
			want[name] = content
		}
		if diff := cmp.Diff(want, tree(t, dir)); diff != "" {
			t.Errorf("ordinary on streamed layers (-want +got):\n%s", diff)
		}
	})
}
