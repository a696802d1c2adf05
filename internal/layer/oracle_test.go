package layer_test

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/log"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"sluice/internal/layer"
)

// TestMergeEqualsExtraction makes random stacks of layers, extracts them with
// containerd for overlayfs, and compares each Context with its directory and
// the merged tree with what the kernel's overlayfs shows.
func TestMergeEqualsExtraction(t *testing.T) {
	base := scratch(t)
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp(base, "stack")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		s := &stack{t: t, dir: dir, richDirs: rapid.Bool().Draw(t, "richDirs"), linky: rapid.IntRange(0, 2).Draw(t, "linky") == 0}
		for range rapid.IntRange(1, 4).Draw(t, "layers") {
			s.addLayer()
		}
		s.compare()
	})
}

// scratch is a tmpfs, which keeps every xattr and node type and needs no disk.
func scratch(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount tmpfs and overlayfs and to extract device nodes")
	}
	if err := log.SetLevel("error"); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256m,mode=0755"); err != nil {
		t.Skipf("needs tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	if err := unix.Setxattr(dir, "user.probe", []byte("1"), 0); err != nil {
		t.Skipf("needs user xattrs on tmpfs (Linux 6.6): %v", err)
	}
	unix.Umask(0o022)
	return dir
}

// stack is one random image: the tars, and where containerd extracted them.
type stack struct {
	t        *rapid.T
	dir      string
	richDirs bool // directories have xattrs and setgid bits
	linky    bool // little else than links, and names that lead through them
	tars     [][]byte
	lower    []string // extracted, lowest first
	tries    int
}

// addLayer adds a layer of those random entries that containerd accepts.
func (s *stack) addLayer() {
	var kept []tar.Header
	var data []byte
	var where string
	for range rapid.IntRange(1, 14).Draw(s.t, "entries") {
		try := append(slices.Clone(kept), s.entry(kept))
		packed := pack(s.t, try)
		dir, err := s.extract(packed)
		if err != nil || s.knownDifference(try, packed) {
			os.RemoveAll(dir)
			continue
		}
		os.RemoveAll(where)
		kept, data, where = try, packed, dir
	}
	if where != "" {
		s.tars = append(s.tars, data)
		s.lower = append(s.lower, where)
	}
}

// extract does what containerd's applier does on an overlayfs mount.
func (s *stack) extract(data []byte) (string, error) {
	s.tries++
	dir := filepath.Join(s.dir, fmt.Sprint("layer", s.tries))
	if err := os.Mkdir(dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	parents := slices.Clone(s.lower)
	slices.Reverse(parents)
	_, err := archive.Apply(s.t.Context(), dir, bytes.NewReader(data),
		archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(parents))
	return dir, err
}

// knownDifference reports whether the last of the entries makes one of the
// differences to containerd that the package comment declares: a whiteout and
// then a directory of the same name, and a directory listed after its children
// when there is something to inherit.
func (s *stack) knownDifference(try []tar.Header, packed []byte) bool {
	last := try[len(try)-1]
	for _, h := range try {
		hidden, ok := strings.CutPrefix(path.Base(h.Name), ".wh.")
		if ok && slices.Contains(strings.Split(path.Clean(last.Name), "/"), hidden) && last.Typeflag == tar.TypeDir {
			return true
		}
	}
	if !s.richDirs || last.Typeflag != tar.TypeDir {
		return false
	}
	return s.implied(packed) < s.implied(pack(s.t, try[:len(try)-1]))
}

func (s *stack) implied(data []byte) int {
	tree, err := layer.Read(s.t.Context(), bytes.NewReader(data), layer.Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	return implied(tree.Root)
}

func implied(n *layer.Node) int {
	count := 0
	if n.Implicit {
		count++
	}
	for _, c := range n.Children {
		count += implied(c)
	}
	return count
}

var (
	odd     = []string{"a", "b", "c", "d", "e f", "\xff\xfe", "ü", strings.Repeat("n", 255)}
	targets = []string{"a", "b", "../a", "../b/c", "/a", "/a/b", "a/../c", ".", "/", "..", "../../../d", "c/d/", "e f", "nowhere",
		"b/../a/d", "d/../../c", "b/c/d", "../d/./../a", "c//b"}
	capability = string([]byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	acls       = []string{
		acl(1, 7, 0, 2, 5, 1000, 4, 4, 9, 16, 5, 0, 32, 1, 0), // owner, a user, group, mask, others
		acl(1, 6, 0, 4, 4, 0, 8, 7, 70000, 16, 7, 0, 32, 0, 0),
		acl(1, 7, 0, 4, 0, 0, 16, 7, 0, 32, 0, 0),
		acl(1, 6, 0, 4, 4, 0, 32, 4, 0), // no more than a mode
		acl(),
		acl(1, 7, 0, 2, 5, 1000, 4, 4, 0, 32, 1, 0), // invalid: no mask
		"\x01\x00\x00\x00", "\x02", "",
	}
	times = []time.Time{
		time.Unix(0, 0), time.Unix(1700000000, 0), time.Unix(1700000000, 123456789), time.Unix(1<<33, 1),
		time.Unix(-5, 0), time.Unix(1<<40, 0),
	}
)

// acl is an ACL's xattr: tag, permissions, id of each entry.
func acl(fields ...uint32) string {
	p := binary.LittleEndian.AppendUint32(nil, 2)
	for i := 0; i < len(fields); i += 3 {
		p = binary.LittleEndian.AppendUint16(p, uint16(fields[i]))
		p = binary.LittleEndian.AppendUint16(p, uint16(fields[i+1]))
		p = binary.LittleEndian.AppendUint32(p, fields[i+2])
	}
	return string(p)
}

func name(t *rapid.T, label string) string {
	parts := rapid.SliceOfN(rapid.SampledFrom(odd[:5]), 1, 4).Draw(t, label)
	if rapid.IntRange(0, 9).Draw(t, "odd") == 0 {
		parts[len(parts)-1] = rapid.SampledFrom(odd).Draw(t, "last")
	}
	return strings.Join(parts, "/")
}

func (s *stack) entry(earlier []tar.Header) tar.Header {
	t := s.t
	h := tar.Header{
		Name:    name(t, "name"),
		Mode:    int64(rapid.SampledFrom([]int{0o644, 0o755, 0, 0o4755, 0o2775, 0o1777, 0o7777, 0o400}).Draw(t, "mode")),
		Uid:     rapid.SampledFrom([]int{0, 1000, 65536, 4294967294}).Draw(t, "uid"),
		Gid:     rapid.SampledFrom([]int{0, 1000, 70000}).Draw(t, "gid"),
		ModTime: rapid.SampledFrom(times).Draw(t, "mtime"),
		Format:  tar.FormatPAX,
	}
	if !s.richDirs {
		h.Mode &^= 0o2000
	}
	dir, base := path.Split(h.Name)
	kind := rapid.IntRange(0, 15).Draw(t, "kind")
	if s.linky {
		kind = []int{0, 4, 7, 9}[kind%4]
	}
	switch kind {
	case 0, 1, 2, 3:
		h.Typeflag = tar.TypeReg
		h.Size = int64(rapid.SampledFrom([]int{0, 1, 511, 512, 513, 5000}).Draw(t, "size"))
	case 4, 5, 6:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
	case 7, 8:
		h.Typeflag = tar.TypeSymlink
		h.Linkname = rapid.SampledFrom(targets).Draw(t, "target")
	case 9, 10:
		h.Typeflag = tar.TypeLink
		h.Linkname = name(t, "linkname")
		if len(earlier) > 0 && rapid.IntRange(0, 3).Draw(t, "known") > 0 {
			h.Linkname = rapid.SampledFrom(earlier).Draw(t, "earlier").Name
		}
		if rapid.Bool().Draw(t, "rooted") {
			h.Linkname = "/" + h.Linkname
		}
	case 11:
		h.Typeflag = tar.TypeFifo
	case 12:
		h.Typeflag = rapid.SampledFrom([]byte{tar.TypeChar, tar.TypeBlock}).Draw(t, "device")
		n := rapid.SampledFrom([][2]int64{{0, 0}, {1, 3}, {4095, 1048575}}).Draw(t, "number")
		h.Devmajor, h.Devminor = n[0], n[1]
	case 13, 14:
		h.Typeflag = tar.TypeReg
		h.Name = dir + ".wh." + base
	case 15:
		h.Typeflag = tar.TypeReg
		h.Name = dir + rapid.SampledFrom([]string{".wh..wh..opq", ".wh..wh..opq", ".wh..wh.aufs"}).Draw(t, "marker")
	}
	if rapid.IntRange(0, 2).Draw(t, "xattrs") == 0 && (s.richDirs || h.Typeflag != tar.TypeDir) {
		h.PAXRecords = map[string]string{}
		for _, k := range rapid.SliceOfN(rapid.SampledFrom([]string{
			"user.a", "user.b", "security.capability", "security.selinux", "trusted.overlay.opaque", "trusted.x", "nonsense.x",
			"system.posix_acl_access",
		}), 1, 3).Draw(t, "xattr") {
			v := rapid.SampledFrom([]string{"v", "", "w\x00x"}).Draw(t, "value")
			if k == "security.capability" {
				v = capability
			}
			if k == "system.posix_acl_access" {
				v = rapid.SampledFrom(acls).Draw(t, "acl")
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
	}
	return h
}

// pack makes the tar. File contents are made of the entry's number.
func pack(t *rapid.T, headers []tar.Header) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i, h := range headers {
		h.PAXRecords = maps.Clone(h.PAXRecords)
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("write header %+v: %v", h, err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(bytes.Repeat([]byte{byte('A' + i)}, int(h.Size))); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// compare checks what layer makes of the stack.
func (s *stack) compare() {
	t := s.t
	var trees []*layer.Tree
	for i, data := range s.tars {
		tree, err := layer.Read(t.Context(), bytes.NewReader(data), layer.Options{})
		if err != nil {
			t.Fatalf("containerd extracts layer %d, Read: %v", i, err)
		}
		trees = append(trees, tree)
	}
	m, err := layer.Merge(trees)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range m.Context {
		if d := diff(walkDisk(t, s.lower[i]), s.walkTree(c.Root, nil)); d != "" {
			t.Fatalf("layer %d (-containerd +ours):\n%s\n%s", i, d, s.listing())
		}
	}
	mnt := filepath.Join(s.dir, "mnt")
	empty := filepath.Join(s.dir, "empty")
	for _, d := range []string{mnt, empty} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	dirs := slices.Clone(s.lower)
	slices.Reverse(dirs)
	dirs = append(dirs, empty, empty)
	if err := unix.Mount("overlay", mnt, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(slices.Compact(dirs), ":")); err != nil {
		if len(s.lower) == 0 {
			return
		}
		t.Fatal(err)
	}
	defer unix.Unmount(mnt, unix.MNT_DETACH)
	got := s.walkTree(m.Tree.Root, m.Context)
	if d := diff(walkDisk(t, mnt), got); d != "" {
		t.Fatalf("merged (-overlayfs +ours):\n%s\n%s", d, s.listing())
	}
}

// diff compares, except for times that are left to chance, and whiteouts of
// names that begin with .wh. themselves, which containerd makes of aufs' files.
func diff(want, got map[string]attributes) string {
	for p, f := range want {
		if strings.HasPrefix(path.Base(p), ".wh.") && f.Mode == unix.S_IFCHR {
			delete(want, p)
			continue
		}
		if got[p].Mtime == "any" {
			f.Mtime = "any"
			want[p] = f
		}
	}
	return cmp.Diff(want, got)
}

// attributes is everything that is compared.
type attributes struct {
	Mode         uint32
	UID, GID     uint32
	Mtime        string // "any" where containerd leaves the time of extraction
	Size         int64
	Major, Minor uint32
	Target       string
	Xattrs       map[string]string
	Content      string
	Same         string // the first path with the same inode
}

// walkDisk reads a directory. A name that can't be looked up is a whiteout
// that overlayfs lists but doesn't show.
func walkDisk(t *rapid.T, root string) map[string]attributes {
	all := map[string]attributes{}
	inodes := map[uint64]string{}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			if os.IsNotExist(err) {
				return nil
			}
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err == unix.ENOENT {
			return nil
		} else if err != nil {
			return err
		}
		f := attributes{
			Mode: st.Mode, UID: st.Uid, GID: st.Gid, Xattrs: xattrs(t, p),
			Mtime: fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec),
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			f.Content, f.Size = string(content), st.Size
		case unix.S_IFLNK:
			if f.Target, err = os.Readlink(p); err != nil {
				return err
			}
			f.Size = st.Size
		case unix.S_IFCHR, unix.S_IFBLK:
			f.Major, f.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
		}
		name := strings.TrimPrefix(p, root)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if _, seen := inodes[st.Ino]; !seen {
				inodes[st.Ino] = name
			}
			f.Same = inodes[st.Ino]
		}
		all[name] = plain(f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	root0 := all[""]
	root0.Mtime = "any"
	root0.Xattrs = nil // of overlayfs: an opaque root, which it then ignores
	all[""] = root0
	return all
}

// plain removes what nobody promises of a whiteout.
func plain(f attributes) attributes {
	if f.Mode&unix.S_IFMT == unix.S_IFCHR && f.Major == 0 && f.Minor == 0 {
		return attributes{Mode: unix.S_IFCHR}
	}
	return f
}

func xattrs(t *rapid.T, p string) map[string]string {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		t.Fatalf("list xattrs of %q: %v", p, err)
	}
	var all map[string]string
	for _, k := range strings.FieldsFunc(string(buf[:n]), func(r rune) bool { return r == 0 }) {
		n, err := unix.Lgetxattr(p, k, buf)
		if err != nil {
			t.Fatalf("xattr %s of %q: %v", k, p, err)
		}
		if all == nil {
			all = map[string]string{}
		}
		all[k] = string(buf[:n])
	}
	return all
}

// walkTree turns a tree into the same form. context, for a merged tree, tells
// which directories have a time that extraction leaves to chance.
func (s *stack) walkTree(root *layer.Node, context []*layer.Tree) map[string]attributes {
	all := map[string]attributes{}
	inodes := map[*layer.Node]string{}
	var walk func(p string, n *layer.Node)
	walk = func(p string, n *layer.Node) {
		f := attributes{
			Mode: n.Mode, UID: n.UID, GID: n.GID, Size: n.Size, Major: n.Major, Minor: n.Minor,
			Target: n.Target, Xattrs: n.Xattrs, Mtime: fmt.Sprintf("%d.%09d", n.Mtime, n.MtimeNsec),
		}
		if n.IsDir() {
			if p == "" || n.Implicit || implicitOnTop(p, context) {
				f.Mtime = "any"
			}
			if n.Opaque && p != "" {
				f.Xattrs = maps.Clone(n.Xattrs)
				if f.Xattrs == nil {
					f.Xattrs = map[string]string{}
				}
				f.Xattrs["trusted.overlay.opaque"] = "y"
			}
		} else {
			if _, seen := inodes[n]; !seen {
				inodes[n] = p
			}
			f.Same = inodes[n]
		}
		if n.Type() == layer.TypeRegular {
			f.Content = s.content(n)
		}
		all[p] = plain(f)
		for _, name := range n.Names() {
			walk(p+"/"+name, n.Children[name])
		}
	}
	walk("", root)
	return all
}

func implicitOnTop(p string, context []*layer.Tree) bool {
	for i := len(context) - 1; i >= 0; i-- {
		n := context[i].Root
		for part := range strings.SplitSeq(p[1:], "/") {
			if n = n.Children[part]; n == nil {
				break
			}
		}
		if n != nil {
			return n.Implicit
		}
	}
	return false
}

func (s *stack) content(n *layer.Node) string {
	content := make([]byte, n.Size)
	for _, e := range n.Extents {
		copy(content[e.FileOffset:][:e.Length], s.tars[e.Layer][e.Offset:])
	}
	return string(content)
}

// listing shows the layers' entries in a failure.
func (s *stack) listing() string {
	var out strings.Builder
	for i, data := range s.tars {
		r := tar.NewReader(bytes.NewReader(data))
		for h, err := r.Next(); err == nil; h, err = r.Next() {
			fmt.Fprintf(&out, "layer %d: %c %q -> %q mode %o %v %v\n", i, h.Typeflag, h.Name, h.Linkname, h.Mode, h.ModTime.Unix(), h.PAXRecords)
		}
	}
	return out.String()
}
