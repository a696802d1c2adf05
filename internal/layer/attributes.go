package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"maps"
	"math"
	"strings"
	"time"
)

// maxID is the largest user or group id: Linux keeps 2^32-1 for "none".
const maxID = math.MaxUint32 - 1

// newNode returns the node that h describes: type and attributes, no content
// and no place. For a hard link it has attributes and no type, and for entries
// that make nothing it is nil. It keeps no part of h alive.
func newNode(h *tar.Header, limits Limits) (*Node, error) {
	n := &Node{Mode: uint32(h.Mode & 0o7777)}
	switch h.Typeflag {
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		n.Mode |= TypeRegular
		n.Size = h.Size
	case tar.TypeDir:
		n.Mode |= TypeDir
	case tar.TypeLink:
	case tar.TypeSymlink:
		if err := checkTarget(h.Linkname); err != nil {
			return nil, err
		}
		n.Mode = TypeSymlink | 0o777 // Linux has no other
		n.Target = strings.Clone(h.Linkname)
		n.Size = int64(len(n.Target))
	case tar.TypeFifo:
		n.Mode |= TypeFIFO
	case tar.TypeChar, tar.TypeBlock:
		n.Mode |= TypeChar
		if h.Typeflag == tar.TypeBlock {
			n.Mode ^= TypeChar ^ TypeBlock
		}
		if h.Devmajor < 0 || h.Devmajor > 0xfff || h.Devminor < 0 || h.Devminor > 0xfffff {
			return nil, fmt.Errorf("device %d:%d: Linux has 12 bits for major and 20 for minor numbers", h.Devmajor, h.Devminor)
		}
		n.Major, n.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	default:
		return nil, fmt.Errorf("entry type %q is not one that image layers may have", h.Typeflag)
	}
	if h.Uid < 0 || h.Uid > maxID || h.Gid < 0 || h.Gid > maxID {
		return nil, fmt.Errorf("owner %d:%d: ids go from 0 to %d", h.Uid, h.Gid, uint32(maxID))
	}
	n.UID, n.GID = uint32(h.Uid), uint32(h.Gid)
	n.Mtime, n.MtimeNsec = boundTime(h.ModTime)
	var err error
	n.Xattrs, err = readXattrs(h.PAXRecords, limits.Xattrs)
	return n, err
}

func checkTarget(target string) error {
	switch {
	case target == "":
		return errors.New("symbolic link has no target")
	case len(target) > maxPath:
		return fmt.Errorf("symbolic link's target has %d bytes, more than %d", len(target), maxPath)
	case strings.IndexByte(target, 0) >= 0:
		return errors.New("symbolic link's target contains a NUL byte")
	}
	return nil
}

// boundTime does what containerd does to times that 64 bits of nanoseconds
// cannot hold and to those before 1970.
func boundTime(t time.Time) (sec int64, nsec uint32) {
	if t.Unix() < 0 || t.After(time.Unix(0, math.MaxInt64)) {
		return 0, 0
	}
	return t.Unix(), uint32(t.Nanosecond())
}

const (
	paxXattr   = "SCHILY.xattr."
	capability = "security.capability"
)

// readXattrs returns the xattrs among PAX records that a layer may set.
func readXattrs(records map[string]string, limit int) (map[string]string, error) {
	var xattrs map[string]string
	size := 0
	for k, v := range records {
		name, ok := strings.CutPrefix(k, paxXattr)
		if !ok || !keepXattr(name) || isForeignACL(name, v) {
			continue
		}
		if len(name) > maxName || strings.HasSuffix(name, ".") {
			return nil, fmt.Errorf("xattr name %.300q is empty or has more than %d bytes", name, maxName)
		}
		if size += len(name) + len(v); size > limit {
			return nil, fmt.Errorf("xattrs have more than %d bytes", limit)
		}
		if xattrs == nil {
			xattrs = make(map[string]string)
		}
		// Cloned, because they are parts of the whole PAX header's text.
		xattrs[strings.Clone(name)] = strings.Clone(v)
	}
	return xattrs, nil
}

// union returns all xattrs of both, those of b where both have one. It keeps
// a and b as they are.
func union(a, b map[string]string) map[string]string {
	if len(a) == 0 {
		return b
	}
	u := maps.Clone(a)
	maps.Copy(u, b)
	return u
}

// keepXattr decides by namespace. The kernel has no handler for others, and
// trusted.* is how overlayfs keeps its own books.
func keepXattr(name string) bool {
	return strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "security.") ||
		name == aclAccess || name == aclDefault
}

// takesXattr reports whether the kernel lets a file of this type have it
// (xattr(7): user attributes only on files and directories; acl(5): default
// ACLs only on directories, none on symbolic links).
func takesXattr(mode uint32, name string) bool {
	switch mode & TypeMask {
	case TypeDir:
		return true
	case TypeRegular:
		return name != aclDefault
	case TypeSymlink:
		return strings.HasPrefix(name, "security.")
	}
	return strings.HasPrefix(name, "security.") || name == aclAccess
}
