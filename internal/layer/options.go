package layer

import "io"

// Options says where Read delivers what is not in the tree, and what it
// refuses. The zero value reads layers without sparse members under the
// default limits.
type Options struct {
	// Sparse receives the content of sparse members with most of the holes
	// left out, each run padded with zeros to a multiple of 512. Extents with
	// Sparse set count offsets in it. Nil: a layer with such a member is an
	// error.
	Sparse io.Writer
	// OnFile is called for every regular file that isn't sparse, in the order
	// of the tar, as soon as its headers are read: exactly the bytes before
	// content have then been read from the tar. header is the offset of the
	// file's first header block (a PAX or GNU long name header, if it has
	// one), content that of its first byte, size its length. A file that a
	// later entry replaces is reported too.
	OnFile func(header, content, size int64)
	// Limits bounds what a hostile tar can cost.
	Limits Limits
}

// Limits bounds the work and memory that one layer may cost. A zero field is
// its default. What goes beyond a limit fails the layer.
type Limits struct {
	// Nodes: how many inodes and whiteouts the layer may make, directories
	// that it implies included. Default 4,194,304 (about 1 GiB of memory).
	Nodes int
	// Strings: bytes of all names, link targets and xattrs together. Default
	// 512 MiB.
	Strings int64
	// Xattrs: bytes of names and values of one inode's xattrs, and therefore
	// of each. Default and maximum 65,536, which is what Linux accepts.
	Xattrs int
	// Depth: how many directories deep a name may be. Default 2,048, all that
	// PATH_MAX has room for.
	Depth int
	// Sparse: logical bytes of all sparse members together, holes included,
	// because holes are found by reading them (about 5 GB/s). Default 16 GiB.
	Sparse int64
}

// Bounds of Linux: NAME_MAX, and PATH_MAX without its NUL.
const (
	maxName = 255
	maxPath = 4095
)

func (l Limits) withDefaults() Limits {
	if l.Nodes <= 0 {
		l.Nodes = 4 << 20
	}
	if l.Strings <= 0 {
		l.Strings = 512 << 20
	}
	if l.Xattrs <= 0 || l.Xattrs > 64<<10 {
		l.Xattrs = 64 << 10
	}
	if l.Depth <= 0 {
		l.Depth = 2048
	}
	if l.Sparse <= 0 {
		l.Sparse = 16 << 30
	}
	return l
}
