package layer_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/layer"
)

// sparseFile is a file's data by offset; the rest is hole.
type sparseFile struct {
	size int64
	data map[int64]string
}

func (s sparseFile) bytes() []byte {
	p := make([]byte, s.size)
	for off, d := range s.data {
		copy(p[off:], d)
	}
	return p
}

// TestSparse packs sparse files with GNU tar in each of its formats and reads
// them back through their extents.
func TestSparse(t *testing.T) {
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip("needs GNU tar to make sparse members")
	}
	files := map[string]sparseFile{
		"hole-end":   {1<<20 + 5, map[int64]string{0: "begin"}},
		"hole-start": {1<<20 + 5, map[int64]string{1 << 20: "end.."}},
		"many":       {4 << 20, map[int64]string{0: "a", 65536: "b", 70000: "c", 1 << 20: strings.Repeat("d", 10000), 2 << 20: "e", 3<<20 + 7: "f", 4<<20 - 1: "g"}},
		"only-hole":  {1 << 20, nil},
		"plain":      {5000, map[int64]string{0: strings.Repeat("p", 5000)}},
	}
	dir := t.TempDir()
	for name, s := range files {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(s.size); err != nil {
			t.Fatal(err)
		}
		for off, d := range s.data {
			if _, err := f.WriteAt([]byte(d), off); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, format := range [][]string{
		{"--format=gnu"}, {"--format=posix", "--sparse-version=0.0"}, {"--format=posix", "--sparse-version=0.1"}, {"--format=posix", "--sparse-version=1.0"},
	} {
		t.Run(strings.Join(format, " "), func(t *testing.T) {
			args := append(append([]string{"-C", dir, "--sparse", "--hole-detection=raw"}, format...), "-cf", "-")
			for name := range files {
				args = append(args, name)
			}
			data, err := exec.Command("tar", args...).Output()
			if err != nil {
				t.Skipf("tar %v: %v", args, err)
			}
			if _, err := layer.Read(t.Context(), bytes.NewReader(data), layer.Options{}); err == nil || !strings.Contains(err.Error(), "sparse") {
				t.Errorf("without a place for sparse files: %v", err)
			}
			var expanded bytes.Buffer
			plain := 0
			tree, err := layer.Read(t.Context(), bytes.NewReader(data), layer.Options{
				Sparse: &expanded, OnFile: func(_, _, _ int64) { plain++ },
			})
			if err != nil {
				t.Fatal(err)
			}
			if tree.Size != int64(len(data)) || tree.SparseSize != int64(expanded.Len()) || expanded.Len() > 64<<10 || plain != 1 {
				t.Errorf("size %d of %d, sparse %d of %d, %d plain files", tree.Size, len(data), tree.SparseSize, expanded.Len(), plain)
			}
			for name, s := range files {
				n := tree.Root.Children[name]
				if got := contentThrough(t, n, data, expanded.Bytes()); !bytes.Equal(got, s.bytes()) {
					t.Errorf("%s: content differs, extents %v", name, n.Extents)
				}
			}
			if e := tree.Root.Children["only-hole"].Extents; e != nil {
				t.Errorf("a hole has extents %v", e)
			}
		})
	}
}

// contentThrough reads a file through its extents and checks what they promise.
func contentThrough(t testing.TB, n *layer.Node, data, sparse []byte) []byte {
	t.Helper()
	content := make([]byte, n.Size)
	end := int64(0)
	for i, e := range n.Extents {
		if e.Length <= 0 || e.FileOffset < end || e.Offset%512 != 0 || e.FileOffset%512 != 0 || e.Length%512 != 0 && i < len(n.Extents)-1 {
			t.Fatalf("extent %d of %v", i, n.Extents)
		}
		end = e.FileOffset + e.Length
		device := data
		if e.Sparse {
			device = sparse
		}
		copy(content[e.FileOffset:end], device[e.Offset:e.Offset+e.Length])
	}
	return content
}

// sparseTar is one sparse member of PAX format 1.0 with the given map.
func sparseTar(t testing.TB, size int64, stored string, runs ...int64) []byte {
	t.Helper()
	m := fmt.Sprintf("%d\n", len(runs)/2)
	for _, n := range runs {
		m += fmt.Sprintf("%d\n", n)
	}
	m += strings.Repeat("\x00", (512-len(m)%512)%512)
	// Go's writer refuses sparse records, so they get their name afterwards.
	records := map[string]string{"XXX.sparse.major": "1", "XXX.sparse.minor": "0", "XXX.sparse.realsize": fmt.Sprint(size), "XXX.sparse.name": "f"}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&tar.Header{Name: "x", Typeflag: tar.TypeReg, Size: int64(len(m) + len(stored)), PAXRecords: records}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, m+stored); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return bytes.ReplaceAll(buf.Bytes(), []byte("XXX.sparse"), []byte("GNU.sparse"))
}

func TestSparseIsBounded(t *testing.T) {
	big := sparseTar(t, 1<<40, "end", 1<<40-3, 3)
	if _, err := layer.Read(t.Context(), bytes.NewReader(big), layer.Options{Sparse: io.Discard}); err == nil || !strings.Contains(err.Error(), "limit of 17179869184 bytes") {
		t.Errorf("a TiB of hole: %v", err)
	}
	// Beyond 1 GiB the grain grows, so that a file cannot have too many extents.
	var expanded bytes.Buffer
	size := int64(4)<<30 + 100
	tree, err := layer.Read(t.Context(), bytes.NewReader(sparseTar(t, size, "onetwo", 1<<20+4096, 3, size-3, 3)), layer.Options{Sparse: &expanded})
	if err != nil {
		t.Fatal(err)
	}
	n := tree.Root.Children["f"]
	e := n.Extents
	if n.Size != size || len(e) != 2 || e[0] != (layer.Extent{Sparse: true, Offset: 0, Length: 16 << 10, FileOffset: 1 << 20}) ||
		e[1] != (layer.Extent{Sparse: true, Offset: 16 << 10, Length: 100, FileOffset: 4 << 30}) || expanded.Len() != 16<<10+512 {
		t.Errorf("size %d, extents %+v, %d bytes", n.Size, e, expanded.Len())
	}
}

func TestSparseRefuses(t *testing.T) {
	full := errors.New("no space")
	tests := map[string]struct {
		in   []byte
		w    io.Writer
		want string
	}{
		"too little data": {sparseTar(t, 10000, "abc", 0, 3, 5000, 3), io.Discard, "non-existent data"},
		"too much data":   {sparseTar(t, 10000, "abcdef", 0, 3), io.Discard, "sparse file"},
		"overlap":         {sparseTar(t, 10000, "abcdef", 0, 4, 3, 3), io.Discard, "invalid tar header"},
		"out of the file": {sparseTar(t, 10000, "abc", 9999, 3), io.Discard, "invalid tar header"},
		"full disk":       {sparseTar(t, 10000, "abc", 0, 3), failing{full}, full.Error()},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := layer.Read(t.Context(), bytes.NewReader(test.in), layer.Options{Sparse: test.w})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
		})
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }
