package layer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/layer"
)

// tarOf returns a tar of the headers. A regular file with a Size has that
// many bytes of text made of its name.
func tarOf(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range headers {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("write header of %q: %v", h.Name, err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(contentOf(h.Name, h.Size)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func contentOf(name string, size int64) []byte {
	return bytes.Repeat([]byte(name+"."), int(size)/(len(name)+1)+1)[:size]
}

func file(name string, size int64) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeReg, Size: size, Mode: 0o644}
}
func dir(name string) tar.Header {
	return tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755}
}
func symlink(name, target string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target}
}
func hardlink(name, target string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target, Mode: 0o644}
}

func read(t testing.TB, data []byte) *layer.Tree {
	t.Helper()
	tree, err := layer.Read(t.Context(), bytes.NewReader(data), layer.Options{Sparse: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// list renders a tree as one line for each name: what it is, and of files
// where they are from.
func list(n *layer.Node) []string {
	seen := map[*layer.Node]string{}
	var lines []string
	var walk func(p string, n *layer.Node)
	walk = func(p string, n *layer.Node) {
		line := p + " "
		switch {
		case n.LowerLink != "":
			line += "lower:" + n.LowerLink
		case n.IsWhiteout():
			line += "whiteout"
		case n.Type() == layer.TypeSymlink:
			line += "->" + n.Target
		case n.IsDir():
			line += "dir"
			if n.Implicit {
				line += " implicit"
			}
			if n.Opaque {
				line += " opaque"
			}
		default:
			line += fmt.Sprintf("%o size %d", n.Mode, n.Size)
			if len(n.Extents) > 0 {
				line += fmt.Sprintf(" layer %d", n.Extents[0].Layer)
			}
		}
		if !n.IsDir() {
			if first, ok := seen[n]; ok {
				line += " =" + first
			} else {
				seen[n] = p
			}
		}
		if p != "" || n.Opaque {
			lines = append(lines, line)
		}
		for _, name := range n.Names() {
			walk(strings.TrimPrefix(p+"/"+name, "/"), n.Children[name])
		}
	}
	walk("", n)
	return lines
}

func TestReadTrees(t *testing.T) {
	const f = "100644 size 0"
	tests := map[string]struct {
		in   []tar.Header
		want []string
	}{
		"names are cleaned": {
			[]tar.Header{file("./a", 0), file("/b", 0), file("c//./d/../e", 0), file("/x/../f", 0)},
			[]string{"a " + f, "b " + f, "c dir implicit", "c/e " + f, "f " + f},
		},
		"the root is nobody's":            {[]tar.Header{dir("."), dir("/"), file("..x", 0)}, []string{"..x " + f}},
		"a file replaces a file":          {[]tar.Header{file("a", 9), file("a", 0)}, []string{"a " + f}},
		"a file replaces a directory":     {[]tar.Header{file("a/b", 0), file("a", 0)}, []string{"a " + f}},
		"a directory replaces a file":     {[]tar.Header{file("a", 0), dir("a")}, []string{"a dir"}},
		"a directory keeps its children":  {[]tar.Header{file("a/b", 0), dir("a")}, []string{"a dir", "a/b " + f}},
		"own links are followed":          {[]tar.Header{symlink("l", "/d"), file("l/f", 0)}, []string{"d dir implicit", "d/f " + f, "l ->/d"}},
		"links are bound to the root":     {[]tar.Header{symlink("l", "../../d"), file("l/f", 0)}, []string{"d dir implicit", "d/f " + f, "l ->../../d"}},
		"links through links":             {[]tar.Header{symlink("a", "b"), symlink("b", "c"), file("a/f", 0)}, []string{"a ->b", "b ->c", "c dir implicit", "c/f " + f}},
		"a link to the root":              {[]tar.Header{symlink("l", "/"), file("l/f", 0)}, []string{"f " + f, "l ->/"}},
		"the last element isn't followed": {[]tar.Header{symlink("l", "d"), file("l", 0)}, []string{"l " + f}},
		"a whiteout":                      {[]tar.Header{file("d/.wh.a", 0)}, []string{"d dir implicit", "d/a whiteout"}},
		"a whiteout before its name":      {[]tar.Header{file(".wh.a", 0), file("a", 0)}, []string{"a " + f}},
		"a whiteout after its name":       {[]tar.Header{file("a", 0), file(".wh.a", 0)}, []string{"a " + f}},
		"a whiteout before a directory":   {[]tar.Header{file(".wh.a", 0), dir("a")}, []string{"a dir opaque"}},
		"a whiteout after a directory":    {[]tar.Header{dir("a"), file(".wh.a", 0)}, []string{"a dir opaque"}},
		"a whiteout of a parent":          {[]tar.Header{file(".wh.a", 0), file("a/b", 0)}, []string{"a dir implicit opaque", "a/b " + f}},
		"a whiteout through a link":       {[]tar.Header{symlink("l", "d"), file("l/.wh.x", 0)}, []string{"d dir implicit", "d/x whiteout", "l ->d"}},
		"a whiteout of a long name":       {[]tar.Header{file(".wh."+strings.Repeat("n", 255), 0)}, []string{strings.Repeat("n", 255) + " whiteout"}},
		"opaque before":                   {[]tar.Header{file("a/.wh..wh..opq", 0), file("a/b", 0)}, []string{"a dir implicit opaque", "a/b " + f}},
		"opaque after":                    {[]tar.Header{dir("a"), file("a/b", 0), file("a/.wh..wh..opq", 0)}, []string{"a dir opaque", "a/b " + f}},
		"opaque root":                     {[]tar.Header{file(".wh..wh..opq", 0)}, []string{" dir opaque"}},
		"aufs":                            {[]tar.Header{file(".wh..wh.aufs", 0), dir(".wh..wh.orph"), dir(".wh..wh.plnk")}, nil},
		"a device that is a whiteout":     {[]tar.Header{{Name: "a", Typeflag: tar.TypeChar}}, []string{"a whiteout"}},
		"which a directory replaces":      {[]tar.Header{{Name: "a", Typeflag: tar.TypeChar}, dir("a")}, []string{"a dir"}},
		"hard links":                      {[]tar.Header{file("a", 0), hardlink("b", "a"), hardlink("c", "/b"), hardlink("d", "./a")}, []string{"a " + f, "b " + f + " =a", "c " + f + " =a", "d " + f + " =a"}},
		"a hard link to a link":           {[]tar.Header{symlink("a", "x"), hardlink("b", "a")}, []string{"a ->x", "b ->x =a"}},
		"a hard link through a link":      {[]tar.Header{file("d/f", 0), symlink("l", "d"), hardlink("b", "l/f")}, []string{"b " + f, "d dir implicit", "d/f " + f + " =b", "l ->d"}},
		"a hard link to a lower layer":    {[]tar.Header{symlink("l", "/usr/lib"), hardlink("b", "l/f"), hardlink("c", "b")}, []string{"b lower:usr/lib/f", "c lower:usr/lib/f =b", "l ->/usr/lib"}},
		"a hard link whose target goes":   {[]tar.Header{file("a", 0), hardlink("b", "a"), dir("a")}, []string{"a dir", "b " + f}},
		"a hard link to a whiteout":       {[]tar.Header{file(".wh.a", 0), hardlink("b", "a")}, []string{"a whiteout", "b whiteout"}},
		"odd names": {
			[]tar.Header{file("\xff\xfe", 0), file("a\nb", 0), file(strings.Repeat("p", 255), 0)},
			[]string{"a\nb " + f, strings.Repeat("p", 255) + " " + f, "\xff\xfe " + f},
		},
		"file types": {
			[]tar.Header{
				{Name: "blk", Typeflag: tar.TypeBlock, Devmajor: 4095, Devminor: 1048575, Mode: 0o600},
				{Name: "chr", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666},
				{Name: "pipe", Typeflag: tar.TypeFifo, Mode: 0o1644},
				{Name: "suid", Typeflag: tar.TypeReg, Mode: 0o106755},
			},
			[]string{"blk 60600 size 0", "chr 20666 size 0", "pipe 11644 size 0", "suid 106755 size 0"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got := list(read(t, tarOf(t, test.in...)).Root)
			if d := cmp.Diff(test.want, got); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

func TestReadRefuses(t *testing.T) {
	loop := []tar.Header{symlink("a", "b"), symlink("b", "a"), file("a/f", 0)}
	var deep []tar.Header
	for i := range 300 {
		deep = append(deep, symlink(fmt.Sprint(i), fmt.Sprint(i+1)))
	}
	long := strings.Repeat("x/", 2048) + "f"
	tests := map[string]struct {
		in     []tar.Header
		limits layer.Limits
		want   string
	}{
		"climbing":              {in: []tar.Header{file("a/../../b", 0)}, want: `"a/../../b" at offset 0: name leads out`},
		"climbing from /":       {in: []tar.Header{file("/../b", 0)}, want: "name leads out"},
		"..":                    {in: []tar.Header{dir("..")}, want: "name leads out"},
		"climbing link":         {in: []tar.Header{hardlink("b", "../a")}, want: "name leads out"},
		"long name":             {in: []tar.Header{file(strings.Repeat("n", 256), 0)}, want: "more than 255 bytes"},
		"long parent":           {in: []tar.Header{file(strings.Repeat("n", 256)+"/a", 0)}, want: "more than 255 bytes"},
		"long path":             {in: []tar.Header{file(long, 0)}, want: "longer than 4095"},
		"depth":                 {in: []tar.Header{file("a/b/c/d", 0)}, limits: layer.Limits{Depth: 2}, want: "more than 2 directories deep"},
		"loop":                  {in: loop, want: "too many symbolic links"},
		"many links":            {in: append(deep, file("0/f", 0)), want: "too many symbolic links"},
		"a file as a parent":    {in: []tar.Header{file("a", 0), file("a/b", 0)}, want: `parent "a": not a directory`},
		"a device as a parent":  {in: []tar.Header{{Name: "a", Typeflag: tar.TypeChar}, file("a/b", 0)}, want: "not a directory"},
		"hard link to a dir":    {in: []tar.Header{dir("a"), hardlink("b", "a")}, want: `hard link to the directory "a"`},
		"hard link to the root": {in: []tar.Header{hardlink("b", "/")}, want: "hard link to the directory"},
		"no target":             {in: []tar.Header{symlink("a", "")}, want: "no target"},
		"long target":           {in: []tar.Header{symlink("a", strings.Repeat("t", 4096))}, want: "4096 bytes"},
		"uid":                   {in: []tar.Header{{Name: "a", Typeflag: tar.TypeReg, Uid: 1<<32 - 1}}, want: "owner 4294967295:0"},
		"gid":                   {in: []tar.Header{{Name: "a", Typeflag: tar.TypeReg, Gid: -1, Format: tar.FormatGNU}}, want: "owner 0:-1"},
		"major":                 {in: []tar.Header{{Name: "a", Typeflag: tar.TypeBlock, Devmajor: 4096}}, want: "device 4096:0"},
		"minor":                 {in: []tar.Header{{Name: "a", Typeflag: tar.TypeChar, Devminor: 1 << 20}}, want: "device 0:1048576"},
		"unknown type":          {in: []tar.Header{{Name: "a", Typeflag: 'V'}}, want: "entry type 'V'"},
		"whiteout of nothing":   {in: []tar.Header{file("a/.wh.", 0)}, want: "whiteout names nothing"},
		"whiteout of .":         {in: []tar.Header{file("a/.wh..", 0)}, want: "whiteout names nothing"},
		"whiteout of ..":        {in: []tar.Header{file("a/.wh...", 0)}, want: "whiteout names nothing"},
		"many nodes":            {in: []tar.Header{file("a/b/c", 0)}, limits: layer.Limits{Nodes: 2}, want: "more than 2 files"},
		"many bytes":            {in: []tar.Header{symlink("a", "123456789")}, limits: layer.Limits{Strings: 9}, want: "more than 9 bytes"},
		"xattr size": {
			in:   []tar.Header{{Name: "a", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("v", 65536)}}},
			want: "xattrs have more than 65536 bytes",
		},
		"xattr sum": {
			in: []tar.Header{
				{Name: "a/", Typeflag: tar.TypeDir, PAXRecords: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("v", 40000)}},
				{Name: "a/", Typeflag: tar.TypeDir, PAXRecords: map[string]string{"SCHILY.xattr.user.b": strings.Repeat("v", 40000)}},
			},
			want: "xattrs have more than 65536 bytes",
		},
		"xattr name":    {in: []tar.Header{{Name: "a", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.user." + strings.Repeat("n", 251): ""}}}, want: "xattr name"},
		"no xattr name": {in: []tar.Header{{Name: "a", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.user.": ""}}}, want: "xattr name"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := layer.Read(t.Context(), bytes.NewReader(tarOf(t, test.in...)), layer.Options{Limits: test.limits})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
		})
	}
}

func TestReadAttributes(t *testing.T) {
	at := time.Unix(1700000000, 123456789)
	data := tarOf(t,
		tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o4755, Uid: 4294967294, Gid: 70000, ModTime: at, Format: tar.FormatPAX,
			PAXRecords: map[string]string{
				"SCHILY.xattr.user.x": "a\x00b", "SCHILY.xattr.user.empty": "", "SCHILY.xattr.security.capability": "cap",
				"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.trusted.x": "y", "SCHILY.xattr.nonsense": "y",
				"SCHILY.xattr.system.posix_acl_default": "y", "LIBARCHIVE.xattr.user.y": "eA==",
			}},
		tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "f", Mode: 0o600, ModTime: time.Unix(-1, 0), Format: tar.FormatPAX,
			PAXRecords: map[string]string{"SCHILY.xattr.user.x": "no", "SCHILY.xattr.security.selinux": "yes"}},
		tar.Header{Name: "g/h/", Typeflag: tar.TypeDir, Mode: 0o1777, ModTime: time.Unix(1<<40, 0), Format: tar.FormatPAX},
	)
	want := &layer.Node{Mode: 0o40755, Mtime: at.Unix(), MtimeNsec: 123456789, Children: map[string]*layer.Node{
		"f": {Mode: 0o104755, UID: 4294967294, GID: 70000, Mtime: at.Unix(), MtimeNsec: 123456789,
			Xattrs: map[string]string{"user.x": "a\x00b", "user.empty": "", "security.capability": "cap"}},
		"l": {Mode: 0o120777, Target: "f", Size: 1, Xattrs: map[string]string{"security.selinux": "yes"}},
		"g": {Mode: 0o40755, Implicit: true, Children: map[string]*layer.Node{"h": {Mode: 0o41777}}},
	}}
	if d := cmp.Diff(want, read(t, data).Root); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

func TestHardLinkSetsAttributes(t *testing.T) {
	data := tarOf(t,
		tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o4755, PAXRecords: map[string]string{"SCHILY.xattr.user.x": "1", "SCHILY.xattr.security.capability": "cap"}},
		tar.Header{Name: "g", Typeflag: tar.TypeLink, Linkname: "f", Mode: 0o600, Uid: 7, ModTime: time.Unix(9, 0), PAXRecords: map[string]string{"SCHILY.xattr.user.y": "2"}},
	)
	root := read(t, data).Root
	want := &layer.Node{Mode: 0o100600, UID: 7, Mtime: 9, Xattrs: map[string]string{"user.x": "1", "user.y": "2"}}
	if d := cmp.Diff(want, root.Children["f"]); d != "" || root.Children["f"] != root.Children["g"] {
		t.Errorf("-want +got:\n%s", d)
	}
}

func TestRootHasOnlyATime(t *testing.T) {
	data := tarOf(t, file("a", 0), tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 5, ModTime: time.Unix(77, 0),
		PAXRecords: map[string]string{"SCHILY.xattr.user.x": "1"}})
	root := read(t, data).Root
	root.Children = nil
	if d := cmp.Diff(&layer.Node{Mode: 0o40755, Mtime: 77}, root); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// TestDirectoryTimesAreSetLast: extraction sets them by name at its end, so a
// name that has come to mean something else sets that one's time.
func TestDirectoryTimesAreSetLast(t *testing.T) {
	d := dir("lib")
	d.ModTime = time.Unix(5, 0)
	u := dir("usr")
	u.ModTime = time.Unix(6, 0)
	root := read(t, tarOf(t, u, d, symlink("lib", "usr"))).Root
	if got := root.Children["usr"].Mtime; got != 5 {
		t.Errorf("mtime of usr is %d, want 5", got)
	}
}

func TestReadKnowsWhereContentIs(t *testing.T) {
	long := strings.Repeat("long/", 60) + "name"
	data := tarOf(t, file("empty", 0), file("a", 1), file("b", 512), file(long, 1025), file("\xff", 3))
	data = append(data, bytes.Repeat([]byte("garbage"), 1000)...)
	type announced struct{ header, content, size int64 }
	var got []announced
	in := &oneByte{data: data}
	tree, err := layer.Read(t.Context(), in, layer.Options{OnFile: func(header, content, size int64) {
		if int64(in.at) != content {
			t.Errorf("at OnFile %d bytes have been read, want %d", in.at, content)
		}
		got = append(got, announced{header, content, size})
	}})
	if err != nil {
		t.Fatal(err)
	}
	if tree.Size != int64(len(data)) || tree.Entries != 5 || tree.SparseSize != 0 {
		t.Errorf("size %d, entries %d, sparse %d of %d bytes", tree.Size, tree.Entries, tree.SparseSize, len(data))
	}
	// The long and the odd name each have a PAX header of two blocks.
	want := []announced{{0, 512, 0}, {512, 1024, 1}, {1536, 2048, 512}, {2560, 4096, 1025}, {5632, 7168, 3}}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(announced{})); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	check := func(p string, content []byte) {
		n := tree.Root
		for part := range strings.SplitSeq(p, "/") {
			n = n.Children[part]
		}
		if len(content) == 0 {
			if n.Extents != nil {
				t.Errorf("%q: extents %v of nothing", p, n.Extents)
			}
			return
		}
		e := n.Extents[0]
		if len(n.Extents) != 1 || e.Offset%512 != 0 || e.FileOffset != 0 || !bytes.Equal(data[e.Offset:][:e.Length], content) {
			t.Errorf("%q: extents %v", p, n.Extents)
		}
	}
	check("empty", nil)
	check("a", contentOf("a", 1))
	check("b", contentOf("b", 512))
	check(long, contentOf(long, 1025))
	check("\xff", contentOf("\xff", 3))
}

// oneByte gives one byte at a time.
type oneByte struct {
	data []byte
	at   int
}

func (o *oneByte) Read(p []byte) (int, error) {
	if o.at == len(o.data) {
		return 0, io.EOF
	}
	p[0] = o.data[o.at]
	o.at++
	return 1, nil
}

// TestOldTypes has types that Go's writer does not write: V7 files, contiguous
// files, and global PAX headers.
func TestOldTypes(t *testing.T) {
	data := tarOf(t, file("v7", 5), file("contiguous", 6), file("after", 7))
	retype(data, 0, 0)
	retype(data, 1024, '7')
	var global bytes.Buffer
	w := tar.NewWriter(&global)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "x", "mtime": "99"}}); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	data = append(global.Bytes(), data...)
	tree := read(t, data)
	want := []string{"after 100644 size 7 layer 0", "contiguous 100644 size 6 layer 0", "v7 100644 size 5 layer 0"}
	if d := cmp.Diff(want, list(tree.Root)); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	for name, n := range tree.Root.Children {
		if e := n.Extents[0]; string(data[e.Offset:][:e.Length]) != string(contentOf(name, n.Size)) {
			t.Errorf("%s: content at %v", name, e)
		}
	}
}

// retype gives the header at off another type and the checksum that goes with it.
func retype(data []byte, off int, typeflag byte) {
	h := data[off:][:512]
	h[156] = typeflag
	copy(h[148:], "        ")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
}

func TestReadTruncated(t *testing.T) {
	data := tarOf(t, file("a", 700), file(strings.Repeat("b", 120), 10), file("c", 0))
	for _, n := range []int{1, 511, 513, 1100, 1536 + 100, 1536 + 512 + 100, 1536 + 1024 + 100} {
		_, err := layer.Read(t.Context(), bytes.NewReader(data[:n]), layer.Options{})
		if !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), fmt.Sprintf("read up to %d", n)) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
	bad := bytes.Clone(data)
	bad[1536+3] ^= 1
	if _, err := layer.Read(t.Context(), bytes.NewReader(bad), layer.Options{}); !errors.Is(err, tar.ErrHeader) || !strings.Contains(err.Error(), "offset 1536") {
		t.Errorf("broken header: %v", err)
	}
}

func TestReadStopsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := layer.Read(ctx, bytes.NewReader(tarOf(t, file("a", 0))), layer.Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// TestLinksAreBounded reads tars made so that every name costs as much
// following of links as can be.
func TestLinksAreBounded(t *testing.T) {
	p := ""
	var deep, chain []tar.Header
	for range 200 {
		deep = append(deep, symlink(p+"l", "d"), dir(p+"d"))
		p += "d/"
	}
	for i := range 40 {
		chain = append(chain, symlink(fmt.Sprint("l", i), fmt.Sprint("l", i+1)))
	}
	for i := range 5000 {
		deep = append(deep, file(fmt.Sprint(strings.Repeat("l/", 200), i), 0))
		chain = append(chain, file(fmt.Sprint("l0/", strings.Repeat("x/", 1900), i), 0))
	}
	for name, in := range map[string][]tar.Header{"deep": deep, "chain": chain} {
		data := tarOf(t, in...)
		_, err := layer.Read(t.Context(), bytes.NewReader(data), layer.Options{})
		if err == nil || !strings.Contains(err.Error(), "too much work") {
			t.Errorf("%s: error %.300v", name, err)
		}
	}
}

// zeros is an endless file.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestFilesBeyond4GiB(t *testing.T) {
	if testing.Short() {
		t.Skip("reads 5 GiB of zeros")
	}
	const size = 5<<30 + 1
	var head bytes.Buffer
	w := tar.NewWriter(&head)
	h := file("big", size)
	if err := w.WriteHeader(&h); err != nil {
		t.Fatal(err)
	}
	start := int64(head.Len())
	in := io.MultiReader(&head, io.LimitReader(zeros{}, size+511), bytes.NewReader(tarOf(t, file("after", 3))))
	tree, err := layer.Read(t.Context(), in, layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if e := tree.Root.Children["big"].Extents; len(e) != 1 || e[0] != (layer.Extent{Offset: start, Length: size}) {
		t.Errorf("big: %+v", e)
	}
	if e := tree.Root.Children["after"].Extents; len(e) != 1 || e[0] != (layer.Extent{Offset: start + size + 511 + 512, Length: 3}) {
		t.Errorf("after: %+v", e)
	}
}

// TestTreesAreSmall: what a tree keeps of a header doesn't keep the header's
// whole text alive.
func TestTreesAreSmall(t *testing.T) {
	var in []tar.Header
	for i := range 100 {
		name := fmt.Sprintf("%s-%d", strings.Repeat("n", 120), i)
		in = append(in, tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("t", 120), Format: tar.FormatPAX,
			PAXRecords: map[string]string{"SCHILY.xattr.security.x": "v", "COMMENT.x": strings.Repeat("c", 400<<10)}})
	}
	data := tarOf(t, in...)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	tree := read(t, data)
	runtime.GC()
	runtime.ReadMemStats(&after)
	if kept := int64(after.HeapAlloc) - int64(before.HeapAlloc); kept > 4<<20 || len(tree.Root.Children) != 100 {
		t.Errorf("a tree of %d names takes %d bytes", len(tree.Root.Children), kept)
	}
	runtime.KeepAlive(data)
}

func TestACLs(t *testing.T) {
	const access, standard = "system.posix_acl_access", "system.posix_acl_default"
	full := acl(1, 6, 1<<32-1, 2, 5, 1000, 4, 4, 1<<32-1, 16, 4, 1<<32-1, 32, 4, 1<<32-1)
	tests := map[string]struct {
		name, in, want, err string
	}{
		"follows the mode":  {access, acl(1, 7, 0, 2, 5, 1000, 4, 4, 0, 16, 7, 0, 32, 7, 0), full, ""},
		"says nothing more": {access, acl(1, 7, 0, 4, 7, 0, 32, 7, 0), "", ""},
		"empty":             {access, acl(), "", ""},
		"unknown version":   {access, "\x01\x00\x00\x00", "", ""},
		"not on files":      {standard, acl(1, 7, 0, 4, 7, 0, 32, 7, 0), "", ""},
		"no mask":           {access, acl(1, 7, 0, 2, 5, 1000, 4, 4, 0, 32, 7, 0), "", "not valid"},
		"no owner":          {access, acl(4, 4, 0, 32, 7, 0), "", "not valid"},
		"out of order":      {access, acl(4, 4, 0, 1, 7, 0, 32, 7, 0), "", "not valid"},
		"twice":             {access, acl(1, 7, 0, 4, 4, 0, 4, 4, 0, 32, 7, 0), "", "not valid"},
		"nobody":            {access, acl(1, 7, 0, 2, 5, 1<<32-1, 4, 4, 0, 16, 7, 0, 32, 7, 0), "", "not valid"},
		"permissions":       {access, acl(1, 8, 0, 4, 4, 0, 32, 7, 0), "", "not valid"},
		"unknown tag":       {access, acl(1, 7, 0, 4, 4, 0, 32, 7, 0, 64, 7, 0), "", "not valid"},
		"cut":               {access, full[:len(full)-1], "", "not valid"},
		"short":             {access, "\x02", "", "not valid"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			h := file("f", 0)
			h.PAXRecords = map[string]string{"SCHILY.xattr." + test.name: test.in}
			tree, err := layer.Read(t.Context(), bytes.NewReader(tarOf(t, h)), layer.Options{})
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := tree.Root.Children["f"].Xattrs[test.name]; got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
	d := dir("d")
	d.PAXRecords = map[string]string{"SCHILY.xattr." + standard: acl(1, 7, 0, 4, 7, 0, 32, 0, 0)}
	if got := read(t, tarOf(t, d)).Root.Children["d"].Xattrs[standard]; got != acl(1, 7, 1<<32-1, 4, 7, 1<<32-1, 32, 0, 1<<32-1) {
		t.Errorf("default ACL %q", got)
	}
}
