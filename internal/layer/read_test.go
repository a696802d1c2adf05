package layer_test

import (
	"archive/tar"
	"bytes"
	"testing"

	"sluice/internal/layer"
)

// tarOf returns a tar of the headers; a regular file's content is its name,
// unless its size says 0.
func tarOf(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range headers {
		content := ""
		if h.Typeflag == tar.TypeReg && h.Size != 0 {
			content = h.Name
			h.Size = int64(len(content))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("write header of %q: %v", h.Name, err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func read(t testing.TB, data []byte) *layer.Tree {
	t.Helper()
	tree, err := layer.Read(t.Context(), bytes.NewReader(data), layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func TestReadKnowsWhereContentIs(t *testing.T) {
	data := tarOf(t, tar.Header{Name: "a/b", Typeflag: tar.TypeReg, Size: 1, Mode: 0o644})
	tree := read(t, data)
	e := tree.Root.Children["a"].Children["b"].Extents
	if len(e) != 1 || string(data[e[0].Offset:][:e[0].Length]) != "a/b" {
		t.Fatalf("extents %v", e)
	}
}
