package erofs

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math"
)

// Write writes img to w and returns how many bytes it wrote, a multiple of
// [BlockSize]. The same tree and devices give the same bytes, whatever the order
// of Entries, Xattrs and Extents; the file system's UUID is made from the content.
// img is not changed. An image that EROFS has no form for is an error that names
// the file; nothing has been written then. The image is put together in memory:
// about 100 bytes for each inode and 25 for each name.
func Write(w io.Writer, img Image) (int64, error) {
	t, err := collect(img)
	if err != nil {
		return 0, err
	}
	shared, err := planXattrs(t)
	if err != nil {
		return 0, err
	}
	l, err := place(t, shared)
	if err != nil {
		return 0, err
	}
	n, err := w.Write(l.fill(t, shared))
	if err != nil {
		return int64(n), fmt.Errorf("erofs: writing an image of %d bytes: %w", l.size, err)
	}
	return int64(n), nil
}

// layout is where the parts of an image are, in bytes.
type layout struct {
	xattrs int64 // the shared attributes, 0 if there are none
	meta   int64 // what inode numbers count from
	size   int64
}

func place(t *tree, shared sharedXattrs) (layout, error) {
	var l layout
	end := int64(devtabOff) + int64(len(t.devices))*slotSize
	if shared.size > 0 {
		l.xattrs = roundUp(end, BlockSize)
		end = l.xattrs + shared.size
	}
	s := space{pos: roundUp(end, BlockSize)}
	l.meta = s.pos - rootNID*nidUnit
	s.inode(t.root)
	for _, dir := range t.dirs {
		s.data(dir)
		for _, c := range dir.children {
			if c.node.pos == 0 {
				s.inode(c.node)
			}
			if c.node.in.Mode&modeType == modeSymlink {
				s.data(c.node)
			}
		}
	}
	l.size = roundUp(s.pos, BlockSize)
	if l.size/BlockSize >= nullBlock || l.size > math.MaxInt {
		return l, fmt.Errorf("erofs: the image takes %d bytes; this is more than 32-bit block addresses or this machine's memory have room for", l.size)
	}
	return l, nil
}

// space gives out the image from front to back. Data begin at a block border
// and inline data must not cross one; the largest gap that this has left
// is kept and filled with the inodes that fit.
type space struct {
	pos           int64
	gap, gapLimit int64
}

// inode decides where n is and whether it has data behind it.
func (s *space) inode(n *node) {
	head := inodeSize + n.xattrs.size
	if n.layout == layoutChunked {
		head = roundUp(head, chunkIndexSize) + n.chunks.count*chunkIndexSize
	}
	data := n.dataSize()
	if tail := data % BlockSize; tail > 0 && head+tail <= BlockSize && (data == tail || n.in.isDir()) {
		n.layout, n.inline = layoutInline, tail
	}
	if p := fit(s.gap, head, n.inline); p+head+n.inline <= s.gapLimit {
		n.pos = p
		s.gap = p + head + n.inline
		return
	}
	n.pos = fit(s.pos, head, n.inline)
	s.skip(n.pos)
	s.pos = n.pos + head + n.inline
}

// data decides where the data of n are that are not inline, once.
func (s *space) data(n *node) {
	size := n.dataSize() - n.inline
	if size == 0 || n.block != 0 {
		return
	}
	at := roundUp(s.pos, BlockSize)
	s.skip(at)
	n.block = at / BlockSize
	s.pos = at + roundUp(size, BlockSize)
}

// skip leaves what is before to, and remembers it if that is worth it.
func (s *space) skip(to int64) {
	if to-s.pos > s.gapLimit-s.gap {
		s.gap, s.gapLimit = s.pos, to
	}
}

// fit returns the first place from pos on for an inode of head bytes, without
// its inline data: its first 64 bytes are in one block, and everything is if
// it has inline data.
func fit(pos, head, inline int64) int64 {
	pos = roundUp(pos, nidUnit)
	need := int64(inodeSize)
	if inline > 0 {
		need = head + inline
	}
	if pos%BlockSize+need > BlockSize {
		pos = roundUp(pos, BlockSize)
	}
	return pos
}

// dataSize returns the size of the data that are in the image itself.
func (n *node) dataSize() int64 {
	switch n.in.Mode & modeType {
	case modeDir:
		return n.dirSize
	case modeSymlink:
		return int64(len(n.in.Target))
	}
	return 0
}

// fill returns the image.
func (l layout) fill(t *tree, shared sharedXattrs) []byte {
	buf := make([]byte, l.size)
	l.encodeDevices(buf, t.devices)
	at := l.xattrs
	for _, x := range shared.entries {
		at = x.place(at)
		at += x.encode(buf[at:])
	}
	// The function never fails here.
	_ = t.each(func(n *node) error {
		l.encodeInode(buf, n)
		return nil
	})
	for _, dir := range t.dirs {
		l.encodeDir(buf, dir)
	}
	l.encodeSuper(buf, t)
	return buf
}

func (l layout) nid(n *node) uint64 { return uint64(n.pos-l.meta) >> nidBits }

func (l layout) encodeSuper(buf []byte, t *tree) {
	sb := buf[superOff : superOff+BlockSize]
	le.PutUint32(sb[sbMagic:], magic)
	le.PutUint32(sb[sbCompat:], featureCompat)
	sb[sbBlockBits] = blockBits
	le.PutUint16(sb[sbRootNID:], uint16(l.nid(t.root)))
	le.PutUint64(sb[sbInodes:], uint64(t.inodes))
	le.PutUint32(sb[sbBlocks:], uint32(l.size/BlockSize))
	le.PutUint32(sb[sbMetaBlock:], uint32(l.meta/BlockSize))
	le.PutUint32(sb[sbXattrBlock:], uint32(l.xattrs/BlockSize))
	le.PutUint32(sb[sbIncompat:], featureIncompat)
	le.PutUint16(sb[sbDevices:], uint16(len(t.devices)))
	le.PutUint16(sb[sbDevtabSlot:], devtabOff/slotSize)
	// Version 8 of RFC 9562, a UUID of one's own making: without any the kernel
	// reports the same file system ID for all images.
	id := sha256.Sum256(buf)
	copy(sb[sbUUID:], id[:16])
	sb[sbUUID+6] = sb[sbUUID+6]&0x0f | 0x80
	sb[sbUUID+8] = sb[sbUUID+8]&0x3f | 0x80
	le.PutUint32(sb[sbChecksum:], checksum(sb))
}

func (l layout) encodeDevices(buf []byte, devices []Device) {
	at := l.size / BlockSize
	for i, d := range devices {
		slot := buf[devtabOff+i*slotSize:]
		copy(slot, d.Tag)
		le.PutUint32(slot[slotBlocks:], uint32(blocksOf(d.Size)))
		le.PutUint32(slot[slotUniaddr:], uniaddr(at, d.Size))
		at += blocksOf(d.Size)
	}
}

// uniaddr returns the address in the unified space of a device that begins there at
// block at: none, which is 0, from where 32 bits do not suffice.
func uniaddr(at, size int64) uint32 {
	if at+blocksOf(size) > maxDeviceBlocks {
		return 0
	}
	return uint32(at)
}

func (l layout) encodeInode(buf []byte, n *node) {
	in := n.in
	p := buf[n.pos:]
	le.PutUint16(p[inFormat:], uint16(formatExtended|n.layout<<1))
	le.PutUint16(p[inXattrs:], uint16(xattrIcount(n.xattrs.size)))
	le.PutUint16(p[inMode:], uint16(in.Mode))
	le.PutUint32(p[inIno:], n.ino)
	le.PutUint32(p[inUID:], in.UID)
	le.PutUint32(p[inGID:], in.GID)
	le.PutUint64(p[inMtime:], uint64(in.Mtime))
	le.PutUint32(p[inMtimeNsec:], in.MtimeNsec)
	le.PutUint32(p[inNlink:], n.nlink)
	n.xattrs.encode(p[inodeSize:])
	behind := inodeSize + n.xattrs.size
	size, union := n.dataSize(), uint32(n.block)
	switch in.Mode & modeType {
	case modeRegular:
		size = in.Size
		if n.layout == layoutChunked {
			union = uint32(chunkIndexes | n.chunks.bits)
			n.chunks.encode(p[roundUp(behind, chunkIndexSize):])
		}
	case modeSymlink:
		if n.inline > 0 {
			copy(p[behind:], in.Target)
		} else {
			copy(buf[n.block*BlockSize:], in.Target)
		}
	case modeChar, modeBlock:
		union = encodeDevice(in.Major, in.Minor)
	}
	le.PutUint64(p[inSize:], uint64(size))
	le.PutUint32(p[inUnion:], union)
}

// encodeDevice is the kernel's new_encode_dev (include/linux/kdev_t.h).
func encodeDevice(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | minor&^0xff<<12
}

func decodeDevice(dev uint32) (major, minor uint32) {
	return dev >> 8 & 0xfff, dev&0xff | dev>>12&0xfff00
}

// encodeDir writes the entries of dir, of whose data only the last block may be
// behind the inode.
func (l layout) encodeDir(buf []byte, dir *node) {
	blocks := buf[dir.block*BlockSize:]
	tail := buf[dir.pos+inodeSize+dir.xattrs.size:]
	left := dir.dirSize
	w := direntBlock{nid: l.nid}
	flush := func() {
		p := blocks
		if left <= dir.inline {
			p = tail
		}
		w.encode(p)
		left -= min(left, BlockSize)
		blocks = blocks[min(len(blocks), BlockSize):]
		w.entries, w.size = w.entries[:0], 0
	}
	dirents(dir, func(name string, n *node) {
		if w.size+direntSize+len(name) > BlockSize {
			flush()
		}
		w.entries = append(w.entries, child{name, n})
		w.size += direntSize + len(name)
	})
	flush()
}

// direntBlock is the entries of one directory block.
type direntBlock struct {
	nid     func(*node) uint64
	entries []child
	size    int
}

func (w *direntBlock) encode(p []byte) {
	name := len(w.entries) * direntSize
	for i, e := range w.entries {
		d := p[i*direntSize:]
		le.PutUint64(d, w.nid(e.node))
		le.PutUint16(d[8:], uint16(name))
		d[10] = fileType(e.node.in.Mode)
		name += copy(p[name:], e.name)
	}
}
