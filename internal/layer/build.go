package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"path"
	"strings"
)

// Names that mean something else than themselves (OCI image-spec layer.md,
// "Whiteouts").
const (
	whiteoutPrefix = ".wh."
	aufsPrefix     = whiteoutPrefix + whiteoutPrefix
	opaqueMarker   = aufsPrefix + ".opq"
)

// Symbolic links in the parents of names are rare. These bounds let a hundred
// thousand entries, or a part of them all, have some, and keep a tar made to be
// slow at 100 ns for each step: seconds, under a minute at the limit on nodes.
const (
	stepsAtFirst  = 16 << 20
	stepsPerEntry = 128
)

// builder makes a layer's tree entry by entry, as extraction makes files.
type builder struct {
	root    *Node
	limits  Limits
	resolve resolver
	nodes   int
	strings int64
	started bool

	// whiteouts are the nodes made for .wh.NAME, as opposed to devices 0:0
	// that the tar itself has. For this layer's own names they don't exist.
	whiteouts map[*Node]struct{}

	// dirs are the directory entries in the order of the tar. When moved is
	// set, a directory or a link has been replaced by something else, and
	// finish has to look again where the names lead to.
	dirs  []dirTime
	moved bool
}

type dirTime struct {
	name string
	sec  int64
	nsec uint32
}

// errSymlink is descend's answer when a path must first be resolved.
var errSymlink = errors.New("path leads through a symbolic link")

func newBuilder(limits Limits) *builder {
	root, steps := &Node{Mode: TypeDir | 0o755}, int64(stepsAtFirst)
	whiteouts := make(map[*Node]struct{})
	return &builder{
		root:      root,
		limits:    limits,
		resolve:   resolver{root: root, gone: whiteouts, steps: &steps},
		whiteouts: whiteouts,
	}
}

// add puts n, which newNode made of h, where h says.
func (b *builder) add(h *tar.Header, n *Node) error {
	*b.resolve.steps += stepsPerEntry
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	if len(name) > maxPath {
		return errTooLong
	}
	if !b.started || name == "" && n.IsDir() {
		b.started = true
		b.root.Mtime, b.root.MtimeNsec = n.Mtime, n.MtimeNsec
	}
	if name == "" {
		return nil
	}
	dir, base := path.Split(name)
	parent, err := b.parent(strings.TrimSuffix(dir, "/"), n)
	if err != nil {
		return err
	}
	if hidden, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		return b.whiteout(parent, base, hidden)
	}
	switch n.Type() {
	case TypeDir:
		if err := b.charge(int64(len(name))); err != nil {
			return err
		}
		b.dirs = append(b.dirs, dirTime{strings.Clone(name), n.Mtime, n.MtimeNsec})
		return b.directory(parent, base, n)
	case 0:
		return b.hardLink(parent, base, h.Linkname, n)
	default:
		b.remove(parent, base)
		return b.insert(parent, base, n)
	}
}

// parent returns the directory at dir, making what is missing of it. cause is
// the entry that needs it.
func (b *builder) parent(dir string, cause *Node) (*Node, error) {
	n, err := b.descend(dir, cause)
	if err != errSymlink {
		return n, err
	}
	resolved, err := b.resolve.follow(dir)
	if err != nil {
		return nil, fmt.Errorf("follow the links in %.200q: %w", dir, err)
	}
	return b.descend(resolved, cause)
}

func (b *builder) descend(dir string, cause *Node) (*Node, error) {
	at := b.root
	for depth := 1; dir != ""; depth++ {
		var element string
		element, dir, _ = strings.Cut(dir, "/")
		if depth > b.limits.Depth {
			return nil, fmt.Errorf("more than %d directories deep", b.limits.Depth)
		}
		next := at.Children[element]
		gone := b.isWhiteout(next)
		switch {
		case next == nil || gone:
			made := &Node{
				Mode: TypeDir | 0o755, Mtime: cause.Mtime, MtimeNsec: cause.MtimeNsec,
				Implicit: true, Opaque: gone,
			}
			if at.Mode&setgid != 0 {
				made.GID = at.GID // mkdir(2); the bit itself is not handed on
			}
			if err := b.insert(at, element, made); err != nil {
				return nil, err
			}
			next = made
		case next.Type() == TypeSymlink:
			return nil, errSymlink
		case !next.IsDir():
			return nil, fmt.Errorf("parent %.200q: %w", element, errNotDir)
		}
		at = next
	}
	return at, nil
}

// whiteout takes in an entry whose name, base, begins with .wh.; hidden is the
// rest of it. What this layer itself has is not touched, whether it came
// before or comes later.
func (b *builder) whiteout(parent *Node, base, hidden string) error {
	switch {
	case base == opaqueMarker:
		parent.Opaque = true
		return nil
	case strings.HasPrefix(base, aufsPrefix):
		return nil
	case hidden == "" || hidden == "." || hidden == "..":
		return errors.New("whiteout names nothing")
	}
	if own := parent.Children[hidden]; own != nil {
		if own.IsDir() {
			own.Opaque = true
		}
		return nil
	}
	n := &Node{Mode: TypeChar}
	b.whiteouts[n] = struct{}{}
	return b.insert(parent, hidden, n)
}

func (b *builder) isWhiteout(n *Node) bool {
	_, ok := b.whiteouts[n]
	return ok
}

func (b *builder) directory(parent *Node, base string, n *Node) error {
	old := parent.Children[base]
	if old == nil || !old.IsDir() {
		n.Opaque = b.isWhiteout(old)
		b.remove(parent, base)
		return b.insert(parent, base, n)
	}
	n.Xattrs = union(old.Xattrs, n.Xattrs)
	old.setAttributes(n)
	old.Implicit = false
	return b.chargeXattrs(old)
}

// hardLink gives another name to the node that target leads to. As extraction
// does it, the entry's attributes, in n, become those of the node.
func (b *builder) hardLink(parent *Node, base, target string, n *Node) error {
	b.remove(parent, base)
	t, lower, err := b.linkTarget(target)
	switch {
	case err != nil:
		return fmt.Errorf("hard link to %.200q: %w", target, err)
	case t == nil:
		return b.insert(parent, base, &Node{LowerLink: lower})
	case b.isWhiteout(t):
		return b.whiteout(parent, whiteoutPrefix+base, base) // what link(2) makes of it
	case t.IsDir():
		return fmt.Errorf("hard link to the directory %.200q", target)
	case t.LowerLink == "":
		// chown(2) takes file capabilities away, then the entry's own are set.
		xattrs := union(t.Xattrs, n.Xattrs)
		if _, again := n.Xattrs[capability]; !again {
			delete(xattrs, capability)
		}
		n.Xattrs = xattrs
		t.setAttributes(n)
		if t.Type() == TypeSymlink {
			t.Mode = TypeSymlink | 0o777
		}
		if err := b.chargeXattrs(t); err != nil {
			return err
		}
	}
	return b.insert(parent, base, t)
}

// linkTarget returns the node that a hard link names, not following it if it
// is itself a symbolic link. When this layer has none it returns nil and the
// path at which the lower layers should have it.
func (b *builder) linkTarget(target string) (*Node, string, error) {
	clean, err := cleanName(target)
	if err != nil {
		return nil, "", err
	}
	n := lookup(b.root, clean)
	if n == nil || strings.Contains(target, "..") {
		dir, base := path.Split(target)
		if dir, err = b.resolve.follow(dir); err != nil {
			return nil, "", err
		}
		clean = path.Join("/", dir, base)[1:]
		n = lookup(b.root, clean)
	}
	if len(clean) > maxPath {
		return nil, "", errTooLong
	}
	return n, strings.Clone(clean), nil
}

// remove makes room for another entry of the same name.
func (b *builder) remove(parent *Node, base string) {
	old := parent.Children[base]
	if old == nil {
		return
	}
	if old.IsDir() || old.Type() == TypeSymlink {
		b.moved = true
	}
	delete(b.whiteouts, old)
	delete(parent.Children, base)
}

// insert makes n a child of parent, under a copy of name.
func (b *builder) insert(parent *Node, name string, n *Node) error {
	if len(name) > maxName {
		return fmt.Errorf("name %.300q has more than %d bytes", name, maxName)
	}
	if b.nodes++; b.nodes > b.limits.Nodes {
		return fmt.Errorf("layer has more than %d files", b.limits.Nodes)
	}
	if err := b.charge(int64(len(name) + len(n.Target) + len(n.LowerLink))); err != nil {
		return err
	}
	if err := b.chargeXattrs(n); err != nil {
		return err
	}
	if parent.Children == nil {
		parent.Children = make(map[string]*Node)
	}
	parent.Children[strings.Clone(name)] = n
	return nil
}

func (b *builder) charge(n int64) error {
	if b.strings += n; b.strings > b.limits.Strings {
		return fmt.Errorf("layer's names, link targets and xattrs have more than %d bytes", b.limits.Strings)
	}
	return nil
}

// chargeXattrs makes the xattrs of n, whose attributes have just been set,
// what the kernel would have made of them, and accounts for them.
func (b *builder) chargeXattrs(n *Node) error {
	size := 0
	for k, v := range n.Xattrs {
		if !takesXattr(n.Mode, k) {
			delete(n.Xattrs, k)
			continue
		}
		if k == aclAccess || k == aclDefault {
			stored, err := storedACL(k, v, n.Mode)
			if err != nil {
				return fmt.Errorf("xattr %s: %w", k, err)
			}
			if n.Xattrs[k] = stored; stored == "" {
				delete(n.Xattrs, k)
				continue
			}
		}
		size += len(k) + len(v)
	}
	if len(n.Xattrs) == 0 {
		n.Xattrs = nil
	}
	if size > b.limits.Xattrs {
		return fmt.Errorf("xattrs have more than %d bytes", b.limits.Xattrs)
	}
	return b.charge(int64(size))
}

// finish returns the root of the finished tree. Extraction sets the times of
// directories at its end, by their names; if a name leads elsewhere by then,
// that is whose time it sets.
func (b *builder) finish() *Node {
	if !b.moved {
		return b.root
	}
	for _, d := range b.dirs {
		p, err := b.resolve.follow(d.name)
		if err != nil {
			continue // what the name led to is gone
		}
		n := lookup(b.root, p)
		if n != nil && n != b.root && n.LowerLink == "" && !b.isWhiteout(n) {
			n.Mtime, n.MtimeNsec = d.sec, d.nsec
		}
	}
	return b.root
}
