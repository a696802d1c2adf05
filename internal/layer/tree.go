package layer

import (
	"maps"
	"slices"
)

// File types in Node.Mode, as in stat(2).
const (
	TypeMask    = 0o170000
	TypeSocket  = 0o140000
	TypeSymlink = 0o120000
	TypeRegular = 0o100000
	TypeBlock   = 0o060000
	TypeDir     = 0o040000
	TypeChar    = 0o020000
	TypeFIFO    = 0o010000
)

// setgid in a directory's Mode makes its group that of what is created in it.
const setgid = 0o2000

// Tree is what one layer, or a stack of them, contains. Trees are immutable
// once made: they share nodes, and several goroutines may read them.
type Tree struct {
	// Root is a directory.
	Root *Node
	// Size is the length of the tar in bytes, up to the end of the stream and
	// therefore not always a multiple of 512. 0 in a merged tree.
	Size int64
	// SparseSize is how many bytes were written to Options.Sparse, a multiple
	// of 512. 0 in a merged tree.
	SparseSize int64
	// Entries counts the entries of the tar as archive/tar has them: headers
	// that only describe the next entry are part of it. 0 in a merged tree.
	Entries int
}

// Node is one inode. Several names of the same file are the same *Node.
type Node struct {
	// Mode has the type and the permission bits (07777) as in stat(2). It is
	// 0 while LowerLink is set.
	Mode     uint32
	UID, GID uint32
	// Mtime is in seconds since 1970, never negative; MtimeNsec is less than
	// 1e9.
	Mtime     int64
	MtimeNsec uint32
	// Size is the length in bytes of a regular file or of a link's Target.
	Size int64
	// Major (12 bits) and Minor (20 bits) are set for devices.
	Major, Minor uint32
	// Target is what a symbolic link says, byte by byte.
	Target string
	// Xattrs has full names ("security.capability"). Nil when there are none.
	Xattrs map[string]string
	// Extents are where a regular file's bytes are, by rising FileOffset and
	// without overlap. What no extent covers is a hole and reads as zeros.
	Extents []Extent
	// Children of a directory by name; nil when it is empty.
	Children map[string]*Node
	// Implicit says that the tar has no entry for this directory, only for
	// something in it. Its attributes are then those of the lower layers'
	// directory, which only Merge knows; until then it is 0755, owned by 0:0,
	// with the time of the entry that made it necessary.
	Implicit bool
	// Opaque says that this directory hides whatever lower layers have at its
	// place (overlayfs: trusted.overlay.opaque).
	Opaque bool
	// LowerLink is set for a hard link whose target this layer does not have:
	// the path of the target in the lower layers, relative to the root. Such
	// a node has nothing else until Merge has put the target in its place,
	// with the target's attributes.
	LowerLink string
}

// Extent is a run of a file's bytes that is contiguous on a device.
type Extent struct {
	// Layer says whose tar: 0 in a tree from Read, the index of the layer in
	// those from Merge.
	Layer int
	// Sparse says that the bytes are not in the tar itself but in what was
	// written to Options.Sparse.
	Sparse bool
	// Offset on the device, a multiple of 512.
	Offset int64
	// Length in bytes, more than 0. It is a multiple of 512 unless the extent
	// is the last one of its file.
	Length int64
	// FileOffset is where in the file it belongs, a multiple of 512.
	FileOffset int64
}

// Type returns the file type bits of Mode.
func (n *Node) Type() uint32 { return n.Mode & TypeMask }

// IsDir reports whether n is a directory.
func (n *Node) IsDir() bool { return n.Mode&TypeMask == TypeDir }

// IsWhiteout reports whether n is a whiteout as overlayfs has them: a character
// device 0:0, which hides the same name of lower layers
// (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories").
func (n *Node) IsWhiteout() bool {
	return n.Mode&TypeMask == TypeChar && n.Major == 0 && n.Minor == 0
}

// Names returns the names of a directory's children in byte order.
func (n *Node) Names() []string { return slices.Sorted(maps.Keys(n.Children)) }

// setAttributes gives n what from has in attributes, and leaves type, content
// and place alone.
func (n *Node) setAttributes(from *Node) {
	n.Mode = n.Mode&TypeMask | from.Mode&^TypeMask
	n.UID, n.GID = from.UID, from.GID
	n.Mtime, n.MtimeNsec = from.Mtime, from.MtimeNsec
	n.Xattrs = from.Xattrs
}

// sameAttributes reports whether setAttributes would change nothing.
func (n *Node) sameAttributes(o *Node) bool {
	return n.Mode&^TypeMask == o.Mode&^TypeMask && n.UID == o.UID && n.GID == o.GID &&
		n.Mtime == o.Mtime && n.MtimeNsec == o.MtimeNsec && maps.Equal(n.Xattrs, o.Xattrs)
}
