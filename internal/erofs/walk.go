package erofs

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
)

// maxDepth is how deep a directory may lie unless a caller allows less or more.
const maxDepth = 4096

// Walk calls fn for the root, "/", and then for every name in the tree, in the
// order of the image: all names of a directory, sorted by their bytes, then
// the same for each of its subdirectories. An inode with several names comes
// with each of them. An error of fn ends the walk and is returned. A directory that
// lies in itself or has two names is ErrCorrupt, one that lies deeper than 4,096
// others is ErrTooLarge: a walk always ends.
func (f *FS) Walk(ctx context.Context, fn func(path string, info Info) error) error {
	w := newWalker(f, maxDepth)
	path, of := "", -1
	return w.walk(ctx, func(v visit) error {
		if v.dir != of {
			path, of = w.path(v.dir), v.dir
		}
		return fn(strings.TrimSuffix(path, "/")+"/"+v.name, v.inode.Info)
	})
}

// walker visits a tree that may be hostile, and checks how its directories hang
// together.
type walker struct {
	fs    *FS
	depth int
	seen  []uint64 // a bit for each nid that has been visited
	dirs  []dirRef
}

// dirRef is a directory and how it was reached.
type dirRef struct {
	nid    uint64
	parent int // index in walker.dirs; the root's is itself
	depth  int
	name   string
}

// visit is one name in the tree.
type visit struct {
	dir   int // the directory's index in walker.dirs; -1 for the root
	name  string
	inode *inode // valid during the visit
	again bool   // the inode has been visited under another name
}

func newWalker(f *FS, depth int) *walker {
	cached := *f
	cached.r = &pageCache{r: f.r, size: f.size, pages: make(map[int64][]byte)}
	return &walker{fs: &cached, depth: depth, seen: make([]uint64, f.size>>nidBits/64+1)}
}

// path returns where the directory with the index dir is.
func (w *walker) path(dir int) string {
	var parts []string
	for ; dir > 0; dir = w.dirs[dir].parent {
		parts = append(parts, w.dirs[dir].name)
	}
	slices.Reverse(parts)
	return "/" + strings.Join(parts, "/")
}

// mark returns whether nid has been marked before. The nid is one of an inode that
// could be read.
func (w *walker) mark(nid uint64) bool {
	word, bit := &w.seen[nid/64], uint64(1)<<(nid%64)
	again := *word&bit != 0
	*word |= bit
	return again
}

func (w *walker) walk(ctx context.Context, fn func(visit) error) error {
	root, err := w.fs.inode(w.fs.Root())
	if err != nil {
		return err
	}
	if root.Mode&modeType != modeDir {
		return corruptInode(root.NID, "the root has the mode %#o and is not a directory", root.Mode)
	}
	w.mark(root.NID)
	w.dirs = append(w.dirs, dirRef{nid: root.NID})
	if err := fn(visit{dir: -1, inode: &root}); err != nil {
		return err
	}
	stack := []int{0}
	for len(stack) > 0 {
		dir := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		first := len(w.dirs)
		if err := w.enter(ctx, dir, fn); err != nil {
			return fmt.Errorf("%w (in the directory %q)", err, w.path(dir))
		}
		for i := len(w.dirs) - 1; i >= first; i-- {
			stack = append(stack, i)
		}
	}
	return nil
}

// enter visits what is in the directory with the index dir and appends its
// subdirectories to w.dirs.
func (w *walker) enter(ctx context.Context, dir int, fn func(visit) error) error {
	ref := w.dirs[dir]
	in, err := w.fs.inode(ref.nid)
	if err != nil {
		return err
	}
	special, entries, first := 0, 0, len(w.dirs)
	err = w.fs.entries(&in, func(e DirEntry) error {
		if entries++; entries%256 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if e.Name == "." || e.Name == ".." {
			want := ref.nid
			if e.Name == ".." {
				want = w.dirs[ref.parent].nid
			}
			if e.NID != want || e.Type != modeDir {
				return corruptInode(ref.nid, "the directory entry %q is nid %d of type %#o, not the directory %d", e.Name, e.NID, e.Type, want)
			}
			special++
			return nil
		}
		child, err := w.fs.inode(e.NID)
		if err != nil {
			return fmt.Errorf("%w (named %q)", err, e.Name)
		}
		if child.Mode&modeType != e.Type {
			return corruptInode(e.NID, "mode %#o, but its directory entry %q says type %#o", child.Mode, e.Name, e.Type)
		}
		again := w.mark(e.NID)
		if e.Type == modeDir {
			if again {
				return corruptInode(e.NID, "the directory %q has been reached twice", e.Name)
			}
			if ref.depth+1 > w.depth {
				return fmt.Errorf("erofs: %w: nid %d lies deeper than %d directories", ErrTooLarge, e.NID, w.depth)
			}
			w.dirs = append(w.dirs, dirRef{e.NID, dir, ref.depth + 1, e.Name})
		}
		if err := fn(visit{dir, e.Name, &child, again}); err != nil {
			return fmt.Errorf("%w (named %q)", err, e.Name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if subdirs := len(w.dirs) - first; special != 2 || int64(in.Nlink) != int64(subdirs)+2 {
		return corruptInode(ref.nid, "a directory with %d links, %d subdirectories and %d of \".\" and \"..\"", in.Nlink, subdirs, special)
	}
	return ctx.Err()
}

// pageCache is an io.ReaderAt for one goroutine that reads r in pages and keeps
// them, up to 64 MiB. Pages are small, so that an image made to defeat the
// cache costs little more than the reads that it asks for.
type pageCache struct {
	r     io.ReaderAt
	size  int64
	pages map[int64][]byte
	order []int64 // ring of the pages' numbers, oldest at next, once it is full
	next  int
}

const (
	cachePage  = 4096
	cachePages = 64 << 20 / cachePage
)

// ReadAt implements io.ReaderAt for ranges inside of size.
func (c *pageCache) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		page, err := c.page(off / cachePage)
		if err != nil {
			return n, err
		}
		k := copy(p[n:], page[off%cachePage:])
		n += k
		off += int64(k)
	}
	return n, nil
}

func (c *pageCache) page(i int64) ([]byte, error) {
	if p, ok := c.pages[i]; ok {
		return p, nil
	}
	// A page is read into memory of its own before another goes, so a failed
	// read leaves the cache as it was.
	p := make([]byte, min(cachePage, c.size-i*cachePage))
	if n, err := c.r.ReadAt(p, i*cachePage); n < len(p) {
		return nil, err
	}
	if len(c.order) < cachePages {
		c.order = append(c.order, i)
	} else {
		delete(c.pages, c.order[c.next])
		c.order[c.next] = i
		c.next = (c.next + 1) % cachePages
	}
	c.pages[i] = p
	return p, nil
}
