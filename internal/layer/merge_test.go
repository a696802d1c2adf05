package layer_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/layer"
)

func merge(t testing.TB, stack ...[]tar.Header) *layer.Merged {
	t.Helper()
	var trees []*layer.Tree
	for _, in := range stack {
		trees = append(trees, read(t, tarOf(t, in...)))
	}
	before := fmt.Sprint(lists(trees))
	m, err := layer.Merge(trees)
	if err != nil {
		t.Fatal(err)
	}
	if after := fmt.Sprint(lists(trees)); after != before {
		t.Errorf("Merge changed its arguments from\n%s\nto\n%s", before, after)
	}
	return m
}

func lists(trees []*layer.Tree) [][]string {
	var all [][]string
	for _, tree := range trees {
		all = append(all, list(tree.Root))
	}
	return all
}

func TestMerge(t *testing.T) {
	type L = []tar.Header
	const f = "100644 size "
	tests := map[string]struct {
		stack []L
		want  []string
	}{
		"nothing":                           {nil, nil},
		"one layer":                         {[]L{{file("a", 1), file(".wh.b", 0), file("d/.wh..wh..opq", 0)}}, []string{"a " + f + "1 layer 0", "d dir"}},
		"files side by side":                {[]L{{file("d/a", 1)}, {file("d/b", 2)}, {file("c", 3)}}, []string{"c " + f + "3 layer 2", "d dir", "d/a " + f + "1 layer 0", "d/b " + f + "2 layer 1"}},
		"a file on a file":                  {[]L{{file("a", 1)}, {file("a", 2)}}, []string{"a " + f + "2 layer 1"}},
		"a file on a directory":             {[]L{{file("a/b", 1)}, {file("a", 2)}}, []string{"a " + f + "2 layer 1"}},
		"a directory on a file":             {[]L{{file("a", 1)}, {file("a/b", 2)}}, []string{"a dir", "a/b " + f + "2 layer 1"}},
		"a file between directories":        {[]L{{file("a/x", 1)}, {file("a", 1)}, {dir("a")}}, []string{"a dir"}},
		"a directory on a link":             {[]L{{file("usr/x", 1), symlink("l", "usr")}, {file("l/y", 2)}}, []string{"l dir", "l/y " + f + "2 layer 1", "usr dir", "usr/x " + f + "1 layer 0"}},
		"a link on a directory":             {[]L{{file("d/x", 1)}, {symlink("d", "e")}}, []string{"d ->e"}},
		"a whiteout of a file":              {[]L{{file("d/a", 1)}, {file("d/.wh.a", 0)}}, []string{"d dir"}},
		"a whiteout of a directory":         {[]L{{file("d/a", 1)}, {file(".wh.d", 0)}}, nil},
		"a whiteout of nothing":             {[]L{{file("d/a", 1)}, {file(".wh.x", 0)}}, []string{"d dir", "d/a " + f + "1 layer 0"}},
		"a whiteout and a file over it":     {[]L{{file("a", 1)}, {file(".wh.a", 0)}, {file("a", 2)}}, []string{"a " + f + "2 layer 2"}},
		"a whiteout and a file beside":      {[]L{{file("a/x", 1)}, {file("a", 2), file(".wh.a", 0)}}, []string{"a " + f + "2 layer 1"}},
		"a whiteout and a directory beside": {[]L{{file("a/x", 1)}, {file("a/y", 2), file(".wh.a", 0)}}, []string{"a dir", "a/y " + f + "2 layer 1"}},
		"a device as whiteout":              {[]L{{file("a", 1)}, {{Name: "a", Typeflag: tar.TypeChar}}}, nil},
		"an opaque directory":               {[]L{{file("d/a", 1), file("d/e/b", 1)}, {file("d/c", 2), file("d/.wh..wh..opq", 0)}}, []string{"d dir", "d/c " + f + "2 layer 1"}},
		"opaque in between":                 {[]L{{file("d/a", 1)}, {file("d/.wh..wh..opq", 0)}, {file("d/c", 1)}}, []string{"d dir", "d/c " + f + "1 layer 2"}},
		"an opaque root":                    {[]L{{file("a", 1)}, {file(".wh..wh..opq", 0)}}, []string{"a " + f + "1 layer 0"}},
		"hard links":                        {[]L{{file("a", 1), hardlink("b", "a"), hardlink("c", "a")}, {file("b", 2)}}, []string{"a " + f + "1 layer 0", "b " + f + "2 layer 1", "c " + f + "1 layer 0 =a"}},
		"hard links in an upper layer":      {[]L{nil, {file("a", 1), hardlink("b", "a")}}, []string{"a " + f + "1 layer 1", "b " + f + "1 layer 1 =a"}},
		"hard links across layers":          {[]L{{file("a", 1)}, {hardlink("b", "a"), hardlink("c", "b")}, {hardlink("d", "c")}}, []string{"a " + f + "1 layer 0", "b " + f + "1 layer 0 =a", "c " + f + "1 layer 0 =a", "d " + f + "1 layer 0 =a"}},
		"across layers, target removed":     {[]L{{file("a", 1)}, {hardlink("b", "a"), file(".wh.a", 0)}}, []string{"b " + f + "1 layer 0"}},
		"across layers, through a link":     {[]L{{file("usr/a", 1), symlink("l", "usr")}, {hardlink("b", "l/a")}}, []string{"b " + f + "1 layer 0", "l ->usr", "usr dir", "usr/a " + f + "1 layer 0 =b"}},
		"across layers, to a link":          {[]L{{symlink("l", "usr")}, {hardlink("b", "l")}}, []string{"b ->usr", "l ->usr =b"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if d := cmp.Diff(test.want, list(merge(t, test.stack...).Tree.Root)); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

func TestMergeRefuses(t *testing.T) {
	tests := map[string]struct {
		stack [][]tar.Header
		want  string
	}{
		"no target":         {[][]tar.Header{{file("a", 0)}, {hardlink("d/b", "/x/a")}}, `layer 1: hard link "d/b" to "x/a": no layer below has the target`},
		"no lower layer":    {[][]tar.Header{{hardlink("b", "a"), file("a", 0)}}, `layer 0: hard link "b" to "a"`},
		"a target gone":     {[][]tar.Header{{file("a", 0)}, {file(".wh.a", 0)}, {hardlink("b", "a")}}, `layer 2: hard link "b" to "a"`},
		"a lower directory": {[][]tar.Header{{dir("a")}, {hardlink("b", "a")}}, "is a directory"},
		"a lower loop":      {[][]tar.Header{{symlink("x", "y"), symlink("y", "x")}, {hardlink("b", "x/a")}}, "too many symbolic links"},
		"a lower file":      {[][]tar.Header{{file("x", 0)}, {hardlink("b", "x/y/a")}}, "not a directory"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			var trees []*layer.Tree
			for _, in := range test.stack {
				trees = append(trees, read(t, tarOf(t, in...)))
			}
			if _, err := layer.Merge(trees); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
		})
	}
}

func TestMergeDirectoryAttributes(t *testing.T) {
	owned := func(name string, uid int, xattr string) tar.Header {
		return tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o2750, Uid: uid, Gid: uid, ModTime: time.Unix(int64(uid), 0),
			PAXRecords: map[string]string{"SCHILY.xattr.user.x": xattr}}
	}
	later := file("d/s/new/f", 0)
	later.ModTime = time.Unix(99, 0)
	m := merge(t,
		[]tar.Header{owned("d", 1, "one"), owned("d/s", 2, "two")},
		[]tar.Header{owned("d", 3, "three")},
		[]tar.Header{later},
		[]tar.Header{file("e", 0)})
	three := layer.Node{Mode: 0o42750, UID: 3, GID: 3, Mtime: 3, Xattrs: map[string]string{"user.x": "three"}}
	two := layer.Node{Mode: 0o42750, UID: 2, GID: 2, Mtime: 2, Xattrs: map[string]string{"user.x": "two"}}
	created := layer.Node{Mode: 0o40755, GID: 2, Mtime: 99} // new in a directory with the setgid bit
	for name, root := range map[string]*layer.Node{"merged": m.Tree.Root, "context": m.Context[2].Root} {
		d := root.Children["d"]
		for p, pair := range map[string][2]*layer.Node{
			"d": {&three, d}, "d/s": {&two, d.Children["s"]}, "d/s/new": {&created, d.Children["s"].Children["new"]},
		} {
			got := *pair[1]
			got.Children, got.Implicit = nil, false
			if diff := cmp.Diff(*pair[0], got); diff != "" {
				t.Errorf("%s: %s: -want +got:\n%s", name, p, diff)
			}
		}
	}
	if d := cmp.Diff([]bool{false, false, true, false}, m.Changed); d != "" {
		t.Errorf("Changed: -want +got:\n%s", d)
	}
}

// TestImplicitDirectoryFollowsLowerLinks: as in containerd, a directory that
// replaces a lower layer's link takes the attributes of what the link led to.
func TestImplicitDirectoryFollowsLowerLinks(t *testing.T) {
	usr := dir("usr/lib")
	usr.Uid = 7
	m := merge(t, []tar.Header{usr, symlink("lib", "usr/lib")}, []tar.Header{file("lib/f", 1)})
	if lib := m.Tree.Root.Children["lib"]; !lib.IsDir() || lib.UID != 7 {
		t.Errorf("lib is %+v", lib)
	}
}

func TestContextPointsIntoItsLayers(t *testing.T) {
	m := merge(t,
		[]tar.Header{file("a", 600)},
		[]tar.Header{file("b", 600), hardlink("c", "b")},
		[]tar.Header{file("d", 600), hardlink("e", "a"), hardlink("f", "a"), file(".wh.b", 0)})
	want := [][]string{
		{"a 100644 size 600 layer 0"},
		{"b 100644 size 600 layer 1", "c 100644 size 600 layer 1 =b"},
		{"b whiteout", "d 100644 size 600 layer 2", "e 100644 size 600 layer 0", "f 100644 size 600 layer 0 =e"},
	}
	if d := cmp.Diff(want, lists(m.Context)); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if d := cmp.Diff([]bool{false, false, true}, m.Changed); d != "" {
		t.Errorf("Changed: -want +got:\n%s", d)
	}
}

// TestMergeTwiceTheSame: the same layer may be in an image more than once, and
// in several images at once.
func TestMergeTwiceTheSame(t *testing.T) {
	tree := read(t, tarOf(t, file("a", 1), hardlink("b", "a")))
	for range 2 {
		m, err := layer.Merge([]*layer.Tree{tree, tree})
		if err != nil {
			t.Fatal(err)
		}
		want := []string{"a 100644 size 1 layer 1", "b 100644 size 1 layer 1 =a"}
		if d := cmp.Diff(want, list(m.Tree.Root)); d != "" {
			t.Errorf("-want +got:\n%s", d)
		}
	}
}

func BenchmarkMerge(b *testing.B) {
	var trees []*layer.Tree
	for range 10 {
		trees = append(trees, read(b, bigTar(b, 5000)))
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := layer.Merge(trees); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead(b *testing.B) {
	data := bigTar(b, 20000)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := layer.Read(b.Context(), bytes.NewReader(data), layer.Options{}); err != nil {
			b.Fatal(err)
		}
	}
}

// bigTar has about as many small files and directories as images do.
func bigTar(t testing.TB, files int) []byte {
	t.Helper()
	var in []tar.Header
	for i := range files {
		d := fmt.Sprintf("usr/lib/package%d", i/20)
		if i%20 == 0 {
			in = append(in, dir(d))
		}
		in = append(in, file(fmt.Sprintf("%s/file%d.py", d, i), 2000))
	}
	return tarOf(t, in...)
}
