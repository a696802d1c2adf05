package erofs

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// ErrTooLarge is what an image is that is over one of the [Limits].
var ErrTooLarge = errors.New("EROFS image over a limit")

// Limits bounds what Check accepts. Zero values are the defaults.
type Limits struct {
	Size    int64 // of the image in bytes; 256 MiB
	Inodes  int64 // 4,194,304
	Depth   int   // of directories; 4,096
	Content int64 // sizes of all files together, holes included, in bytes; 1 PiB

	// Devices are the sizes in bytes of the devices that the image will be mounted
	// with. Their number and their sizes in blocks must be those in the image,
	// and every block of a file must be wholly on its device. Nil: not compared.
	Devices []int64
}

// Summary is what there is in an image.
type Summary struct {
	Inodes      int64
	Directories int64
	Files       int64 // regular files
	Symlinks    int64
	Specials    int64 // device nodes, FIFOs and sockets
	Names       int64 // directory entries, "." and ".." apart
	Depth       int   // of the deepest directory; the root's is 0
	Content     int64 // sizes of all regular files together
	Mapped      int64 // of Content, the bytes on devices; the rest is holes
}

// Check reads the whole image and returns nil as the error only if the image has the
// form that Write gives it in all that a kernel would rely on: the features
// are the ones that are expected; every inode's fields are legal and all that it
// refers to is in the image; directories are sorted, have proper names, "." and
// "..", no loops and one name each; link counts are right; every chunk lies on a
// device and inside it; attributes are well-formed and no name comes twice. It
// does not say that the content is the right one.
//
// The image may be hostile. Memory is bounded by 64 MiB and the size of the
// image, time by the size of the image. The error names the inode and is
// ErrCorrupt, ErrTooLarge, ctx's or the reader's.
func (f *FS) Check(ctx context.Context, lim Limits) (Summary, error) {
	lim = lim.withDefaults()
	switch {
	case f.size > lim.Size:
		return Summary{}, fmt.Errorf("erofs: %w: %d bytes, limit %d", ErrTooLarge, f.size, lim.Size)
	case f.inodes > uint64(lim.Inodes):
		return Summary{}, fmt.Errorf("erofs: %w: %d inodes, limit %d", ErrTooLarge, f.inodes, lim.Inodes)
	}
	if err := f.checkDevices(lim.Devices); err != nil {
		return Summary{}, err
	}
	c := checker{
		walker: newWalker(f, lim.Depth),
		lim:    lim,
		links:  make(map[uint64]uint32),
		names:  make(map[uint32]string),
	}
	if err := c.walk(ctx, c.visit); err != nil {
		return Summary{}, err
	}
	for nid, missing := range c.links {
		if missing > 0 {
			return Summary{}, corruptInode(nid, "%d names fewer than links", missing)
		}
	}
	if uint64(c.sum.Inodes) != f.inodes {
		return Summary{}, corrupt("%d inodes are in the tree, %d in the superblock", c.sum.Inodes, f.inodes)
	}
	return c.sum, nil
}

func (l Limits) withDefaults() Limits {
	set := func(v *int64, def int64) {
		if *v == 0 {
			*v = def
		}
	}
	set(&l.Size, 256<<20)
	set(&l.Inodes, 4<<20)
	set(&l.Content, 1<<50)
	if l.Depth == 0 {
		l.Depth = maxDepth
	}
	return l
}

func (f *FS) checkDevices(sizes []int64) error {
	if sizes == nil {
		return nil
	}
	if len(sizes) != len(f.devices) {
		return corrupt("the image has %d devices, not %d", len(f.devices), len(sizes))
	}
	for i, size := range sizes {
		if size < 0 || blocksOf(size)*BlockSize != f.devices[i].Size {
			return corrupt("device %d is recorded with %d bytes in blocks, but has %d", i, f.devices[i].Size, size)
		}
	}
	return nil
}

// checker is one run of Check.
type checker struct {
	*walker
	lim   Limits
	sum   Summary
	used  int64             // bytes of the image that inodes have claimed
	links map[uint64]uint32 // names missing, for inodes with several
	names map[uint32]string // of shared attributes
}

// maxCachedNames bounds checker.names.
const maxCachedNames = 1 << 16

func (c *checker) visit(v visit) error {
	if v.dir >= 0 {
		c.sum.Names++
	}
	in := v.inode
	if in.Mode&modeType != modeDir {
		if err := c.link(in, v.again); err != nil || v.again {
			return err
		}
	}
	if c.sum.Inodes++; c.sum.Inodes > c.lim.Inodes {
		return fmt.Errorf("erofs: %w: more than %d inodes", ErrTooLarge, c.lim.Inodes)
	}
	// Without this, indexes or blocks that many inodes share would make
	// a small image take for ever.
	if c.used += in.footprint; c.used > c.fs.size {
		return corruptInode(in.NID, "this and the inodes before it take more bytes than the image has: they overlap")
	}
	if err := c.attrs(in); err != nil {
		return err
	}
	switch in.Mode & modeType {
	case modeDir:
		c.sum.Directories++
		if v.dir >= 0 {
			c.sum.Depth = max(c.sum.Depth, c.dirs[v.dir].depth+1)
		}
	case modeRegular:
		c.sum.Files++
		return c.content(in)
	case modeSymlink:
		c.sum.Symlinks++
		_, err := c.fs.target(in)
		return err
	default:
		c.sum.Specials++
	}
	return nil
}

// link counts a name of in, which is not a directory.
func (c *checker) link(in *inode, again bool) error {
	if in.Nlink == 1 && !again {
		return nil
	}
	missing := in.Nlink
	if again {
		missing = c.links[in.NID] // 0 also for an inode with 1 link
	}
	if missing == 0 {
		return corruptInode(in.NID, "more names than its %d links", in.Nlink)
	}
	c.links[in.NID] = missing - 1
	return nil
}

func (c *checker) content(in *inode) error {
	if in.Size > c.lim.Content-c.sum.Content {
		return fmt.Errorf("erofs: %w: nid %d of %d bytes, and %d in the files before it, limit %d",
			ErrTooLarge, in.NID, in.Size, c.sum.Content, c.lim.Content)
	}
	c.sum.Content += in.Size
	return c.fs.extents(in, c.lim.Devices, func(e Extent) { c.sum.Mapped += e.Length })
}

func (c *checker) attrs(in *inode) error {
	if in.xattrSize == 0 {
		return nil
	}
	x, err := c.fs.inodeXattrs(in)
	if err != nil {
		return err
	}
	names := make([]string, 0, len(x.inline)+len(x.shared))
	for _, a := range x.inline {
		names = append(names, a.Name)
	}
	for _, num := range x.shared {
		name, ok := c.names[num]
		if !ok {
			if name, _, _, err = c.fs.sharedName(in.NID, num); err != nil {
				return err
			}
			if len(c.names) < maxCachedNames {
				c.names[num] = name
			}
		}
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names[1:] {
		if names[i] == name {
			return corruptInode(in.NID, "two attributes have the name %q", name)
		}
	}
	return nil
}
