package erofs

import "strings"

// inodeAttrs is what an inode has behind it.
type inodeAttrs struct {
	inline []Xattr
	shared []uint32
}

// inodeXattrs reads the attributes behind in; those in the shared area remain
// numbers.
func (f *FS) inodeXattrs(in *inode) (inodeAttrs, error) {
	var x inodeAttrs
	if in.xattrSize == 0 {
		return x, nil
	}
	p := make([]byte, in.xattrSize)
	if err := f.read(p, in.xattrOff); err != nil {
		return x, err
	}
	shared := int(p[4])
	if le.Uint32(p) != 0 || !isZero(p[5:xattrHeaderSize]) {
		return x, corruptInode(in.NID, "the header of the attributes has more than a count")
	}
	p = p[xattrHeaderSize:]
	if shared*xattrEntrySize > len(p) {
		return x, corruptInode(in.NID, "%d shared attributes in %d bytes", shared, len(p))
	}
	for range shared {
		x.shared = append(x.shared, le.Uint32(p))
		p = p[xattrEntrySize:]
	}
	for len(p) > 0 {
		size, n := xattrEntry(p)
		if n > int64(len(p)) {
			return x, corruptInode(in.NID, "an attribute of %d bytes where %d are left", n, len(p))
		}
		attr, err := decodeXattr(in.NID, p[:size])
		if err != nil {
			return x, err
		}
		x.inline = append(x.inline, attr)
		p = p[n:]
	}
	return x, nil
}

// xattrEntry returns the size of the entry whose first 4 bytes are p, alone and with
// padding.
func xattrEntry(p []byte) (size, padded int64) {
	size = xattrEntrySize + int64(p[0]) + int64(le.Uint16(p[2:]))
	return size, roundUp(size, xattrEntrySize)
}

func decodeXattr(nid uint64, p []byte) (Xattr, error) {
	value := xattrEntrySize + int(p[0])
	name, ok := xattrName(p[1], string(p[xattrEntrySize:value]))
	if !ok || strings.IndexByte(name, 0) >= 0 {
		return Xattr{}, corruptInode(nid, "an attribute has the name %q behind the prefix number %d", p[xattrEntrySize:value], p[1])
	}
	return Xattr{name, string(p[value:])}, nil
}

// sharedXattr reads the attribute num of the shared area on behalf of nid.
func (f *FS) sharedXattr(nid uint64, num uint32) (Xattr, error) {
	name, off, size, err := f.sharedName(nid, num)
	if err != nil {
		return Xattr{}, err
	}
	value := make([]byte, size)
	if err := f.read(value, off); err != nil {
		return Xattr{}, err
	}
	return Xattr{name, string(value)}, nil
}

// sharedName returns the name of the shared attribute num and where in the shared
// area its value is.
func (f *FS) sharedName(nid uint64, num uint32) (name string, valueOff, valueSize int64, err error) {
	off := f.xattrs + int64(num)*xattrEntrySize
	end := f.meta + rootNID*nidUnit
	if f.xattrs == 0 || off > end-xattrEntrySize {
		return "", 0, 0, corruptInode(nid, "the shared attribute %d is outside of the shared area", num)
	}
	var buf [xattrEntrySize + maxXattrName]byte
	if err := f.read(buf[:xattrEntrySize], off); err != nil {
		return "", 0, 0, err
	}
	size, _ := xattrEntry(buf[:])
	if off > end-size {
		return "", 0, 0, corruptInode(nid, "the shared attribute %d of %d bytes is outside of the shared area", num, size)
	}
	p := buf[:xattrEntrySize+int64(buf[0])]
	if err := f.read(p, off); err != nil {
		return "", 0, 0, err
	}
	x, err := decodeXattr(nid, p)
	return x.Name, off + int64(len(p)), size - int64(len(p)), err
}
