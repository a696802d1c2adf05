package snapshot

import (
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
)

// mounts returns what containerd has to mount for a snapshot on top of the
// directories lowers, topmost first.
//
// A chain of very many ordinary layers can exceed the one page that the kernel
// takes as mount options. containerd shortens lowerdir by the directory that
// its elements have in common, which is why every directory of ours is beneath
// one root.
func (s *Snapshotter) mounts(snap storage.Snapshot, labels map[string]string, lowers []string) []mount.Mount {
	var options []string
	if s.remap {
		if v, ok := labels[snapshots.LabelSnapshotUIDMapping]; ok {
			options = append(options, "uidmap="+v)
		}
		if v, ok := labels[snapshots.LabelSnapshotGIDMapping]; ok {
			options = append(options, "gidmap="+v)
		}
	}
	switch {
	case len(lowers) == 0 && snap.Kind == snapshots.KindView:
		return bind(s.upper(snap.ID), append(options, "ro", "rbind"))
	case len(lowers) == 0:
		return bind(s.upper(snap.ID), append(options, "rw", "rbind"))
	case len(lowers) == 1 && snap.Kind == snapshots.KindView:
		return bind(lowers[0], append(options, "ro", "rbind"))
	}
	if snap.Kind == snapshots.KindActive {
		options = append(options, "workdir="+s.work(snap.ID), "upperdir="+s.upper(snap.ID))
	}
	options = append(options, "lowerdir="+strings.Join(lowers, ":"))
	options = append(options, s.options...)
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}
}

func bind(dir string, options []string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: dir, Options: options}}
}
