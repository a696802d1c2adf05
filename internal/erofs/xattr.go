package erofs

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// xattrPrefixes are the name prefixes that EROFS has a number for. The ACLs'
// whole names are prefixes: nothing follows them.
var xattrPrefixes = [...]struct {
	index  byte
	prefix string
	whole  bool
}{
	{xattrUser, "user.", false},
	{xattrACLAccess, "system.posix_acl_access", true},
	{xattrACLDefault, "system.posix_acl_default", true},
	{xattrTrusted, "trusted.", false},
	{xattrSecurity, "security.", false},
}

// xattr is an attribute as the disk has it.
type xattr struct {
	index byte
	name  string // without the prefix
	value string
}

func (x xattr) size() int64 {
	return roundUp(int64(xattrEntrySize+len(x.name)+len(x.value)), xattrEntrySize)
}

// place returns where the entry x of the shared area begins if the one before ends at
// end.
func (x xattr) place(end int64) int64 {
	if end%BlockSize+x.size() > BlockSize {
		return roundUp(end, BlockSize)
	}
	return end
}

func (x xattr) encode(p []byte) int64 {
	p[0] = byte(len(x.name))
	p[1] = x.index
	le.PutUint16(p[2:], uint16(len(x.value)))
	copy(p[xattrEntrySize:], x.name)
	copy(p[xattrEntrySize+len(x.name):], x.value)
	return x.size()
}

func compareXattrs(a, b xattr) int {
	return cmp.Or(cmp.Compare(a.index, b.index), strings.Compare(a.name, b.name), strings.Compare(a.value, b.value))
}

func encodeXattr(x Xattr) (xattr, error) {
	for _, p := range xattrPrefixes {
		rest, ok := strings.CutPrefix(x.Name, p.prefix)
		switch {
		case !ok:
			continue
		case p.whole != (rest == ""):
			return xattr{}, fmt.Errorf("%.300q is not the name of an attribute", x.Name)
		case len(rest) > maxXattrName || strings.IndexByte(rest, 0) >= 0:
			return xattr{}, fmt.Errorf("the attribute name %.300q has a zero byte or more than %d bytes after %s", x.Name, maxXattrName, p.prefix)
		case len(x.Value) > maxXattrValue:
			return xattr{}, fmt.Errorf("the attribute %q has a value of %d bytes; at most %d can be written", x.Name, len(x.Value), maxXattrValue)
		}
		return xattr{p.index, rest, x.Value}, nil
	}
	return xattr{}, fmt.Errorf("the attribute %.300q: EROFS has only user.*, trusted.*, security.* and the two POSIX ACLs", x.Name)
}

// xattrName is the reverse: the whole name, or false for what no one writes.
func xattrName(index byte, name string) (string, bool) {
	for _, p := range xattrPrefixes {
		if p.index == index && p.whole == (name == "") {
			return p.prefix + name, true
		}
	}
	return "", false
}

// xattrPlan is the attributes of one inode, sorted.
type xattrPlan struct {
	all    []xattr
	shared []uint32 // of all, those in the shared area, by their number
	inline []xattr
	size   int64 // of everything behind the inode
}

// sharedXattrs is the area of the attributes that several inodes have.
type sharedXattrs struct {
	entries []xattr // sorted
	size    int64
}

// planXattrs decides for all inodes which of their attributes are shared: those
// that fit into a block and for which one entry and a 4-byte number in each inode
// is smaller than an entry in each inode. A shared entry does not cross a block
// border: the kernel would not mind, but go-erofs would.
func planXattrs(t *tree) (sharedXattrs, error) {
	count := make(map[xattr]int64)
	var with []*node
	err := t.each(func(n *node) error {
		if len(n.in.Xattrs) == 0 {
			return nil
		}
		with = append(with, n)
		return n.sortXattrs(count)
	})
	if err != nil {
		return sharedXattrs{}, err
	}
	var area sharedXattrs
	number := make(map[xattr]uint32)
	for x, c := range count {
		if x.size() <= BlockSize && c*x.size() > c*xattrEntrySize+x.size() {
			area.entries = append(area.entries, x)
		}
	}
	slices.SortFunc(area.entries, compareXattrs)
	for _, x := range area.entries {
		area.size = x.place(area.size)
		if area.size/xattrEntrySize > 1<<32-1 {
			return area, fmt.Errorf("erofs: the shared attributes take more than %d bytes", area.size)
		}
		number[x] = uint32(area.size / xattrEntrySize)
		area.size += x.size()
	}
	for _, n := range with {
		if err := n.splitXattrs(number); err != nil {
			return area, err
		}
	}
	return area, nil
}

// each calls f for every inode in the order of the image.
func (t *tree) each(f func(*node) error) error {
	if err := f(t.root); err != nil {
		return err
	}
	for _, dir := range t.dirs {
		for _, c := range dir.children {
			// An inode with several names is in the image where the first is.
			if c.node.parent != dir || c.node.name != c.name {
				continue
			}
			if err := f(c.node); err != nil {
				return err
			}
		}
	}
	return nil
}

func (n *node) sortXattrs(count map[xattr]int64) error {
	n.xattrs.all = make([]xattr, len(n.in.Xattrs))
	for i, x := range n.in.Xattrs {
		enc, err := encodeXattr(x)
		if err != nil {
			return n.errorf("%w", err)
		}
		n.xattrs.all[i] = enc
		count[enc]++
	}
	slices.SortFunc(n.xattrs.all, compareXattrs)
	for i, x := range n.xattrs.all[1:] {
		if prev := n.xattrs.all[i]; prev.index == x.index && prev.name == x.name {
			name, _ := xattrName(x.index, x.name)
			return n.errorf("two attributes have the name %q", name)
		}
	}
	return nil
}

func (n *node) splitXattrs(number map[xattr]uint32) error {
	p := &n.xattrs
	p.size = xattrHeaderSize
	for _, x := range p.all {
		if num, ok := number[x]; ok && len(p.shared) < maxSharedXattrs {
			p.shared = append(p.shared, num)
			p.size += xattrEntrySize
			continue
		}
		p.inline = append(p.inline, x)
		p.size += x.size()
	}
	if xattrIcount(p.size) > maxXattrIcount {
		return n.errorf("the attributes take %d bytes; there is place for %d", p.size, xattrHeaderSize+(maxXattrIcount-1)*xattrEntrySize)
	}
	return nil
}

// xattrIcount returns the inode's field for attributes of size bytes.
func xattrIcount(size int64) int64 {
	if size == 0 {
		return 0
	}
	return (size-xattrHeaderSize)/xattrEntrySize + 1
}

// encode writes what is behind the inode.
func (x *xattrPlan) encode(p []byte) {
	if x.size == 0 {
		return
	}
	p[4] = byte(len(x.shared))
	at := int64(xattrHeaderSize)
	for _, num := range x.shared {
		le.PutUint32(p[at:], num)
		at += xattrEntrySize
	}
	for _, e := range x.inline {
		at += e.encode(p[at:])
	}
}
