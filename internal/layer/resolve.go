package layer

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

var (
	errNotDir  = errors.New("not a directory")
	errNoEntry = errors.New("no such entry")
	errLinks   = errors.New("too many symbolic links")
	errTooLong = fmt.Errorf("path is longer than %d bytes", maxPath)
	errTooMuch = errors.New("following the layer's symbolic links takes too much work")
)

// maxLinks is how many symbolic links one path may lead through, as in
// containerd; maxKernelLinks is the same for path_resolution(7).
const (
	maxLinks       = 255
	maxKernelLinks = 40
)

// resolver follows symbolic links in a tree as containerd follows those in the
// directory that it extracts to (continuity fs.RootPath), which isn't quite as
// the kernel does: ".." in a link's target is taken off the text of the path.
// To give the same result for links through links, it does the same steps:
// rewrite the path, at most one link for each of its elements, until nothing
// changes any more.
type resolver struct {
	root *Node
	// gone are nodes that count as not there.
	gone map[*Node]struct{}
	// steps is how many elements may still be looked up. It bounds what a
	// hostile tar's links to links cost; resolvers may share it.
	steps *int64
	// stack is stat's, kept for its memory.
	stack []*Node
}

// follow returns the path that p, relative to the root, leads to when all its
// links are followed, also the last. Neither p nor the result need exist. The
// result is clean and relative, and no element of it is a link.
func (r *resolver) follow(p string) (string, error) {
	if p == "" {
		return "", nil
	}
	links := 0
	for {
		before := links
		rewritten, err := r.pass(p, &links)
		if err != nil {
			return "", err
		}
		if len(rewritten) > maxPath {
			return "", errTooLong
		}
		rooted := path.Join("/", rewritten)
		if links == before && rooted == p {
			return rooted[1:], nil
		}
		p = rewritten
		if links == before {
			p = rooted
		}
	}
}

// pass rewrites p once. An element that is a link is replaced by its target
// as written; whether that is a link too is the next pass's affair.
func (r *resolver) pass(p string, links *int) (string, error) {
	done := ""
	if strings.HasPrefix(p, "/") {
		done = "/"
	}
	for element := range strings.SplitSeq(p, "/") {
		if element == "" {
			continue
		}
		here := path.Join("/", done, element)
		if *links > maxLinks {
			return "", errLinks
		}
		*r.steps -= int64(len(here) / 32) // joining and splitting long paths is work too
		n, err := r.stat(here)
		if err != nil && !errors.Is(err, errNoEntry) {
			return "", err
		}
		switch {
		case err != nil || n.Type() != TypeSymlink:
			done = here
			continue
		case path.IsAbs(n.Target) || done == "":
			done = n.Target
		default:
			done = path.Join(done, n.Target)
		}
		*links++
		if len(done) > 2*maxPath {
			return "", errTooLong
		}
	}
	if done == "" {
		return "/", nil
	}
	return done, nil
}

// stat is lstat(2) of the absolute path p inside the tree. Where the kernel
// would leave the extraction directory (absolute links, ".." above it) it finds
// nothing, as on a host that has nothing there.
func (r *resolver) stat(p string) (*Node, error) {
	at, links := append(r.stack[:0], r.root), 0
	defer func() { r.stack = at }()
	for rest := p; rest != ""; {
		var element string
		element, rest, _ = strings.Cut(rest, "/")
		if element == "" || element == "." {
			continue
		}
		if *r.steps--; *r.steps < 0 {
			return nil, errTooMuch
		}
		if element == ".." {
			if len(at) == 1 {
				return nil, errNoEntry
			}
			at = at[:len(at)-1]
			continue
		}
		n := at[len(at)-1].Children[element]
		_, gone := r.gone[n]
		switch {
		case n == nil || gone:
			return nil, errNoEntry
		case rest == "":
			return n, nil
		case n.Type() == TypeSymlink:
			if links++; links > maxKernelLinks {
				return nil, errLinks
			}
			if path.IsAbs(n.Target) {
				return nil, errNoEntry
			}
			*r.steps -= int64(len(rest) / 32)
			rest = n.Target + "/" + rest
		case !n.IsDir():
			return nil, errNotDir
		default:
			at = append(at, n)
		}
	}
	return at[len(at)-1], nil
}

// lookup returns the node at the clean relative path p without following any
// link; nil if there is none.
func lookup(root *Node, p string) *Node {
	n := root
	for p != "" && n != nil {
		var element string
		element, p, _ = strings.Cut(p, "/")
		n = n.Children[element]
	}
	return n
}
