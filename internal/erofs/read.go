package erofs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
)

// ErrCorrupt is what errors about an image are that is not one that this package
// writes: damaged, hostile, or of a form of EROFS that Sluice has no use for.
// Errors of the reader that the image comes from are not ErrCorrupt.
var ErrCorrupt = errors.New("not a valid Sluice EROFS image")

func corrupt(format string, args ...any) error {
	return fmt.Errorf("erofs: %w: %w", ErrCorrupt, fmt.Errorf(format, args...))
}

func corruptInode(nid uint64, format string, args ...any) error {
	return corrupt("nid %d: %w", nid, fmt.Errorf(format, args...))
}

// FS is an open image. Its methods may be called concurrently if the reader's
// ReadAt may be. Each checks the part of the image that it reads and returns an
// error, never a panic, for what is wrong there; what it allocates is bounded by the
// size of the image. Whether the whole is sound, loops and all, only Check says.
//
// Inodes are named by their number in the image, the nid, which is also what
// stat(2) reports as the inode number on a mount.
type FS struct {
	r       io.ReaderAt
	size    int64
	uuid    [16]byte
	inodes  uint64
	meta    int64
	xattrs  int64
	devices []Device
}

// Info is what an inode says of itself.
type Info struct {
	NID          uint64
	Mode         uint32 // type and permission bits as in stat(2)
	UID, GID     uint32
	Mtime        int64 // seconds since 1970
	MtimeNsec    uint32
	Size         int64 // content of a file, target of a link, or entries of a directory in bytes
	Nlink        uint32
	Major, Minor uint32 // of a device node
}

// DirEntry is one name in a directory.
type DirEntry struct {
	Name string
	NID  uint64
	Type uint32 // the type bits of the mode
}

// Open reads the superblock and the device table of the image that r has in its
// first size bytes.
func Open(r io.ReaderAt, size int64) (*FS, error) {
	f := &FS{r: r, size: size}
	if size < devtabOff+inodeSize || size%BlockSize != 0 || size/BlockSize >= nullBlock {
		return nil, corrupt("a size of %d bytes is not possible", size)
	}
	var sb [BlockSize]byte
	if err := f.read(sb[:], superOff); err != nil {
		return nil, err
	}
	if got := le.Uint32(sb[sbMagic:]); got != magic {
		return nil, corrupt("the magic number is %#x, not %#x", got, uint32(magic))
	}
	if got, want := le.Uint32(sb[sbChecksum:]), checksum(sb[:]); got != want {
		return nil, corrupt("the superblock has the checksum %#x, not %#x", want, got)
	}
	if err := f.parseSuper(sb[:superSize]); err != nil {
		return nil, err
	}
	return f, f.readDevices(int(le.Uint16(sb[sbDevices:])))
}

// HeadSize is how much of an image, from its beginning, ImageSize needs, in bytes.
const HeadSize = superOff + superSize

// ImageSize returns the size in bytes that an image, whose first HeadSize bytes or
// more head is, says that it has: for files in which something else follows. Whether
// it's right is for Open and Check to say.
func ImageSize(head []byte) (int64, error) {
	if len(head) < HeadSize {
		return 0, corrupt("%d bytes are less than a superblock's", len(head))
	}
	if got := le.Uint32(head[superOff+sbMagic:]); got != magic {
		return 0, corrupt("the magic number is %#x, not %#x", got, uint32(magic))
	}
	return int64(le.Uint32(head[superOff+sbBlocks:])) * BlockSize, nil
}

// parseSuper accepts exactly the superblocks that Write makes.
func (f *FS) parseSuper(sb []byte) error {
	f.inodes = le.Uint64(sb[sbInodes:])
	f.meta = int64(le.Uint32(sb[sbMetaBlock:])) * BlockSize
	f.xattrs = int64(le.Uint32(sb[sbXattrBlock:])) * BlockSize
	copy(f.uuid[:], sb[sbUUID:])

	var want [superSize]byte
	le.PutUint32(want[sbMagic:], magic)
	copy(want[sbChecksum:], sb[sbChecksum:sbCompat])
	le.PutUint32(want[sbCompat:], featureCompat)
	want[sbBlockBits] = blockBits
	le.PutUint16(want[sbRootNID:], rootNID)
	copy(want[sbInodes:], sb[sbInodes:sbInodes+8])
	le.PutUint32(want[sbBlocks:], uint32(f.size/BlockSize))
	copy(want[sbMetaBlock:], sb[sbMetaBlock:sbUUID+16])
	le.PutUint32(want[sbIncompat:], featureIncompat)
	copy(want[sbDevices:], sb[sbDevices:sbDevices+2])
	le.PutUint16(want[sbDevtabSlot:], devtabOff/slotSize)
	if [superSize]byte(sb) != want {
		for i := range want {
			if sb[i] != want[i] {
				return corrupt("byte %d of the superblock is %#x, not %#x; wrong features, block size, root or size", i, sb[i], want[i])
			}
		}
	}
	end := int64(devtabOff) + int64(le.Uint16(sb[sbDevices:]))*slotSize
	root := f.meta + rootNID*nidUnit
	if root < end || root > f.size-inodeSize {
		return corrupt("the metadata begin at %d, the device table ends at %d, the image at %d", root, end, f.size)
	}
	if f.xattrs != 0 && (f.xattrs < end || f.xattrs >= root) {
		return corrupt("the shared attributes begin at %d, the device table ends at %d, the metadata begin at %d", f.xattrs, end, root)
	}
	return nil
}

func (f *FS) readDevices(n int) error {
	table := make([]byte, n*slotSize)
	if err := f.read(table, devtabOff); err != nil {
		return err
	}
	at := f.size / BlockSize
	for i := range n {
		slot := table[i*slotSize:][:slotSize]
		d := Device{Size: int64(le.Uint32(slot[slotBlocks:])) * BlockSize}
		tag, rest, _ := strings.Cut(string(slot[:maxTag]), "\x00")
		d.Tag = tag
		if strings.Trim(rest, "\x00") != "" {
			return corrupt("device %d: the tag has bytes after its end", i)
		}
		if got, want := le.Uint32(slot[slotUniaddr:]), uniaddr(at, d.Size); got != want {
			return corrupt("device %d has the unified address %d, not %d", i, got, want)
		}
		if !isZero(slot[slotUniaddr+4:]) {
			return corrupt("device %d: reserved bytes are not zero", i)
		}
		at += d.Size / BlockSize
		f.devices = append(f.devices, d)
	}
	return nil
}

func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// read fills p from off, which is checked.
func (f *FS) read(p []byte, off int64) error {
	if off < 0 || off > f.size-int64(len(p)) {
		return corrupt("%d bytes at %d are behind the end of the image, which has %d", len(p), off, f.size)
	}
	if len(p) == 0 {
		return nil
	}
	if n, err := f.r.ReadAt(p, off); n < len(p) {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("erofs: reading %d bytes of the image at %d: %w", len(p), off, err)
	}
	return nil
}

// Root returns the root directory's nid.
func (f *FS) Root() uint64 { return rootNID }

// Size returns the image's size in bytes.
func (f *FS) Size() int64 { return f.size }

// Inodes returns how many inodes the image says that it has.
func (f *FS) Inodes() uint64 { return f.inodes }

// UUID returns the file system's UUID, which Write makes from the content.
func (f *FS) UUID() [16]byte { return f.uuid }

// Devices returns the devices. Their sizes are rounded up to blocks, because
// the image records blocks.
func (f *FS) Devices() []Device { return slices.Clone(f.devices) }

// Stat returns what the inode nid says of itself.
func (f *FS) Stat(nid uint64) (Info, error) {
	in, err := f.inode(nid)
	return in.Info, err
}

// ReadDir returns the entries of the directory nid without "." and "..", sorted
// by the bytes of their names.
func (f *FS) ReadDir(nid uint64) ([]DirEntry, error) {
	in, err := f.inode(nid)
	if err != nil {
		return nil, err
	}
	var entries []DirEntry
	err = f.entries(&in, func(e DirEntry) error {
		if e.Name != "." && e.Name != ".." {
			entries = append(entries, e)
		}
		return nil
	})
	return entries, err
}

// Lookup returns the nid of the file at a slash-separated path from the root.
// Symbolic links are not followed, "" and "/" are the root. If there is no such
// file the error is fs.ErrNotExist.
func (f *FS) Lookup(path string) (uint64, error) {
	nid := f.Root()
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			continue
		}
		entries, err := f.ReadDir(nid)
		if err != nil {
			return 0, err
		}
		i, ok := slices.BinarySearchFunc(entries, name, func(e DirEntry, name string) int {
			return strings.Compare(e.Name, name)
		})
		if !ok {
			return 0, &fs.PathError{Op: "lookup", Path: path, Err: fs.ErrNotExist}
		}
		nid = entries[i].NID
	}
	return nid, nil
}

// ReadLink returns the target of the symbolic link nid.
func (f *FS) ReadLink(nid uint64) (string, error) {
	in, err := f.inode(nid)
	if err != nil {
		return "", err
	}
	if in.Mode&modeType != modeSymlink {
		return "", fmt.Errorf("erofs: nid %d is not a symbolic link", nid)
	}
	return f.target(&in)
}

// Xattrs returns the extended attributes of the inode nid, sorted by name.
func (f *FS) Xattrs(nid uint64) ([]Xattr, error) {
	in, err := f.inode(nid)
	if err != nil {
		return nil, err
	}
	x, err := f.inodeXattrs(&in)
	if err != nil {
		return nil, err
	}
	attrs := make([]Xattr, 0, len(x.inline)+len(x.shared))
	attrs = append(attrs, x.inline...)
	for _, num := range x.shared {
		attr, err := f.sharedXattr(nid, num)
		if err != nil {
			return nil, err
		}
		attrs = append(attrs, attr)
	}
	slices.SortFunc(attrs, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	return attrs, nil
}

// Extents returns where the content of the regular file nid lies, sorted by
// FileOffset, neighbours joined. What they leave out is a hole.
func (f *FS) Extents(nid uint64) ([]Extent, error) {
	in, err := f.inode(nid)
	if err != nil {
		return nil, err
	}
	if in.Mode&modeType != modeRegular {
		return nil, fmt.Errorf("erofs: nid %d is not a regular file", nid)
	}
	var extents []Extent
	err = f.extents(&in, nil, func(e Extent) { extents = append(extents, e) })
	return extents, err
}
