package erofs

import (
	"math"
	"strings"
)

// inode is a decoded inode whose own fields are sound, and all of whose data
// are inside the image.
type inode struct {
	Info
	layout    int
	union     uint32
	xattrOff  int64
	xattrSize int64
	dataOff   int64 // of chunk indexes or inline data
	tail      int64 // bytes of inline data
	footprint int64 // bytes of the image that it and its data take
}

// inode reads the inode nid.
func (f *FS) inode(nid uint64) (inode, error) {
	if nid > uint64(f.size)>>nidBits || f.meta+int64(nid)<<nidBits > f.size-inodeSize || nid < rootNID {
		return inode{}, corruptInode(nid, "no inode can have this number; the metadata have %d bytes", f.size-f.meta)
	}
	off := f.meta + int64(nid)<<nidBits
	var raw [inodeSize]byte
	if err := f.read(raw[:], off); err != nil {
		return inode{}, err
	}
	in := inode{
		Info: Info{
			NID:       nid,
			Mode:      uint32(le.Uint16(raw[inMode:])),
			UID:       le.Uint32(raw[inUID:]),
			GID:       le.Uint32(raw[inGID:]),
			Mtime:     int64(le.Uint64(raw[inMtime:])),
			MtimeNsec: le.Uint32(raw[inMtimeNsec:]),
			Nlink:     le.Uint32(raw[inNlink:]),
		},
		union:    le.Uint32(raw[inUnion:]),
		xattrOff: off + inodeSize,
	}
	if n := int64(le.Uint16(raw[inXattrs:])); n > 0 {
		in.xattrSize = xattrHeaderSize + (n-1)*xattrEntrySize
	}
	format, size := le.Uint16(raw[inFormat:]), le.Uint64(raw[inSize:])
	in.layout = int(format >> 1)
	switch {
	case format&formatExtended == 0:
		return in, corruptInode(nid, "the format %#x is not that of a 64-byte inode", format)
	case off%BlockSize+inodeSize > BlockSize:
		return in, corruptInode(nid, "the inode crosses a block border")
	case fileType(in.Mode) == 0:
		return in, corruptInode(nid, "mode %#o is not one of a file", in.Mode)
	case in.MtimeNsec > 999_999_999:
		return in, corruptInode(nid, "%d nanoseconds in the modification time", in.MtimeNsec)
	case in.Nlink == 0:
		return in, corruptInode(nid, "no links")
	case in.xattrSize == xattrHeaderSize:
		return in, corruptInode(nid, "an attribute area without attributes")
	case size > math.MaxInt64-BlockSize:
		return in, corruptInode(nid, "size %d", size)
	case le.Uint16(raw[inUpper:]) != 0 || !isZero(raw[inReserved:]):
		return in, corruptInode(nid, "reserved bytes are not zero")
	}
	in.Size = int64(size)
	in.dataOff = in.xattrOff + in.xattrSize
	in.footprint = inodeSize + in.xattrSize
	if err := f.inodeData(&in); err != nil {
		return in, err
	}
	if in.dataOff > f.size {
		return in, corruptInode(nid, "the attributes end at %d, the image at %d", in.dataOff, f.size)
	}
	return in, nil
}

// inodeData checks the fields that say where the data are.
func (f *FS) inodeData(in *inode) error {
	switch in.Mode & modeType {
	case modeRegular:
		if in.Size == 0 {
			return in.noData()
		}
		return f.chunkedData(in)
	case modeDir:
		if in.Size < 2*direntSize+3 {
			return corruptInode(in.NID, "a directory of %d bytes", in.Size)
		}
		return f.flatData(in)
	case modeSymlink:
		if in.Size < 1 || in.Size > maxTarget {
			return corruptInode(in.NID, "a symbolic link to a target of %d bytes", in.Size)
		}
		if in.layout == layoutInline && in.Size >= BlockSize {
			return corruptInode(in.NID, "an inline link target of %d bytes", in.Size)
		}
		return f.flatData(in)
	case modeChar, modeBlock:
		in.Major, in.Minor = decodeDevice(in.union)
		in.union = 0
	}
	return in.noData()
}

func (in *inode) noData() error {
	if in.layout != layoutPlain || in.union != 0 || in.Size != 0 {
		return corruptInode(in.NID, "mode %#o with the layout %d, the size %d and the address %d; it has no data",
			in.Mode, in.layout, in.Size, in.union)
	}
	return nil
}

// flatData checks data that are in the image, in blocks and inline.
func (f *FS) flatData(in *inode) error {
	switch in.layout {
	case layoutPlain:
	case layoutInline:
		in.tail = in.Size % BlockSize
		off := in.xattrOff - inodeSize
		if in.tail == 0 || off/BlockSize != (in.dataOff+in.tail-1)/BlockSize {
			return corruptInode(in.NID, "%d inline bytes at %d do not fit into the block of the inode", in.tail, in.dataOff)
		}
	default:
		return corruptInode(in.NID, "mode %#o with the layout %d", in.Mode, in.layout)
	}
	blocks := blocksOf(in.Size - in.tail)
	end := f.size / BlockSize
	if blocks > end || int64(in.union) > end-blocks || blocks == 0 && in.union != 0 || blocks > 0 && in.union == 0 {
		return corruptInode(in.NID, "%d blocks of data from block %d in an image of %d", blocks, in.union, end)
	}
	in.footprint += blocks*BlockSize + in.tail
	return nil
}

// chunkedData checks that the chunk indexes are in the image.
func (f *FS) chunkedData(in *inode) error {
	if in.layout != layoutChunked || in.union&^maxChunkBits != chunkIndexes {
		return corruptInode(in.NID, "a regular file with the layout %d and the chunk format %#x", in.layout, in.union)
	}
	in.dataOff = roundUp(in.dataOff, chunkIndexSize)
	n := in.chunks()
	if n > f.size/chunkIndexSize || in.dataOff > f.size-n*chunkIndexSize {
		return corruptInode(in.NID, "%d chunk indexes at %d in an image of %d bytes", n, in.dataOff, f.size)
	}
	in.footprint += n * chunkIndexSize
	return nil
}

func (in *inode) chunkSize() int64 { return BlockSize << (in.union & maxChunkBits) }

func (in *inode) chunks() int64 { return (in.Size-1)/in.chunkSize() + 1 }

// target reads the target of the symbolic link in.
func (f *FS) target(in *inode) (string, error) {
	p := make([]byte, in.Size)
	off := in.dataOff
	if in.layout == layoutPlain {
		off = int64(in.union) * BlockSize
	}
	if err := f.read(p, off); err != nil {
		return "", err
	}
	s := string(p)
	if strings.IndexByte(s, 0) >= 0 {
		return "", corruptInode(in.NID, "the target of the symbolic link has a zero byte")
	}
	return s, nil
}

// extents yields the extents of the regular file in, neighbours joined. Every
// one is on a device and all its blocks are within the device's size: the one in
// the image, or that in sizes, in bytes, if it is not nil.
func (f *FS) extents(in *inode, sizes []int64, yield func(Extent)) error {
	if in.Size == 0 {
		return nil
	}
	chunk := in.chunkSize()
	var buf [BlockSize]byte
	var last Extent
	left := in.chunks()
	for off, at := in.dataOff, int64(0); left > 0; {
		p := buf[:min(left*chunkIndexSize, BlockSize)]
		if err := f.read(p, off); err != nil {
			return err
		}
		off += int64(len(p))
		left -= int64(len(p)) / chunkIndexSize
		for ; len(p) > 0; p = p[chunkIndexSize:] {
			length := min(chunk, in.Size-at)
			e, err := f.chunkExtent(in, p, at, length, sizes)
			if err != nil {
				return err
			}
			at += length
			if e.Length > 0 && e.Device == last.Device && e.Offset == last.Offset+last.Length && e.FileOffset == last.FileOffset+last.Length && last.Length > 0 {
				last.Length += e.Length
				continue
			}
			if last.Length > 0 {
				yield(last)
			}
			last = e
		}
	}
	if last.Length > 0 {
		yield(last)
	}
	return nil
}

// chunkExtent decodes the chunk index p of the chunk at offset at, which has length
// bytes in the file. A hole has the length 0.
func (f *FS) chunkExtent(in *inode, p []byte, at, length int64, sizes []int64) (Extent, error) {
	upper, device, block := le.Uint16(p), int(le.Uint16(p[2:])), le.Uint32(p[4:])
	if upper == 0 && device == 0 && block == nullBlock {
		return Extent{}, nil
	}
	if upper != 0 || device == 0 || device > len(f.devices) || block == nullBlock {
		return Extent{}, corruptInode(in.NID, "the chunk at %d is on device %d of %d at block %d·2³²+%d", at, device, len(f.devices), upper, block)
	}
	e := Extent{Device: device - 1, Offset: int64(block) * BlockSize, Length: length, FileOffset: at}
	size := f.devices[e.Device].Size
	if sizes != nil {
		size = sizes[e.Device]
	}
	if e.Offset > size-roundUp(length, BlockSize) {
		return Extent{}, corruptInode(in.NID, "the chunk at %d is %d bytes at %d of device %d, which has %d", at, length, e.Offset, e.Device, size)
	}
	return e, nil
}
