package erofs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// small is a tree with a bit of everything whose image has few bytes that do not
// matter.
func small() Image {
	hard := &Inode{Mode: modeRegular | 0o644, Size: 600, Extents: []Extent{{1, 512, 600, 0}}}
	label := Xattr{"security.selinux", "system_u:object_r:usr_t:s0"}
	return Image{
		Devices: []Device{{Size: 8 * BlockSize, Tag: "layer"}, {Size: 4 * BlockSize}},
		Root: dir(
			name("a", &Inode{Mode: modeRegular | 0o644, Size: 1500, Extents: []Extent{{0, 512, 1500, 0}}, Xattrs: []Xattr{label, {"user.own", "value"}}}),
			name("b", hard), name("c", hard),
			name("d", dir(name("sub", dir(name("file", &Inode{Mode: modeRegular, Xattrs: []Xattr{label}}))))),
			name("holes", &Inode{Mode: modeRegular, Size: 8 * BlockSize, Extents: []Extent{{0, 0, 1024, 2048}}}),
			name("l", &Inode{Mode: modeSymlink | 0o777, Target: "target"}),
			name("long", &Inode{Mode: modeSymlink | 0o777, Target: strings.Repeat("t", 600)}),
			name("null", &Inode{Mode: modeChar | 0o666, Major: 1, Minor: 3}),
			name("wide", dir(name(strings.Repeat("x", 255), dir()), name(strings.Repeat("y", 255), &Inode{Mode: modeFIFO}))),
		),
	}
}

// damage is an image that a test spoils.
type damage struct {
	t testing.TB
	p []byte
}

// inode returns the bytes from the inode at path on.
func (d damage) inode(path string) []byte {
	f := open(d.t, d.p)
	nid, err := f.Lookup(path)
	if err != nil {
		d.t.Fatal(err)
	}
	return d.p[f.meta+int64(nid)*nidUnit:]
}

func (d damage) nid(path string) uint64 {
	nid, err := open(d.t, d.p).Lookup(path)
	if err != nil {
		d.t.Fatal(err)
	}
	return nid
}

// dirent returns the entry called name of the directory at path, which must be
// in the directory's first block or inline.
func (d damage) dirent(path, name string) []byte {
	f := open(d.t, d.p)
	in, err := f.inode(d.nid(path))
	if err != nil {
		d.t.Fatal(err)
	}
	block := d.p[int64(in.union)*BlockSize:]
	if in.Size == in.tail {
		block = d.p[in.dataOff:]
	}
	for i := 0; ; i++ {
		e := block[i*direntSize:]
		if at := int(le.Uint16(e[8:])); bytes.HasPrefix(block[at:], []byte(name)) && (name != ".." || block[at-1] == '.') {
			return e
		}
	}
}

func (d damage) super(off int, b ...byte) { copy(d.p[superOff+off:], b) }

// seal makes the checksum right again.
func seal(p []byte) []byte {
	if len(p) >= superOff+BlockSize {
		sb := p[superOff : superOff+BlockSize]
		le.PutUint32(sb[sbChecksum:], checksum(sb))
	}
	return p
}

func TestCheckRejects(t *testing.T) {
	put16, put32, put64 := le.PutUint16, le.PutUint32, le.PutUint64
	for _, c := range []struct {
		want  string
		spoil func(d damage)
	}{
		{"magic", func(d damage) { d.super(0, 0) }},
		{"byte 8 of the superblock", func(d damage) { d.super(sbCompat, 7) }},
		{"byte 12 of the superblock", func(d damage) { d.super(sbBlockBits, 12) }},
		{"byte 13 of the superblock", func(d damage) { d.super(13, 1) }},
		{"byte 14 of the superblock", func(d damage) { d.super(sbRootNID, 19) }},
		{"byte 36 of the superblock", func(d damage) { d.super(sbBlocks, 255) }},
		{"byte 64 of the superblock", func(d damage) { d.super(64, 'v') }},
		{"byte 80 of the superblock", func(d damage) { d.super(sbIncompat, 0x8c) }},
		{"byte 88 of the superblock", func(d damage) { d.super(sbDevtabSlot, 10) }},
		{"the metadata begin at", func(d damage) { d.super(sbMetaBlock, 1) }},
		{"the metadata begin at", func(d damage) { d.super(sbMetaBlock, 255, 255, 255, 255) }},
		{"shared attributes begin at", func(d damage) { d.super(sbXattrBlock, 255) }},
		{"inodes are in the tree", func(d damage) { d.super(sbInodes, 3) }},
		{"unified address", func(d damage) { d.p[devtabOff+slotUniaddr]++ }},
		{"shared attributes begin at", func(d damage) { d.super(sbDevices, 4) }},
		{"reserved bytes", func(d damage) { d.p[devtabOff+127] = 1 }},
		{"after its end", func(d damage) { d.p[devtabOff+63] = 1 }},

		{"64-byte inode", func(d damage) { d.inode("a")[inFormat] = layoutChunked << 1 }},
		{"is not one of a file", func(d damage) { put16(d.inode("a")[inMode:], 0o050644) }},
		{"its directory entry", func(d damage) { put16(d.inode("null")[inMode:], modeBlock) }},
		{"nanoseconds", func(d damage) { put32(d.inode("a")[inMtimeNsec:], 1e9) }},
		{"no links", func(d damage) { put32(d.inode("a")[inNlink:], 0) }},
		{"reserved bytes", func(d damage) { d.inode("a")[inUpper] = 1 }},
		{"reserved bytes", func(d damage) { d.inode("a")[63] = 1 }},
		{"size 18446744073709551615", func(d damage) { put64(d.inode("a")[inSize:], 1<<64-1) }},
		{"chunk indexes at", func(d damage) { put64(d.inode("a")[inSize:], 1<<62) }},
		{"the chunk format", func(d damage) { put16(d.inode("a")[inUnion:], 0x61) }},
		{"the chunk format", func(d damage) { put16(d.inode("a")[inUnion:], 1) }},
		{"the chunk format 0x10021", func(d damage) { put32(d.inode("a")[inUnion:], 0x10021) }},
		{"layout 0", func(d damage) { d.inode("a")[inFormat] = 1 }},
		{"no data", func(d damage) { d.inode("null")[inSize] = 1 }},
		{"no data", func(d damage) { d.inode("d/sub/file")[inUnion] = 1 }},
		{"on device 3 of 2", func(d damage) { put16(d.inode("b")[inodeSize+2:], 3) }},
		{"on device 0 of 2", func(d damage) { put16(d.inode("b")[inodeSize+2:], 0) }},
		{"the chunk at 0 is 600 bytes at 1536", func(d damage) { put32(d.inode("b")[inodeSize+4:], 3) }},
		{"at block 1", func(d damage) { put16(d.inode("b")[inodeSize:], 1) }},
		{"at block 0·2³²+4294967295", func(d damage) { put32(d.inode("b")[inodeSize+4:], nullBlock) }},
		{"names fewer", func(d damage) { put32(d.inode("b")[inNlink:], 3) }},
		{"more names", func(d damage) { put32(d.inode("b")[inNlink:], 1) }},

		{"target of 0 bytes", func(d damage) { put64(d.inode("l")[inSize:], 0) }},
		{"target of 4096 bytes", func(d damage) { put64(d.inode("long")[inSize:], 4096) }},
		{"do not fit into the block", func(d damage) { put64(d.inode("l")[inSize:], 500) }},
		{"inline link target", func(d damage) { put64(d.inode("l")[inSize:], 600) }},
		{"zero byte", func(d damage) { d.inode("l")[inodeSize+2] = 0 }},
		{"blocks of data from block", func(d damage) { put32(d.inode("long")[inUnion:], 1<<31) }},
		{"blocks of data from block", func(d damage) { put32(d.inode("l")[inUnion:], 1) }},

		{"a directory of 0 bytes", func(d damage) { put64(d.inode("d")[inSize:], 0) }},
		{"blocks of data from block", func(d damage) { put64(d.inode("wide")[inSize:], 1<<40+100) }},
		{"links, 1 subdirectories", func(d damage) { put32(d.inode("d")[inNlink:], 4) }},
		{"the directory \"sub\" has been reached twice", func(d damage) { put64(d.dirent("d", "sub"), d.nid("wide")) }},
		{"reached twice", func(d damage) { put64(d.dirent("d", "sub"), d.nid("d")) }},
		{"reached twice", func(d damage) { put64(d.dirent("d/sub", "file"), rootNID); d.dirent("d/sub", "file")[10] = 2 }},
		{`entry "." is`, func(d damage) { put64(d.dirent("d", "."), rootNID) }},
		{`entry ".." is`, func(d damage) { put64(d.dirent("d", ".."), d.nid("d")) }},
		{"says type 0", func(d damage) { d.dirent("d", "sub")[10] = 9 }},
		{"reserved byte", func(d damage) { d.dirent("d", "sub")[11] = 1 }},
		{"first name of a directory block", func(d damage) { put16(d.dirent("d", ".")[8:], 0) }},
		{"first name of a directory block", func(d damage) { put16(d.dirent("d", ".")[8:], 60000) }},
		{"the name of the directory entry", func(d damage) { put16(d.dirent("d", "sub")[8:], 60000) }},
		{"the name of the directory entry", func(d damage) { put16(d.dirent("d", "sub")[8:], 1) }},
		{"comes after", func(d damage) { d.rename("b", "a") }},
		{"comes after", func(d damage) { d.rename("a", "z") }},
		{"slash or a zero", func(d damage) { d.rename("b", "/") }},
		{"slash or a zero", func(d damage) { d.rename("b", "\x00") }},
		{"no inode can have this number", func(d damage) { put64(d.dirent("d", "sub"), 0) }},
		{"no inode can have this number", func(d damage) { put64(d.dirent("d", "sub"), 1<<63) }},
		{"no inode can have this number", func(d damage) { put64(d.dirent("d", "sub"), 1<<59) }},

		{"area without attributes", func(d damage) { put16(d.inode("a")[inXattrs:], 1) }},
		{"shared attributes in", func(d damage) { d.inode("a")[inodeSize+4] = 200 }},
		{"more than a count", func(d damage) { d.inode("a")[inodeSize] = 1 }},
		{"shared attribute 1000", func(d damage) { put32(d.inode("a")[inodeSize+12:], 1000) }},
		{"shared attribute 4294967295", func(d damage) { put32(d.inode("a")[inodeSize+12:], 1<<32-1) }},
		{"an attribute of", func(d damage) { put16(d.inode("a")[inodeSize+16+2:], 60000) }},
		{"behind the prefix number", func(d damage) { d.inode("a")[inodeSize+16+1] = 5 }},
		{"behind the prefix number", func(d damage) { d.inode("a")[inodeSize+16+1] = xattrACLAccess }},
		{"behind the prefix number", func(d damage) { d.inode("a")[inodeSize+16+4] = 0 }},
	} {
		t.Run(c.want, func(t *testing.T) {
			d := damage{t, write(t, small())}
			c.spoil(d)
			f, err := Open(bytes.NewReader(seal(d.p)), int64(len(d.p)))
			if err == nil {
				_, err = f.Check(t.Context(), Limits{})
			}
			if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v; want ErrCorrupt with %q", err, c.want)
			}
		})
	}
}

// rename changes the one-byte name from of a root entry.
func (d damage) rename(from, to string) {
	e := d.dirent("", from)
	f := open(d.t, d.p)
	in, err := f.inode(rootNID)
	if err != nil {
		d.t.Fatal(err)
	}
	block := d.p[int64(in.union)*BlockSize:]
	if in.Size == in.tail {
		block = d.p[in.dataOff:]
	}
	block[le.Uint16(e[8:])] = to[0]
}

func TestOpenRejects(t *testing.T) {
	image := write(t, small())
	for _, size := range []int64{0, 512, 1024, 1536, int64(len(image)) - 1, int64(len(image)) - 512, int64(len(image)) + 512, 1 << 50} {
		if _, err := Open(bytes.NewReader(image), size); err == nil {
			t.Errorf("an image of %d bytes opens with a size of %d", len(image), size)
		}
	}
	image[superOff+sbUUID]++
	if _, err := Open(bytes.NewReader(image), int64(len(image))); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("a wrong checksum: %v", err)
	}
}

func TestCheckDevices(t *testing.T) {
	f := open(t, write(t, small()))
	for _, c := range []struct {
		sizes []int64
		want  string
	}{
		{[]int64{8 * BlockSize, 4 * BlockSize}, ""},
		{[]int64{8*BlockSize - 511, 4 * BlockSize}, ""},
		{[]int64{}, "2 devices, not 0"},
		{[]int64{8 * BlockSize}, "2 devices, not 1"},
		{[]int64{8 * BlockSize, 5 * BlockSize}, "device 1 is recorded"},
		{[]int64{-1, 4 * BlockSize}, "device 0 is recorded"},
	} {
		_, err := f.Check(t.Context(), Limits{Devices: c.sizes})
		if c.want == "" && err != nil || c.want != "" && (!errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("sizes %d: %v; want %q", c.sizes, err, c.want)
		}
	}
	// The last block of a file is only partly on the device.
	img := Image{Devices: []Device{{Size: 1024}}, Root: dir(name("f", &Inode{Mode: modeRegular, Size: 600, Extents: []Extent{{0, 0, 600, 0}}}))}
	_, err := open(t, write(t, img)).Check(t.Context(), Limits{Devices: []int64{1000}})
	if !errors.Is(err, ErrCorrupt) {
		t.Errorf("half a block at the end of a device: %v", err)
	}
}

func TestCheckLimits(t *testing.T) {
	image := write(t, small())
	f := open(t, image)
	for _, lim := range []Limits{{Size: int64(len(image)) - 1}, {Inodes: 12}, {Content: 6195}, {Depth: 1}} {
		if _, err := f.Check(t.Context(), lim); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%+v: %v", lim, err)
		}
	}
	want := Summary{Inodes: 13, Directories: 5, Files: 4, Symlinks: 2, Specials: 2, Names: 13, Depth: 2, Content: 6196, Mapped: 3124}
	got, err := f.Check(t.Context(), Limits{Size: int64(len(image)), Inodes: 13, Content: 6196, Depth: 2})
	if err != nil || got != want {
		t.Errorf("Check = %+v, %v; want %+v", got, err, want)
	}
}

func TestCheckCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := open(t, write(t, small())).Check(ctx, Limits{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// brokenReader fails from an offset on.
type brokenReader struct {
	io.ReaderAt
	from int64
	err  error
}

func (r brokenReader) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > r.from {
		return 0, r.err
	}
	return r.ReaderAt.ReadAt(p, off)
}

func TestCheckReportsReaderError(t *testing.T) {
	image := write(t, bigTree(1000))
	want := errors.New("no such disk")
	f, err := Open(brokenReader{bytes.NewReader(image), int64(len(image)) / 2, want}, int64(len(image)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Check(t.Context(), Limits{}); !errors.Is(err, want) || errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
}

// Many inodes that claim the same long list of chunks must not make Check slow.
func TestCheckBoundsOverlap(t *testing.T) {
	img := Image{Root: dir(), Devices: []Device{{Size: 512}}}
	for i := range 20_000 {
		img.Root.Entries = append(img.Root.Entries, name(fmt.Sprint(i), &Inode{Mode: modeRegular, Size: 1}))
	}
	image := write(t, img)
	f := open(t, image)
	entries, err := f.ReadDir(f.Root())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		off := f.meta + int64(e.NID)*nidUnit
		le.PutUint64(image[off+inSize:], uint64(f.size-off-4096)/chunkIndexSize*BlockSize)
	}
	start := time.Now()
	if _, err := open(t, seal(image)).Check(t.Context(), Limits{}); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
	if d := time.Since(start); d > time.Minute {
		t.Errorf("Check took %v", d)
	}
}

func TestLookup(t *testing.T) {
	f := open(t, write(t, small()))
	for path, want := range map[string]uint32{"": modeDir, "/": modeDir, "d/sub/file": modeRegular, "/l": modeSymlink, "//d//sub/": modeDir} {
		nid, err := f.Lookup(path)
		if err != nil {
			t.Fatal(err)
		}
		if in, err := f.Stat(nid); err != nil || in.Mode&modeType != want {
			t.Errorf("%q: %+v, %v", path, in, err)
		}
	}
	for _, path := range []string{"nothing", "d/nothing", "aa"} {
		if _, err := f.Lookup(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %v", path, err)
		}
	}
	if _, err := f.Lookup("a/b"); err == nil {
		t.Error("a file has an entry")
	}
}

func TestDevices(t *testing.T) {
	got := open(t, write(t, small())).Devices()
	want := []Device{{Size: 8 * BlockSize, Tag: "layer"}, {Size: 4 * BlockSize}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Where 32 bits do not suffice, devices have no unified address.
func TestDevicesBeyondUnifiedAddresses(t *testing.T) {
	img := Image{Root: dir(), Devices: []Device{{Size: 1 << 40}, {Size: 1 << 40}, {Size: 512}}}
	image := write(t, img)
	if diff := cmp.Diff(img.Devices, open(t, image).Devices()); diff != "" {
		t.Error(diff)
	}
	for i, want := range []bool{true, false, false} {
		if got := le.Uint32(image[devtabOff+i*slotSize+slotUniaddr:]) != 0; got != want {
			t.Errorf("device %d has a unified address: %v", i, got)
		}
	}
}

// The cache must give the same bytes whatever it has dropped.
func TestPageCacheEvicts(t *testing.T) {
	p := make([]byte, 70<<20+512)
	r := rand.New(rand.NewPCG(1, 1))
	for i := 0; i < len(p); i += 512 {
		le.PutUint64(p[i:], r.Uint64())
	}
	c := &pageCache{r: bytes.NewReader(p), size: int64(len(p)), pages: make(map[int64][]byte)}
	got := make([]byte, 9000)
	for range 40_000 {
		off := r.IntN(len(p))
		want := p[off:min(len(p), off+r.IntN(len(got)))]
		if n, err := c.ReadAt(got[:len(want)], int64(off)); err != nil || !bytes.Equal(got[:n], want) {
			t.Fatalf("%d bytes at %d: %d, %v", len(want), off, n, err)
		}
	}
	if len(c.pages) != cachePages {
		t.Errorf("%d pages are kept", len(c.pages))
	}
}

// readEverything uses all methods on all inodes.
func readEverything(f *FS) error {
	return f.Walk(context.Background(), func(_ string, in Info) error {
		var errs [3]error
		_, errs[0] = f.Xattrs(in.NID)
		switch in.Mode & modeType {
		case modeRegular:
			_, errs[1] = f.Extents(in.NID)
		case modeDir:
			_, errs[1] = f.ReadDir(in.NID)
		case modeSymlink:
			_, errs[1] = f.ReadLink(in.NID)
		}
		_, errs[2] = f.Stat(in.NID)
		return errors.Join(errs[:]...)
	})
}

// checkBytes checks p as an image. What passes must be readable.
func checkBytes(t testing.TB, p []byte) bool {
	f, err := Open(bytes.NewReader(p), int64(len(p)))
	if err != nil {
		return false
	}
	if _, err = f.Check(context.Background(), Limits{}); err != nil {
		_ = readEverything(f) // may fail, must not panic or hang
		return false
	}
	if err := readEverything(f); err != nil {
		t.Errorf("Check accepts an image that cannot be read: %v", err)
	}
	return true
}

// Every byte of an image in turn is changed.
func TestCheckEveryByte(t *testing.T) {
	image := write(t, small())
	accepted := 0
	for i := range image {
		for _, x := range []byte{1, 0x80, 0xff} {
			p := slices.Clone(image)
			p[i] ^= x
			if checkBytes(t, seal(p)) {
				accepted++
			}
		}
	}
	// Owners, times, permissions, names, targets, values, tags, gaps and the space before
	// the superblock may have other bytes.
	if share := float64(accepted) / float64(3*len(image)); share > 0.85 || share < 0.2 {
		t.Errorf("%.2f of the changed images are accepted", share)
	}
}

// Run it with -fuzzminimizetime 1x: images are large for Go's minimizer.
func FuzzCheck(f *testing.F) {
	f.Add(write(f, small()))
	f.Add(write(f, Image{Root: dir()}))
	f.Add(write(f, bigTree(30)))
	crowd := small()
	for i := range 60 {
		crowd.Root.Entries = append(crowd.Root.Entries, name(fmt.Sprintf("more%d", i), dir()))
	}
	f.Add(write(f, crowd))
	f.Fuzz(func(t *testing.T, p []byte) {
		checkBytes(t, p)
		// A random change seldom has the checksum right.
		p = slices.Clone(p[:len(p)/BlockSize*BlockSize])
		if len(p) >= superOff+BlockSize {
			le.PutUint32(p[superOff+sbBlocks:], uint32(len(p)/BlockSize))
			checkBytes(t, seal(p))
		}
	})
}

func BenchmarkWrite(b *testing.B) {
	for _, n := range []int{20_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			img := bigTree(n)
			for b.Loop() {
				if _, err := Write(io.Discard, img); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkCheck(b *testing.B) {
	for _, n := range []int{20_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			image := write(b, bigTree(n))
			f := open(b, image)
			b.SetBytes(int64(len(image)))
			for b.Loop() {
				if _, err := f.Check(context.Background(), Limits{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// What an image's beginning says of its size is what Open then takes.
func TestImageSize(t *testing.T) {
	image := write(t, Image{Root: &Inode{Mode: modeDir | 0o755}, Devices: []Device{{Size: 4096}}})
	for _, head := range [][]byte{image[:HeadSize], image, append(slices.Clone(image), make([]byte, 8192)...)} {
		size, err := ImageSize(head)
		if err != nil || size != int64(len(image)) {
			t.Fatalf("%d, %v; it has %d", size, err, len(image))
		}
		if len(head) < len(image) {
			continue
		}
		if _, err := Open(bytes.NewReader(head), size); err != nil {
			t.Error(err)
		}
	}
	for what, head := range map[string][]byte{"nothing": nil, "less than a superblock": image[:HeadSize-1], "zeros": make([]byte, 4096)} {
		if size, err := ImageSize(head); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %d, %v", what, size, err)
		}
	}
}
