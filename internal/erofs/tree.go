package erofs

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// node is an inode on its way into an image.
type node struct {
	in     *Inode
	parent *node  // the first directory that refers to it; the root's is itself
	name   string // there
	nlink  uint32
	ino    uint32 // ordinal, from 1

	children []child // of a directory, sorted by name
	dirSize  int64
	chunks   chunkPlan
	xattrs   xattrPlan

	layout int   // of the data
	inline int64 // bytes of data behind the inode
	pos    int64 // of the inode in the image
	block  int64 // first block of the data that is not inline
}

type child struct {
	name string
	node *node
}

// path returns where n is, for error messages only.
func (n *node) path() string {
	if n.parent == n {
		return "/"
	}
	var parts []string
	for ; n.parent != n; n = n.parent {
		parts = append(parts, n.name)
	}
	slices.Reverse(parts)
	return "/" + strings.Join(parts, "/")
}

func (n *node) errorf(format string, args ...any) error {
	return fmt.Errorf("erofs: %q: %w", n.path(), fmt.Errorf(format, args...))
}

// tree is a checked image: every directory, in the order of a walk that visits
// the subdirectories of a directory in the order of their names, each right
// after the entries of its parent.
type tree struct {
	root    *node
	dirs    []*node
	inodes  int64
	devices []Device
	seen    map[*Inode]*node
}

// collect checks what img says and makes nodes of it.
func collect(img Image) (*tree, error) {
	if err := checkDevices(img.Devices); err != nil {
		return nil, err
	}
	if img.Root == nil || !img.Root.isDir() {
		return nil, errors.New("erofs: the root is not a directory")
	}
	t := &tree{devices: img.Devices, seen: make(map[*Inode]*node)}
	t.root = &node{in: img.Root}
	t.root.parent = t.root
	if err := t.add(t.root); err != nil {
		return nil, err
	}
	// A stack, not recursion, because a tree may be deeper than it is wise for
	// a call stack to be.
	stack := []*node{t.root}
	for len(stack) > 0 {
		dir := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		t.dirs = append(t.dirs, dir)
		if err := t.enter(dir); err != nil {
			return nil, err
		}
		for _, c := range slices.Backward(dir.children) {
			if c.node.in.isDir() {
				stack = append(stack, c.node)
			}
		}
	}
	return t, nil
}

func checkDevices(devices []Device) error {
	if len(devices) > maxDevices {
		return fmt.Errorf("erofs: %d devices; an image can have %d", len(devices), maxDevices)
	}
	for i, d := range devices {
		switch {
		case d.Size < 0:
			return fmt.Errorf("erofs: device %d has the size %d", i, d.Size)
		case blocksOf(d.Size) > maxDeviceBlocks:
			return fmt.Errorf("erofs: device %d has %d bytes; with 32-bit block addresses it can have %d",
				i, d.Size, int64(maxDeviceBlocks)*BlockSize)
		case len(d.Tag) > maxTag || strings.IndexByte(d.Tag, 0) >= 0:
			return fmt.Errorf("erofs: device %d: the tag %.80q is longer than %d bytes or has a zero byte", i, d.Tag, maxTag)
		}
	}
	return nil
}

// add checks n's attributes and plans its data. For a directory only enter
// does the latter.
func (t *tree) add(n *node) error {
	in := n.in
	t.seen[in] = n
	t.inodes++
	if t.inodes > 1<<32-1 {
		return n.errorf("the image has more than %d inodes", uint32(1<<32-1))
	}
	n.ino = uint32(t.inodes)
	typ := in.Mode & modeType
	switch {
	case in.Mode&^modeAll != 0 || fileType(in.Mode) == 0:
		return n.errorf("mode %#o is not one of a file", in.Mode)
	case in.MtimeNsec > 999_999_999:
		return n.errorf("%d nanoseconds in the modification time", in.MtimeNsec)
	case len(in.Entries) > 0 && typ != modeDir:
		return n.errorf("has directory entries but the mode %#o", in.Mode)
	case len(in.Extents) > 0 && typ != modeRegular:
		return n.errorf("has extents but the mode %#o", in.Mode)
	case in.Target != "" && typ != modeSymlink:
		return n.errorf("has a link target but the mode %#o", in.Mode)
	}
	switch typ {
	case modeRegular:
		var err error
		if n.chunks, err = planChunks(in, t.devices); err != nil {
			return n.errorf("%w", err)
		}
		if in.Size > 0 {
			n.layout = layoutChunked
		}
	case modeSymlink:
		if in.Target == "" || len(in.Target) > maxTarget || strings.IndexByte(in.Target, 0) >= 0 {
			return n.errorf("link target of %d bytes; it must have 1 to %d, none of them zero", len(in.Target), maxTarget)
		}
	case modeChar, modeBlock:
		if in.Major >= 1<<12 || in.Minor >= 1<<20 {
			return n.errorf("device number %d:%d; Linux has 12 and 20 bits for it", in.Major, in.Minor)
		}
	}
	return nil
}

// enter makes and counts the nodes of what dir refers to.
func (t *tree) enter(dir *node) error {
	dir.children = make([]child, 0, len(dir.in.Entries))
	dir.nlink += 2
	for _, e := range dir.in.Entries {
		if err := checkName(e.Name); err != nil {
			return dir.errorf("%w", err)
		}
		if e.Inode == nil {
			return dir.errorf("the entry %q has no inode", e.Name)
		}
		dir.children = append(dir.children, child{name: e.Name})
	}
	// Sorting names with the index of their entry keeps the caller's slice as
	// it is.
	order := make([]int, len(dir.in.Entries))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		return strings.Compare(dir.in.Entries[a].Name, dir.in.Entries[b].Name)
	})
	for i, o := range order {
		e := dir.in.Entries[o]
		if i > 0 && dir.children[i-1].name == e.Name {
			return dir.errorf("two entries have the name %q", e.Name)
		}
		n, err := t.refer(dir, e)
		if err != nil {
			return err
		}
		dir.children[i] = child{e.Name, n}
	}
	dir.dirSize = dirSize(dir)
	return nil
}

// refer returns the node of e, an entry of dir, with its links counted.
func (t *tree) refer(dir *node, e Entry) (*node, error) {
	n := t.seen[e.Inode]
	if n != nil && e.Inode.isDir() {
		return nil, dir.errorf("the entry %q refers to the directory that is also %q; a directory has one name", e.Name, n.path())
	}
	if n == nil {
		n = &node{in: e.Inode, parent: dir, name: e.Name}
		if err := t.add(n); err != nil {
			return nil, err
		}
	}
	if e.Inode.isDir() {
		dir.nlink++
		return n, nil
	}
	if n.nlink == 1<<32-1 {
		return nil, n.errorf("more than %d links", n.nlink)
	}
	n.nlink++
	return n, nil
}

func checkName(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("%q cannot be the name of an entry", name)
	case len(name) > maxName:
		return fmt.Errorf("the name %.40q… has %d bytes; a name can have %d", name, len(name), maxName)
	case strings.IndexByte(name, '/') >= 0 || strings.IndexByte(name, 0) >= 0:
		return fmt.Errorf("the name %q has a slash or a zero byte", name)
	}
	return nil
}

// dirents yields the entries of dir in the order of the disk, with "." and "..".
func dirents(dir *node, yield func(name string, n *node)) {
	special := [...]child{{".", dir}, {"..", dir.parent}}
	next := 0
	for _, c := range dir.children {
		for next < len(special) && special[next].name < c.name {
			yield(special[next].name, special[next].node)
			next++
		}
		yield(c.name, c.node)
	}
	for ; next < len(special); next++ {
		yield(special[next].name, special[next].node)
	}
}

// dirSize returns the size of dir's entries: full blocks, then what the last
// block holds.
func dirSize(dir *node) int64 {
	var blocks, used int64
	dirents(dir, func(name string, _ *node) {
		need := int64(direntSize + len(name))
		if used+need > BlockSize {
			blocks++
			used = 0
		}
		used += need
	})
	return blocks*BlockSize + used
}
