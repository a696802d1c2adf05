package erofs

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// The bytes of an image are part of the artifact's format: if this digest
// changes, so does the format version.
func TestWriteGolden(t *testing.T) {
	const want = "c5fd561539d5a0f3262905f4b9dc9f2edd01b88ccb110117ce75cfcf9052d060"
	sum := sha256.Sum256(write(t, specimen()))
	if got := hex.EncodeToString(sum[:]); got != want {
		t.Errorf("the specimen's image has the digest %s, not %s", got, want)
	}
}

func TestWriteIsDeterministic(t *testing.T) {
	want := write(t, specimen())
	for i := range uint64(20) {
		if !bytes.Equal(write(t, shuffle(specimen(), rand.New(rand.NewPCG(i, 1)))), want) {
			t.Fatalf("shuffle %d changed the image", i)
		}
	}
}

func TestWriteDoesNotChangeItsInput(t *testing.T) {
	img, want := shuffle(specimen(), rand.New(rand.NewPCG(1, 1))), shuffle(specimen(), rand.New(rand.NewPCG(1, 1)))
	write(t, img)
	// Not cmp.Diff, whose time doubles with each level of the tree.
	if !reflect.DeepEqual(want, img) {
		t.Error("Write changed the tree")
	}
}

func TestRoundTrip(t *testing.T) {
	img := specimen()
	contents := deviceContents(img.Devices)
	image := write(t, img)
	if diff := cmp.Diff(expect(img, contents), readAll(t, image, contents)); diff != "" {
		t.Error(diff)
	}
	checkImage(t, img, image)
}

func TestRoundTripRandom(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		img := drawImage(r)
		contents := deviceContents(img.Devices)
		image := write(t, img)
		if diff := cmp.Diff(expect(img, contents), readAll(t, image, contents)); diff != "" {
			r.Fatal(diff)
		}
		checkImage(t, img, image)
		if !bytes.Equal(write(t, shuffle(img, rand.New(rand.NewPCG(1, 2)))), image) {
			r.Fatal("another order gives another image")
		}
	})
}

// checkImage runs Check with the exact device sizes.
func checkImage(t testing.TB, img Image, image []byte) Summary {
	t.Helper()
	sizes := make([]int64, len(img.Devices))
	for i, d := range img.Devices {
		sizes[i] = d.Size
	}
	sum, err := open(t, image).Check(t.Context(), Limits{Devices: sizes})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

func TestChunks(t *testing.T) {
	const gib = 1 << 30
	devices := []Device{{Size: 1 << 40}, {Size: 3 << 39}}
	for _, c := range []struct {
		name    string
		size    int64
		extents []Extent
		bits    int
		count   int64
	}{
		{"one byte", 1, []Extent{{0, 0, 1, 0}}, 0, 1},
		{"one block", 512, []Extent{{0, 512, 512, 0}}, 0, 1},
		{"three blocks", 1400, []Extent{{0, 512, 1400, 0}}, 2, 1},
		{"5 GiB", 5*gib + 1, []Extent{{0, 512, 5*gib + 1, 0}}, 24, 1},
		{"1 TiB", 1 << 40, []Extent{{0, 0, 1 << 40, 0}}, 31, 1},
		{"1.5 TiB", 3 << 39, []Extent{{1, 0, 3 << 39, 0}}, 31, 2},
		{"joined", 2048, []Extent{{0, 512, 1024, 0}, {0, 1536, 1024, 1024}}, 2, 1},
		{"two devices", 2048, []Extent{{0, 512, 1024, 0}, {1, 1536, 1024, 1024}}, 1, 2},
		{"hole first", 4096, []Extent{{0, 512, 1024, 3072}}, 1, 4},
		{"hole last", 4096, []Extent{{0, 512, 512, 0}}, 0, 8},
		{"only a hole", 3 << 40, nil, 31, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := &Inode{Mode: modeRegular, Size: c.size, Extents: c.extents}
			p, err := planChunks(in, devices)
			if err != nil || p.bits != c.bits || p.count != c.count {
				t.Errorf("%d chunks of %d<<%d, %v; want %d of <<%d", p.count, BlockSize, p.bits, err, c.count, c.bits)
			}
		})
	}
}

func TestWriteRejects(t *testing.T) {
	regular := func(size int64, extents ...Extent) *Inode {
		return &Inode{Mode: modeRegular, Size: size, Extents: extents}
	}
	loop := dir()
	loop.Entries = []Entry{name("again", dir(name("loop", loop)))}
	twice := dir()
	attr := func(x ...Xattr) *Inode { return &Inode{Mode: modeRegular, Xattrs: x} }
	var many []Xattr
	for i := range 5 {
		many = append(many, Xattr{fmt.Sprintf("user.%d", i), strings.Repeat("v", 60_000)})
	}
	for _, c := range []struct {
		in   *Inode
		want string
	}{
		{nil, "no inode"},
		{&Inode{}, "mode 0 is not"},
		{&Inode{Mode: modeRegular | 1<<20}, "is not one of a file"},
		{&Inode{Mode: modeRegular, MtimeNsec: 1e9}, "nanoseconds"},
		{&Inode{Mode: modeRegular, Entries: []Entry{name("x", dir())}}, "directory entries"},
		{&Inode{Mode: modeDir, Extents: []Extent{{}}}, "has extents"},
		{&Inode{Mode: modeDir, Target: "x"}, "link target"},
		{&Inode{Mode: modeSymlink}, "link target of 0 bytes"},
		{&Inode{Mode: modeSymlink, Target: "a\x00b"}, "link target"},
		{&Inode{Mode: modeSymlink, Target: strings.Repeat("x", 4096)}, "link target of 4096"},
		{&Inode{Mode: modeChar, Major: 4096}, "device number 4096:0"},
		{&Inode{Mode: modeBlock, Minor: 1 << 20}, "device number"},
		{regular(-1), "size -1"},
		{regular(10, Extent{2, 0, 10, 0}), "device 2 of 2"},
		{regular(10, Extent{-1, 0, 10, 0}), "device -1 of 2"},
		{regular(10, Extent{0, 100, 10, 0}), "multiples of 512"},
		{regular(1024, Extent{0, 0, 10, 100}), "multiples of 512"},
		{regular(10, Extent{0, 0, 11, 0}), "of a file of 10 bytes"},
		{regular(10, Extent{0, 0, 0, 0}), "0 bytes at the offset 0"},
		{regular(10, Extent{0, 0, -1, 0}), "-1 bytes"},
		{regular(1<<62, Extent{0, 0, 1 << 62, 1 << 62}), "of a file of"},
		{regular(1024, Extent{0, 1024, 1024, 0}), "which has 2000 bytes"},
		{regular(1024, Extent{0, 1 << 62, 1024, 0}), "which has 2000 bytes"},
		{regular(1900, Extent{0, 0, 1900, 0}), "not wholly on device 0"},
		{regular(1024, Extent{0, 0, 100, 0}), "ends inside a block"},
		{regular(1024, Extent{0, 0, 1024, 0}, Extent{1, 0, 512, 512}), "two extents"},
		{regular(1<<40, Extent{0, 0, 512, 512}), "chunk indexes"},
		{attr(Xattr{"foo.bar", ""}), "EROFS has only"},
		{attr(Xattr{"user.", ""}), "not the name of an attribute"},
		{attr(Xattr{"system.posix_acl_access.x", ""}), "not the name of an attribute"},
		{attr(Xattr{"user.a", ""}, Xattr{"user.a", "x"}), "two attributes"},
		{attr(Xattr{"user.a\x00", ""}), "zero byte"},
		{attr(Xattr{"user." + strings.Repeat("a", 256), ""}), "more than 255"},
		{attr(Xattr{"user.a", strings.Repeat("a", 65536)}), "65536 bytes"},
		{attr(many...), "there is place for"},
		{dir(name("", dir())), `"" cannot be`},
		{dir(name(".", dir())), `"." cannot be`},
		{dir(name("..", dir())), `".." cannot be`},
		{dir(name("a/b", dir())), "slash or a zero byte"},
		{dir(name("a\x00", dir())), "slash or a zero byte"},
		{dir(name(strings.Repeat("a", 256), dir())), "has 256 bytes"},
		{dir(name("a", dir()), name("b", dir()), name("a", dir())), "two entries have the name \"a\""},
		{loop, "a directory has one name"},
		{dir(name("1", twice), name("2", twice)), "a directory has one name"},
	} {
		t.Run(c.want, func(t *testing.T) {
			img := Image{Root: dir(name("top", dir(name("file", c.in)))), Devices: []Device{{Size: 2000}, {Size: 512}}}
			n, err := Write(io.Discard, img)
			if err == nil || n != 0 || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "/top") {
				t.Errorf("Write = %d, %v; want an error with %q and the path", n, err, c.want)
			}
		})
	}
	for want, img := range map[string]Image{
		"root is not":          {},
		"the root":             {Root: &Inode{Mode: modeRegular}},
		"size -1":              {Root: dir(), Devices: []Device{{Size: -1}}},
		"32-bit block":         {Root: dir(), Devices: []Device{{Size: 1 << 41}}},
		"zero byte":            {Root: dir(), Devices: []Device{{Tag: "a\x00"}}},
		"is longer than 64":    {Root: dir(), Devices: []Device{{Tag: strings.Repeat("a", 65)}}},
		"65536 devices; an im": {Root: dir(), Devices: make([]Device, 65536)},
	} {
		if _, err := Write(io.Discard, img); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Write = %v; want an error with %q", err, want)
		}
	}
}

type failingWriter struct{ err error }

func (w failingWriter) Write(p []byte) (int, error) { return len(p) / 2, w.err }

func TestWriteReportsWriterError(t *testing.T) {
	want := errors.New("disk full")
	if n, err := Write(failingWriter{want}, specimen()); !errors.Is(err, want) || n == 0 {
		t.Errorf("Write = %d, %v", n, err)
	}
}

func TestLargeDirectory(t *testing.T) {
	root := dir()
	for i := range 100_000 {
		root.Entries = append(root.Entries, name(fmt.Sprintf("entry-%d", i), &Inode{Mode: modeRegular}))
	}
	img := Image{Root: root}
	image := write(t, img)
	sum := checkImage(t, img, image)
	if sum.Names != 100_000 || sum.Inodes != 100_001 {
		t.Errorf("%+v", sum)
	}
	nid, err := open(t, image).Lookup("/entry-77777")
	if err != nil {
		t.Fatal(err)
	}
	if in, err := open(t, image).Stat(nid); err != nil || in.Nlink != 1 {
		t.Errorf("%+v, %v", in, err)
	}
}

func TestDeepDirectory(t *testing.T) {
	root := dir()
	for range 10_000 {
		root = dir(name("d", root))
	}
	image := write(t, Image{Root: root})
	if _, err := open(t, image).Check(t.Context(), Limits{Depth: 10_000}); err != nil {
		t.Error(err)
	}
	if _, err := open(t, image).Check(t.Context(), Limits{}); err == nil {
		t.Error("a depth of 10,000 passes")
	}
}

// Metadata must not cost more than a few bytes beside the inodes themselves.
func TestImageIsDense(t *testing.T) {
	const n = 20_000
	if perFile := len(write(t, bigTree(n))) / n; perFile > 145 {
		t.Errorf("%d bytes for a file with a name of about 21 bytes", perFile)
	}
}

// manyShared has attributes that fill several blocks when shared, and more of
// them at one inode than it can share.
func manyShared() Image {
	var attrs []Xattr
	for i := range 300 {
		attrs = append(attrs, Xattr{fmt.Sprintf("trusted.number%d", i), strings.Repeat("v", i)})
	}
	return Image{Root: dir(
		name("a", &Inode{Mode: modeRegular, Xattrs: attrs}),
		name("b", &Inode{Mode: modeRegular, Xattrs: attrs}),
		name("c", &Inode{Mode: modeFIFO, Xattrs: attrs[7:90]}),
	)}
}

func TestManySharedXattrs(t *testing.T) {
	img := manyShared()
	image := write(t, img)
	checkImage(t, img, image)
	if diff := cmp.Diff(expect(img, nil), readAll(t, image, nil)); diff != "" {
		t.Error(diff)
	}
	got, err := walkGoErofs(image, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(expect(img, nil), got); diff != "" {
		t.Error(diff)
	}
}

func TestUUIDFollowsContent(t *testing.T) {
	ids := make(map[[16]byte]bool)
	for i := range 10 {
		image := write(t, Image{Root: &Inode{Mode: modeDir, Mtime: int64(i)}})
		f := open(t, image)
		id := f.UUID()
		if ids[id] || id[6]>>4 != 8 || id[8]>>6 != 2 {
			t.Errorf("UUID %x is not new or not of version 8", id)
		}
		ids[id] = true
		if f.Size() != int64(len(image)) || f.Inodes() != 1 {
			t.Errorf("%d bytes, %d inodes", f.Size(), f.Inodes())
		}
	}
}
