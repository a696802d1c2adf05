package layer

import (
	"errors"
	"fmt"
	"path"
	"slices"
)

// Merged is a stack of layers made one.
type Merged struct {
	// Tree is what a container sees: whiteouts applied, nothing Implicit or
	// Opaque or linked to lower layers left. Extent.Layer is the index of
	// the layer in Merge's argument.
	Tree *Tree
	// Context has each layer's own tree, still with its whiteouts, completed
	// by what only the layers below it know: the attributes of Implicit
	// directories, and hard links to lower layers, whose Extents then point
	// into those. Extent.Layer is as in Tree.
	Context []*Tree
	// Changed says for each layer whether there was something to complete. If
	// not, Context[i] says the same as the layer alone, save Extent.Layer, and
	// what was made of the layer alone is still right.
	Changed []bool
}

// Merge stacks trees from Read, layers[0] lowest, as overlayfs does
// (Documentation/filesystems/overlayfs.rst): an upper name hides a lower one,
// a directory on a directory adds to it and gives it its own attributes and
// xattrs, and whiteouts and Opaque directories hide what is below. As in
// overlayfs, an Opaque root hides nothing.
//
// The result shares nodes with the argument and within itself; neither may be
// modified. Several names of one file remain one *Node. Errors are hard links
// whose target no layer has, and name the layer by its index.
func Merge(layers []*Tree) (*Merged, error) {
	m := &Merged{
		Tree:    &Tree{Root: &Node{Mode: TypeDir | 0o755}},
		Context: make([]*Tree, len(layers)),
		Changed: make([]bool, len(layers)),
	}
	steps := int64(stepsPerMerge)
	for i, l := range layers {
		var err error
		m.Context[i], m.Changed[i], err = complete(l, i, m.Context[:i], m.Tree.Root, &steps)
		if err != nil {
			return nil, fmt.Errorf("merge layer %d: %w", i, err)
		}
		stack(m.Tree.Root, m.Context[i].Root)
	}
	return m, nil
}

// stack merges the directory upper into lower, which is the merged tree's own,
// as are all directories in it; what else is in them is shared.
func stack(lower, upper *Node) {
	lower.setAttributes(upper)
	if lower.Children == nil && len(upper.Children) > 0 {
		lower.Children = make(map[string]*Node, len(upper.Children))
	}
	for name, n := range upper.Children {
		switch {
		case n.IsWhiteout():
			delete(lower.Children, name)
		case n.IsDir():
			under := lower.Children[name]
			if under == nil || !under.IsDir() || n.Opaque {
				under = &Node{Mode: TypeDir}
				lower.Children[name] = under
			}
			stack(under, n)
		default:
			lower.Children[name] = n
		}
	}
	if len(lower.Children) == 0 {
		lower.Children = nil
	}
}

// stepsPerMerge bounds what following symbolic links costs in one Merge.
const stepsPerMerge = 128 << 20

// completer completes one layer.
type completer struct {
	layer   int
	merged  *resolver       // the layers below, stacked
	inherit map[*Node]*Node // Implicit directory -> the one whose attributes it takes
	// replace has what stands for a node that isn't a directory: of a hard
	// link to a lower layer its target, of others a copy that knows its layer.
	replace map[*Node]*Node
}

// lowerDir is a directory in one of the lower layers, and that layer.
type lowerDir struct {
	*Node
	in *resolver
}

// complete returns layer number i with what the layers below know of it, and
// whether that was anything. below are their completed trees, merged is the
// root of those trees stacked.
func complete(l *Tree, i int, below []*Tree, merged *Node, steps *int64) (*Tree, bool, error) {
	c := completer{
		layer:   i,
		merged:  &resolver{root: merged, steps: steps},
		inherit: make(map[*Node]*Node),
		replace: make(map[*Node]*Node),
	}
	changed := false
	if incomplete(l.Root) {
		var lower []lowerDir
		for j := i - 1; j >= 0; j-- {
			root := below[j].Root
			lower = append(lower, lowerDir{root, &resolver{root: root, steps: steps}})
		}
		if err := c.survey(l.Root, "", lower); err != nil {
			return nil, false, err
		}
		changed = len(c.inherit)+len(c.replace) > 0
	}
	if i == 0 {
		return l, false, nil // nothing is below, and its extents say 0 already
	}
	done := *l
	done.Root = c.copy(l.Root)
	return &done, changed, nil
}

// incomplete reports whether lower layers could have something to add to n.
func incomplete(n *Node) bool {
	if n.Implicit || n.LowerLink != "" {
		return true
	}
	for _, child := range n.Children {
		if incomplete(child) {
			return true
		}
	}
	return false
}

// SelfContained reports whether a tree from Read says all there is to say of its
// layer: nothing in it depends on the layers below, whichever those are.
func (t *Tree) SelfContained() bool {
	for _, child := range t.Root.Children {
		if incomplete(child) {
			return false
		}
	}
	return true
}

// survey finds what there is to complete in dir and below it. lower are the
// directories at the same path in the lower layers, nearest first.
//
// Which of those an Implicit directory takes after is containerd's rule
// (mkparent in pkg/archive): the nearest layer that has the path, links inside
// that layer followed, but none beyond one that has something else there. If
// there is none, it is a new directory.
func (c *completer) survey(dir *Node, at string, lower []lowerDir) error {
	for _, name := range dir.Names() { // in order, so that errors are always the same
		n, p := dir.Children[name], path.Join(at, name)
		switch {
		case n.LowerLink != "":
			if err := c.link(n); err != nil {
				return fmt.Errorf("hard link %.200q to %.200q: %w", p, n.LowerLink, err)
			}
		case n.IsDir():
			next, err := namesakes(lower, p, name)
			if err != nil {
				return fmt.Errorf("find %.200q in the lower layers: %w", p, err)
			}
			if n.Implicit {
				c.attributes(n, dir, next)
			}
			if err := c.survey(n, p, next); err != nil {
				return err
			}
		}
	}
	return nil
}

// attributes finds the attributes of n, Implicit in dir.
func (c *completer) attributes(n, dir *Node, lower []lowerDir) {
	if len(lower) > 0 {
		if from := lower[0].Node; !n.sameAttributes(from) {
			c.inherit[n] = from
		}
		return
	}
	// What mkdir(2) takes from a parent that lists itself, Read has seen.
	if from := c.inherit[dir]; from != nil && from.Mode&setgid != 0 && n.GID != from.GID {
		own := *n
		own.GID = from.GID
		c.inherit[n] = &own
	}
}

// namesakes returns the directories called name in the given ones; p is the
// whole path.
func namesakes(lower []lowerDir, p, name string) ([]lowerDir, error) {
	var next []lowerDir
	for _, l := range lower {
		n := l.Children[name]
		if n != nil && n.Type() == TypeSymlink {
			resolved, err := l.in.follow(p)
			if errors.Is(err, errTooMuch) {
				return nil, err
			}
			if err != nil {
				return next, nil
			}
			n = lookup(l.in.root, resolved)
		}
		switch {
		case n == nil:
		case !n.IsDir():
			return next, nil
		default:
			next = append(next, lowerDir{n, l.in})
		}
	}
	return next, nil
}

// link finds the target of the hard link n in the lower layers.
func (c *completer) link(n *Node) error {
	dir, base := path.Split(n.LowerLink)
	dir, err := c.merged.follow(dir)
	if err != nil {
		return err
	}
	target := lookup(c.merged.root, path.Join(dir, base))
	switch {
	case target == nil:
		return errors.New("no layer below has the target, nor has this one before the link")
	case target.IsDir():
		return errors.New("the target is a directory")
	}
	c.replace[n] = target
	return nil
}

// copy returns the subtree of n completed.
func (c *completer) copy(n *Node) *Node {
	if !n.IsDir() {
		return c.file(n)
	}
	d := *n
	if from := c.inherit[n]; from != nil {
		d.setAttributes(from)
	}
	if n.Children != nil {
		d.Children = make(map[string]*Node, len(n.Children))
		for name, child := range n.Children {
			d.Children[name] = c.copy(child)
		}
	}
	return &d
}

func (c *completer) file(n *Node) *Node {
	if r := c.replace[n]; r != nil {
		return r
	}
	if len(n.Extents) == 0 {
		return n
	}
	f := *n
	f.Extents = slices.Clone(n.Extents)
	for i := range f.Extents {
		f.Extents[i].Layer = c.layer
	}
	c.replace[n] = &f
	return &f
}
