package plane

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// CheckUnused returns ErrBusy while another mount shows the content of
// the mount at dir: an overlayfs on top of it or a bind mount of it. The
// kernel wouldn't mind unmounting it then, because those keep what they need,
// but its content comes from here. What other mount namespaces have isn't seen.
func CheckUnused(dir string) error {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return fmt.Errorf("read the mount table: %w", err)
	}
	own := slices.IndexFunc(mounts, func(i *mountinfo.Info) bool { return i.Mountpoint == dir })
	if own < 0 {
		return nil
	}
	for _, i := range mounts {
		switch {
		case i.Mountpoint == dir:
		case i.FSType == "overlay" && isLower(dir, i.VFSOptions),
			i.Major == mounts[own].Major && i.Minor == mounts[own].Minor:
			return fmt.Errorf("%w, by %s", ErrBusy, i.Mountpoint)
		}
	}
	return nil
}

// isLower reports whether dir is a lower directory in the options of an
// overlayfs. containerd may have shortened its path there, but not the last
// element, which is unique below a root.
func isLower(dir, options string) bool {
	return slices.ContainsFunc(Lowers(options), func(lower string) bool {
		return lower == dir || !filepath.IsAbs(lower) && filepath.Base(lower) == filepath.Base(dir)
	})
}

// Lowers are the lower directories in the options of an overlayfs.
func Lowers(options string) []string {
	var dirs []string
	for option := range strings.SplitSeq(options, ",") {
		name, value, _ := strings.Cut(option, "=")
		if name == "lowerdir" || name == "lowerdir+" {
			dirs = append(dirs, strings.Split(value, ":")...)
		}
	}
	return dirs
}
