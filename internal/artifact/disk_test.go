package artifact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"sluice/internal/layer"
	"sluice/oci"
)

// disk returns the file that DiskMetadata is for: the last of the tars, on the
// others.
func disk(t testing.TB, tars [][]byte) ([]byte, error) {
	t.Helper()
	var trees []*layer.Tree
	var sparse bytes.Buffer
	for _, content := range tars {
		sparse.Reset()
		tree, err := layer.Read(context.Background(), bytes.NewReader(content), layer.Options{Sparse: &sparse})
		if err != nil {
			t.Fatal(err)
		}
		trees = append(trees, tree)
	}
	content := tars[len(tars)-1]
	meta, err := DiskMetadata(trees, oci.DigestOf(content))
	if err != nil {
		return nil, err
	}
	pad := func(b []byte) []byte { return append(slices.Clip(b), make([]byte, -len(b)&511)...) }
	return slices.Concat(meta, pad(content), pad(sparse.Bytes())), nil
}

// The kernel shows the same in an overlayfs of each layer's own disk, which is one
// file that is mounted as it is, as in the one mount of the merged metadata.
func TestKernelShowsDisksStacked(t *testing.T) {
	compared := 0
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			var tars [][]byte
			lower := []string{t.TempDir()} // overlayfs wants two
			dir := t.TempDir()
			for _, content := range randomStack(t, seed) {
				file, err := disk(t, append(slices.Clone(tars), content))
				if errors.Is(err, ErrLowerFile) || err != nil && strings.Contains(err.Error(), "hard link") {
					continue // the image without that layer is one, too
				}
				if err != nil {
					t.Fatal(err)
				}
				tars = append(tars, content)
				name := filepath.Join(dir, fmt.Sprint(len(tars)))
				if err := os.WriteFile(name, file, 0o600); err != nil {
					t.Fatal(err)
				}
				lower = append(lower, mountEROFS(t, name, nil))
			}
			if len(tars) < 3 {
				return // then there are whiteouts of nothing, which overlayfs lists
			}
			b := buildStack(t, tars, EncodeOptions{})
			merged := b.mount(t, b.Manifest.Metadata, b.deviceFiles(t))
			slices.Reverse(lower) // the topmost comes first
			stacked := t.TempDir()
			if err := unix.Mount("overlay", stacked, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")); err != nil {
				t.Skipf("the kernel has no overlayfs: %v", err)
			}
			unmountLater(t, stacked)
			want, got := walkTree(t, merged), walkTree(t, stacked)
			for _, nodes := range []map[string]node{want, got} {
				for name, n := range nodes {
					n.Links = nil // overlayfs keeps links within one layer only
					nodes[name] = n
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-merged +stacked): %.3000s", diff)
			}
			compared += len(tars)
		})
	}
	if !t.Failed() && !t.Skipped() && os.Geteuid() == 0 && compared < 10 {
		t.Errorf("only %d layers were compared", compared)
	}
}

func TestDiskNeedsItsLayerOnly(t *testing.T) {
	base := layerTar(t, dir("tmp"), file("tmp/a", "a"))
	link := layerTar(t, link("tmp/b", "tmp/a", '1'))
	if _, err := disk(t, [][]byte{base, link}); !errors.Is(err, ErrLowerFile) {
		t.Errorf("a hard link to a lower layer: %v", err)
	}
	upper := layerTar(t, dir("tmp"), file("tmp/c", "c"))
	alone, err := disk(t, [][]byte{upper})
	if err != nil {
		t.Fatal(err)
	}
	if above, err := disk(t, [][]byte{base, upper}); err != nil || !bytes.Equal(above, alone) {
		t.Errorf("what contains itself depends on the layers below: %v", err)
	}
}

// Who has the tars gets the file system that the artifact has.
func TestImageMetadataIsTheArtifacts(t *testing.T) {
	for seed := range uint64(8) {
		tars := randomStack(t, seed)
		var layers []*Layer
		for _, content := range tars {
			var sparse bytes.Buffer
			tree, err := layer.Read(context.Background(), bytes.NewReader(content), layer.Options{Sparse: &sparse})
			if err != nil {
				t.Fatal(err)
			}
			l := &Layer{Tree: tree, Tar: DeviceData{Size: tree.Size, DiffID: oci.DigestOf(content)}}
			if sparse.Len() > 0 {
				l.Sparse = &DeviceData{Size: tree.SparseSize, DiffID: oci.DigestOf(sparse.Bytes())}
			}
			layers = append(layers, l)
		}
		got, err := ImageMetadata(layers)
		if err != nil {
			t.Fatal(err)
		}
		b := buildStack(t, tars, EncodeOptions{})
		if want := b.Manifest.Metadata.Digest; oci.DigestOf(got) != want {
			t.Errorf("seed %d: %s, the artifact has %s", seed, oci.DigestOf(got), want)
		}
	}
}
