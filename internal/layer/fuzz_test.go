package layer_test

import (
	"archive/tar"
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"

	"sluice/internal/layer"
)

// seeds are tars with everything that Read knows.
func seeds(t testing.TB) [][]byte {
	all := [][]byte{
		nil,
		tarOf(t, dir("."), dir("d"), file("d/f", 700), symlink("l", "d"), file("l/g", 3), hardlink("h", "d/f"), file("l/.wh.x", 0)),
		tarOf(t, file(".wh.d", 0), file("d/.wh..wh..opq", 0), hardlink("low", "lib/f"), symlink("lib", "/d"), file("lib/n", 0)),
		tarOf(t, file(strings.Repeat("long/", 60)+"f", 1), file("\xff", 1),
			tar.Header{Name: "x", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.user.x": "v", "SCHILY.xattr.security.capability": "c"}},
			tar.Header{Name: "c", Typeflag: tar.TypeChar, Devmajor: 1}, tar.Header{Name: "x", Typeflag: tar.TypeDir}),
		sparseTar(t, 100000, "abcdef", 0, 3, 50000, 3),
	}
	old := tarOf(t, file("v7", 5), file("contiguous", 6))
	retype(old, 0, 0)
	retype(old, 1024, '7')
	return append(all, old)
}

// FuzzRead checks that what Read says of any bytes is consistent: extents lie
// inside what was read, and give the content that archive/tar gives.
func FuzzRead(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var sparse bytes.Buffer
		limits := layer.Limits{Sparse: 4 << 20}
		tree, err := layer.Read(t.Context(), bytes.NewReader(data), layer.Options{Sparse: &sparse, Limits: limits})
		if err != nil {
			return
		}
		if tree.Size != int64(len(data)) || tree.SparseSize != int64(sparse.Len()) {
			t.Fatalf("size %d of %d, sparse %d of %d", tree.Size, len(data), tree.SparseSize, sparse.Len())
		}
		want := map[string]int{} // contents of all regular files, and how often
		r := tar.NewReader(bytes.NewReader(data))
		for {
			if _, err := r.Next(); err != nil {
				break
			}
			content, err := io.ReadAll(r)
			if err != nil {
				break
			}
			want[string(content)]++
		}
		files := checkTree(t, tree.Root, true)
		for _, n := range files {
			if want[string(contentThrough(t, n, data, sparse.Bytes()))]--; n.Size > 4<<20 && len(n.Extents) > 0 && n.Extents[0].Sparse {
				t.Fatal("sparse file beyond the limit")
			}
		}
		for content, n := range want {
			if n < 0 {
				t.Fatalf("content %.50q is not in the tar", content)
			}
		}
	})
}

// checkTree checks what every tree promises and returns its regular files.
func checkTree(t *testing.T, root *layer.Node, own bool) []*layer.Node {
	var files []*layer.Node
	seen := map[*layer.Node]bool{}
	var walk func(p string, n *layer.Node)
	walk = func(p string, n *layer.Node) {
		if n.LowerLink != "" {
			if !own || n.Mode != 0 {
				t.Fatalf("%q is a link to a lower layer: %+v", p, n)
			}
			return
		}
		if !own && (n.IsWhiteout() || n.Opaque || n.Implicit) {
			t.Fatalf("%q is %+v in the merged tree", p, n)
		}
		if n.Mtime < 0 || n.MtimeNsec >= 1e9 || n.Children != nil && (!n.IsDir() || len(n.Children) == 0 && !own) ||
			(n.Target != "") != (n.Type() == layer.TypeSymlink) || n.Extents != nil && n.Type() != layer.TypeRegular {
			t.Fatalf("%q is %+v", p, n)
		}
		if seen[n] {
			if n.IsDir() {
				t.Fatalf("directory %q has two names", p)
			}
			return
		}
		seen[n] = true
		if n.Type() == layer.TypeRegular {
			files = append(files, n)
		}
		for name, c := range n.Children {
			if name == "" || name == "." || name == ".." || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
				t.Fatalf("%q has a child %q", p, name)
			}
			walk(p+"/"+name, c)
		}
	}
	walk("", root)
	return files
}

// FuzzMerge stacks two tars, and each on itself.
func FuzzMerge(f *testing.F) {
	all := seeds(f)
	for _, a := range all {
		for _, b := range all {
			f.Add(a, b)
		}
	}
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		var trees []*layer.Tree
		for _, data := range [][]byte{lower, upper, upper} {
			tree, err := layer.Read(t.Context(), bytes.NewReader(data), layer.Options{Sparse: io.Discard, Limits: layer.Limits{Sparse: 1 << 20}})
			if err != nil {
				return
			}
			trees = append(trees, tree)
		}
		before := lists(trees)
		m, err := layer.Merge(trees)
		if !slices.EqualFunc(before, lists(trees), slices.Equal) {
			t.Fatal("Merge changed its arguments")
		}
		if err != nil {
			return
		}
		check := func(files []*layer.Node) {
			for _, n := range files {
				for _, e := range n.Extents {
					if l := trees[e.Layer]; !e.Sparse && e.Offset+e.Length > l.Size || e.Sparse && e.Offset+e.Length > l.SparseSize {
						t.Fatalf("extent %+v beyond its layer", e)
					}
				}
			}
		}
		check(checkTree(t, m.Tree.Root, false))
		for _, c := range m.Context {
			check(checkTree(t, c.Root, true))
		}
		// Stacking the same layer again adds nothing, unless it removes.
		if again, err := layer.Merge(append(slices.Clone(trees), trees[2])); err != nil {
			t.Fatal(err)
		} else if a, b := names(m.Tree.Root), names(again.Tree.Root); !slices.Equal(a, b) {
			t.Fatalf("merged again: %q, want %q", b, a)
		}
	})
}

func names(n *layer.Node) []string {
	lines := list(n)
	for i, l := range lines {
		lines[i], _, _ = strings.Cut(l, " ")
	}
	return lines
}
