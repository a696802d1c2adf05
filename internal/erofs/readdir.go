package erofs

import (
	"bytes"
	"fmt"
)

// entries yields the entries of the directory in, "." and ".." too, in the order
// of the disk. It checks each block as a whole: names are legal and sorted, and
// lie one behind the other. The kernel finds a name by bisection, first of the
// blocks, then in the block, so what is not sorted would be there for ls and not
// for open.
func (f *FS) entries(in *inode, yield func(DirEntry) error) error {
	if in.Mode&modeType != modeDir {
		return fmt.Errorf("erofs: nid %d is not a directory", in.NID)
	}
	var buf [BlockSize]byte
	prev := ""
	for at := int64(0); at < in.Size; at += BlockSize {
		p := buf[:min(BlockSize, in.Size-at)]
		off := int64(in.union)*BlockSize + at
		if in.Size-at == in.tail {
			off = in.dataOff
		}
		if err := f.read(p, off); err != nil {
			return err
		}
		var err error
		if prev, err = blockEntries(in.NID, p, prev, yield); err != nil {
			return err
		}
	}
	return nil
}

// blockEntries yields the entries of one directory block and returns the last
// name. All names are greater than prev.
func blockEntries(nid uint64, p []byte, prev string, yield func(DirEntry) error) (string, error) {
	if len(p) < direntSize {
		return "", corruptInode(nid, "a directory block of %d bytes", len(p))
	}
	first := int(le.Uint16(p[8:]))
	if first == 0 || first%direntSize != 0 || first >= len(p) {
		return "", corruptInode(nid, "the first name of a directory block of %d bytes is at %d", len(p), first)
	}
	for d := 0; d < first; d += direntSize {
		start, end := int(le.Uint16(p[d+8:])), len(p)
		if d+direntSize < first {
			end = int(le.Uint16(p[d+direntSize+8:]))
		}
		if d == 0 && start != first || start >= end || end > len(p) {
			return "", corruptInode(nid, "the name of the directory entry %d is from %d to %d in a block of %d bytes",
				d/direntSize, start, end, len(p))
		}
		name := p[start:end]
		if d+direntSize == first {
			// The last name ends with a zero byte or with the block.
			var pad []byte
			name, pad, _ = bytes.Cut(name, []byte{0})
			if !isZero(pad) {
				return "", corruptInode(nid, "a directory block has bytes behind its last name")
			}
		}
		e := DirEntry{Name: string(name), NID: le.Uint64(p[d:]), Type: typeMode(p[d+10])}
		if e.Name != "." && e.Name != ".." {
			if err := checkName(e.Name); err != nil {
				return "", corruptInode(nid, "%w", err)
			}
		}
		if e.Name <= prev {
			return "", corruptInode(nid, "the directory entry %q comes after %q", e.Name, prev)
		}
		if p[d+11] != 0 {
			return "", corruptInode(nid, "the directory entry %q has a reserved byte that is not zero", e.Name)
		}
		prev = e.Name
		if err := yield(e); err != nil {
			return "", err
		}
	}
	return prev, nil
}
