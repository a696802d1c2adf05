package erofs

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// file is what a test expects of a path, and what it finds there, whoever reads
// the image.
type file struct {
	Mode, UID, GID uint32
	Mtime          int64
	MtimeNsec      uint32
	Nlink          uint32
	Size           int64 // regular files only
	Major, Minor   uint32
	Target         string
	Content        string
	Xattrs         map[string]string
	First          string // the least path of the same inode
}

// files is a whole tree by path.
type files map[string]*file

// link fills in First, from a key that is equal for the names of one inode.
func link[K comparable](fs files, key map[string]K) {
	first := make(map[K]string)
	for _, path := range slices.Sorted(maps.Keys(fs)) {
		k := key[path]
		if _, ok := first[k]; !ok {
			first[k] = path
		}
		fs[path].First = first[k]
	}
}

// expect returns what img must look like when its devices hold contents.
func expect(img Image, contents [][]byte) files {
	fs, key := make(files), make(map[string]*Inode)
	links := make(map[*Inode]uint32)
	var visit func(path string, in *Inode)
	visit = func(path string, in *Inode) {
		f := &file{
			Mode: in.Mode, UID: in.UID, GID: in.GID,
			Mtime: in.Mtime, MtimeNsec: in.MtimeNsec,
			Major: in.Major, Minor: in.Minor, Target: in.Target,
			Xattrs: make(map[string]string),
		}
		for _, x := range in.Xattrs {
			f.Xattrs[x.Name] = x.Value
		}
		if in.Mode&modeType == modeRegular {
			f.Size, f.Content = in.Size, content(in.Size, in.Extents, contents)
		}
		if in.isDir() {
			links[in] += 2
		} else {
			links[in]++
		}
		fs[path], key[path] = f, in
		for _, e := range in.Entries {
			if e.Inode.isDir() {
				links[in]++
			}
			visit(strings.TrimSuffix(path, "/")+"/"+e.Name, e.Inode)
		}
	}
	visit("/", img.Root)
	for path, f := range fs {
		f.Nlink = links[key[path]]
	}
	link(fs, key)
	return fs
}

// content puts a file together; files too large to hold are compared elsewhere.
func content(size int64, extents []Extent, contents [][]byte) string {
	if size > 16<<20 {
		return "large"
	}
	p := make([]byte, size)
	for _, e := range extents {
		copy(p[e.FileOffset:e.FileOffset+e.Length], contents[e.Device][e.Offset:])
	}
	return string(p)
}

// readAll reads an image by this package.
func readAll(t testing.TB, image []byte, contents [][]byte) files {
	t.Helper()
	f := open(t, image)
	fs, key := make(files), make(map[string]uint64)
	err := f.Walk(t.Context(), func(path string, in Info) error {
		got := &file{
			Mode: in.Mode, UID: in.UID, GID: in.GID, Mtime: in.Mtime, MtimeNsec: in.MtimeNsec,
			Nlink: in.Nlink, Major: in.Major, Minor: in.Minor, Xattrs: make(map[string]string),
		}
		fs[path], key[path] = got, in.NID
		attrs, err := f.Xattrs(in.NID)
		if err != nil {
			return err
		}
		for _, x := range attrs {
			got.Xattrs[x.Name] = x.Value
		}
		switch in.Mode & modeType {
		case modeRegular:
			extents, err := f.Extents(in.NID)
			if err != nil {
				return err
			}
			got.Size, got.Content = in.Size, content(in.Size, extents, contents)
		case modeSymlink:
			got.Target, err = f.ReadLink(in.NID)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	link(fs, key)
	return fs
}

func open(t testing.TB, image []byte) *FS {
	t.Helper()
	f, err := Open(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func write(t testing.TB, img Image) []byte {
	t.Helper()
	var buf bytes.Buffer
	n, err := Write(&buf, img)
	if err != nil {
		t.Fatal(err)
	}
	if n != int64(buf.Len()) || n%BlockSize != 0 {
		t.Fatalf("Write returned %d and wrote %d bytes", n, buf.Len())
	}
	return buf.Bytes()
}

// deviceContents returns bytes for the devices of img, none of them zero, so that
// a hole cannot be taken for content.
func deviceContents(devices []Device) [][]byte {
	contents := make([][]byte, len(devices))
	for i, d := range devices {
		r := rand.New(rand.NewPCG(uint64(i), 7))
		contents[i] = make([]byte, d.Size)
		for j := range contents[i] {
			contents[i][j] = byte(1 + r.UintN(255))
		}
	}
	return contents
}

func writeFiles(t testing.TB, dir string, image []byte, contents [][]byte) (meta string, devices []string) {
	t.Helper()
	meta = filepath.Join(dir, "meta.erofs")
	writeFile(t, meta, image)
	for i, c := range contents {
		name := filepath.Join(dir, fmt.Sprintf("device%d", i))
		writeFile(t, name, c)
		devices = append(devices, name)
	}
	return meta, devices
}

func writeFile(t testing.TB, name string, p []byte) {
	t.Helper()
	if err := os.WriteFile(name, p, 0o600); err != nil {
		t.Fatal(err)
	}
}

func dir(entries ...Entry) *Inode { return &Inode{Mode: modeDir | 0o755, Entries: entries} }

func name(name string, in *Inode) Entry { return Entry{name, in} }

// specimen is one of everything.
func specimen() Image {
	devices := []Device{{Size: 40 * BlockSize, Tag: "first"}, {Size: 10 * BlockSize}, {Size: 0}, {Size: 700}}
	acl := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x04\x00\x04\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"
	hard := &Inode{
		Mode: modeRegular | 0o644, Size: 700, Extents: []Extent{{0, 512, 700, 0}},
		Xattrs: []Xattr{{"security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"}, {"user.odd", "x"}},
	}
	holes := &Inode{Mode: modeRegular | 0o600, Size: 10*BlockSize + 1, Extents: []Extent{
		{0, 20 * BlockSize, 2 * BlockSize, 6 * BlockSize},
		{1, 0, 4 * BlockSize, 0},
		{0, 3 * BlockSize, 1, 10 * BlockSize},
	}}
	long := strings.Repeat("n", 255)
	deep := dir()
	for range 40 {
		deep = dir(name("d", deep))
	}
	crowd := dir()
	for i := range 200 {
		crowd.Entries = append(crowd.Entries, name(fmt.Sprintf("file %d", i*7919%1000), &Inode{
			Mode: modeRegular, Xattrs: []Xattr{{"security.selinux", "system_u:object_r:usr_t:s0"}, {"user.n", fmt.Sprint(i)}},
		}))
	}
	return Image{Devices: devices, Root: &Inode{
		Mode: modeDir | 0o1777, UID: 1, GID: 4_000_000_000, Mtime: 1_700_000_000, MtimeNsec: 123_456_789,
		Xattrs: []Xattr{{"trusted.overlay.opaque", "y"}, {"system.posix_acl_default", acl}},
		Entries: []Entry{
			name("hard1", hard), name("hard2", hard), name("holes", holes), name("deep", deep), name("crowd", crowd),
			name("empty", &Inode{Mode: modeRegular | 0o4755}),
			name("whole", &Inode{Mode: modeRegular | 0o444, Mtime: -5, MtimeNsec: 999_999_999, Size: 9*BlockSize + 100, Extents: []Extent{{1, 0, 9*BlockSize + 100, 0}}}),
			name("all hole", &Inode{Mode: modeRegular | 0o444, Size: 100_000}),
			name("acl", &Inode{Mode: modeRegular | 0o644, Xattrs: []Xattr{{"system.posix_acl_access", acl}}}),
			name("large attribute", &Inode{Mode: modeSymlink | 0o777, Target: "t", Xattrs: []Xattr{{"trusted." + strings.Repeat("a", 100), strings.Repeat("v", 40_000)}}}),
			name("whiteout", &Inode{Mode: modeChar}),
			name("null", &Inode{Mode: modeChar | 0o666, Major: 1, Minor: 3}),
			name("disk", &Inode{Mode: modeBlock | 0o660, Major: 4095, Minor: 1<<20 - 1}),
			name("fifo", &Inode{Mode: modeFIFO | 0o600}), name("socket", &Inode{Mode: modeSocket | 0o600}),
			name("link", &Inode{Mode: modeSymlink | 0o777, Target: "hard1"}),
			name("link447", &Inode{Mode: modeSymlink | 0o777, Target: strings.Repeat("x", 447)}),
			name("link448", &Inode{Mode: modeSymlink | 0o777, Target: strings.Repeat("x", 448)}),
			name("link449", &Inode{Mode: modeSymlink | 0o777, Target: strings.Repeat("x", 449)}),
			name("link4095", &Inode{Mode: modeSymlink | 0o777, Target: strings.Repeat("y/", 2047) + "z"}),
			name(long, dir(name(long, &Inode{Mode: modeRegular}))),
			name("\xff\xfe not UTF-8 \x01", &Inode{Mode: modeRegular}), name("!before the dots", dir()), name("-", dir()), name(".hidden", dir()), name("..more", dir()),
		},
	}}
}

// drawImage returns a random image with all kinds of files.
func drawImage(t *rapid.T) Image {
	img := Image{}
	for range rapid.IntRange(0, 5).Draw(t, "devices") {
		img.Devices = append(img.Devices, Device{Size: rapid.Int64Range(0, 64*BlockSize).Draw(t, "device size")})
	}
	img.Root = drawInode(t, modeDir, img.Devices)
	dirs, linkable := []*Inode{img.Root}, []*Inode(nil)
	for range rapid.IntRange(0, 60).Draw(t, "entries") {
		parent := rapid.SampledFrom(dirs).Draw(t, "parent")
		var in *Inode
		if len(linkable) > 0 && rapid.IntRange(0, 9).Draw(t, "hard link") == 0 {
			in = rapid.SampledFrom(linkable).Draw(t, "linked")
		} else {
			in = drawInode(t, rapid.SampledFrom([]uint32{
				modeRegular, modeRegular, modeRegular, modeDir, modeDir, modeSymlink, modeSymlink, modeChar, modeBlock, modeFIFO, modeSocket,
			}).Draw(t, "type"), img.Devices)
		}
		n := drawName(t)
		if slices.ContainsFunc(parent.Entries, func(e Entry) bool { return e.Name == n }) {
			continue
		}
		parent.Entries = append(parent.Entries, Entry{n, in})
		if in.isDir() {
			dirs = append(dirs, in)
		} else {
			linkable = append(linkable, in)
		}
	}
	return img
}

func drawName(t *rapid.T) string {
	n := rapid.OneOf(
		rapid.StringMatching(`[.!a-c]{1,4}`),
		rapid.Map(rapid.SliceOfN(rapid.ByteRange(1, 255), 1, 255), func(p []byte) string { return string(p) }),
		rapid.StringOfN(rapid.RuneFrom([]rune("xy")), 200, 255, 255),
	).Filter(func(s string) bool { return checkName(s) == nil }).Draw(t, "name")
	return n
}

func drawInode(t *rapid.T, typ uint32, devices []Device) *Inode {
	in := &Inode{
		Mode:      typ | rapid.Uint32Range(0, 0o7777).Draw(t, "permissions"),
		UID:       rapid.Uint32Range(0, 1<<32-2).Draw(t, "uid"),
		GID:       rapid.Uint32Range(0, 1<<32-2).Draw(t, "gid"),
		Mtime:     rapid.Int64Range(-1<<40, 1<<40).Draw(t, "mtime"),
		MtimeNsec: rapid.Uint32Range(0, 999_999_999).Draw(t, "nanoseconds"),
	}
	switch typ {
	case modeRegular:
		drawExtents(t, in, devices)
	case modeSymlink:
		n := rapid.SampledFrom([]int{1, 5, 30, 400, 447, 448, 449, 511, 512, 513, 4095}).Draw(t, "target length")
		in.Target = strings.Repeat("t", n)
	case modeChar, modeBlock:
		in.Major = rapid.Uint32Range(0, 4095).Draw(t, "major")
		in.Minor = rapid.Uint32Range(0, 1<<20-1).Draw(t, "minor")
	}
	for i := range rapid.SampledFrom([]int{0, 0, 0, 1, 2, 5}).Draw(t, "attributes") {
		prefix := rapid.SampledFrom([]string{"trusted.", "security.x"}).Draw(t, "prefix")
		in.Xattrs = append(in.Xattrs, Xattr{
			Name:  prefix + fmt.Sprint(i) + rapid.StringMatching(`[a-z.]{0,20}`).Draw(t, "attribute"),
			Value: rapid.SampledFrom([]string{"", "x", "common value", strings.Repeat("long", 300), rapid.String().Draw(t, "value")}).Draw(t, "which value"),
		})
	}
	return in
}

// drawExtents makes in of pieces of the devices and holes.
func drawExtents(t *rapid.T, in *Inode, devices []Device) {
	unit := int64(BlockSize) << rapid.IntRange(0, 3).Draw(t, "alignment")
	for range rapid.IntRange(0, 5).Draw(t, "pieces") {
		length := unit * rapid.Int64Range(1, 6).Draw(t, "length")
		d := rapid.IntRange(-1, len(devices)-1).Draw(t, "device")
		if d >= 0 {
			room := devices[d].Size - length
			if room < 0 {
				continue
			}
			off := rapid.Int64Range(0, room/BlockSize).Draw(t, "offset") * BlockSize
			in.Extents = append(in.Extents, Extent{d, off, length, in.Size})
		}
		in.Size += length
	}
	if in.Size > 0 {
		// The last block of a file is seldom full.
		cut := rapid.Int64Range(0, BlockSize-1).Draw(t, "cut")
		in.Size -= cut
		if n := len(in.Extents); n > 0 {
			last := &in.Extents[n-1]
			last.Length = min(last.Length, in.Size-last.FileOffset)
		}
	}
}

// shuffle returns a copy of img that says the same in another order.
func shuffle(img Image, r *rand.Rand) Image {
	copies := make(map[*Inode]*Inode)
	var clone func(in *Inode) *Inode
	clone = func(in *Inode) *Inode {
		if c, ok := copies[in]; ok {
			return c
		}
		c := *in
		copies[in] = &c
		c.Entries = slices.Clone(in.Entries)
		c.Xattrs = slices.Clone(in.Xattrs)
		c.Extents = slices.Clone(in.Extents)
		r.Shuffle(len(c.Entries), func(i, j int) { c.Entries[i], c.Entries[j] = c.Entries[j], c.Entries[i] })
		r.Shuffle(len(c.Xattrs), func(i, j int) { c.Xattrs[i], c.Xattrs[j] = c.Xattrs[j], c.Xattrs[i] })
		r.Shuffle(len(c.Extents), func(i, j int) { c.Extents[i], c.Extents[j] = c.Extents[j], c.Extents[i] })
		for i := range c.Entries {
			c.Entries[i].Inode = clone(c.Entries[i].Inode)
		}
		return &c
	}
	return Image{Root: clone(img.Root), Devices: img.Devices}
}

// readersAt makes the contents of devices readers.
func readersAt(contents [][]byte) []io.ReaderAt {
	readers := make([]io.ReaderAt, len(contents))
	for i, c := range contents {
		readers[i] = bytes.NewReader(c)
	}
	return readers
}

// bigTree returns an image of n files, a hundred to a directory.
func bigTree(n int) Image {
	root := dir()
	var d *Inode
	for i := range n {
		if i%100 == 0 {
			d = dir()
			root.Entries = append(root.Entries, name(fmt.Sprintf("directory%d", i/100), d))
		}
		d.Entries = append(d.Entries, name(fmt.Sprintf("some_file_name%d.py", i), &Inode{
			Mode: modeRegular | 0o644, Mtime: int64(i), Size: 1000, Extents: []Extent{{0, int64(i) * 1024, 1000, 0}},
		}))
	}
	return Image{Root: root, Devices: []Device{{Size: int64(n) * 1024}}}
}
