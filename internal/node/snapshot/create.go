package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"

	"sluice/internal/durable"
)

// withLockTimeout makes a second daemon on the same directory fail instead of
// wait for ever.
func withLockTimeout(o *bbolt.Options) error {
	o.Timeout = time.Second
	return nil
}

// Prepare creates the writable snapshot key on top of parent. When the labels
// say which layer is going to be unpacked into it, and that layer can be
// streamed, it commits the layer's snapshot instead and the error is
// errdefs.ErrAlreadyExists.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	info, err := apply(opts)
	if err != nil {
		return nil, err
	}
	if target := info.Labels[snapshots.LabelSnapshotRef]; target != "" && s.images != nil {
		err := s.prepareRemote(ctx, key, parent, target, info.Labels)
		s.tellAsked(ctx, info.Labels, err)
		if err == nil {
			return nil, fmt.Errorf("layer %s is streamed: %w", target, errdefs.ErrAlreadyExists)
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		s.logOrdinary(ctx, target, info.Labels, err)
	}
	return s.create(ctx, snapshots.KindActive, key, parent, info)
}

// View creates the read-only snapshot key on top of parent.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	info, err := apply(opts)
	if err != nil {
		return nil, err
	}
	return s.create(ctx, snapshots.KindView, key, parent, info)
}

// apply returns what opts say, without labels that aren't the caller's to set.
func apply(opts []snapshots.Opt) (snapshots.Info, error) {
	var info snapshots.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return info, err
		}
	}
	dropReserved(info.Labels)
	return info, nil
}

// create makes an ordinary snapshot: its directories, its record, and the
// mounts beneath it.
func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, info snapshots.Info) ([]mount.Mount, error) {
	var snap storage.Snapshot
	err := s.store.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		snap, err = storage.CreateSnapshot(ctx, kind, key, parent, snapshots.WithLabels(info.Labels))
		if err != nil {
			return err
		}
		return s.makeDirs(snap)
	})
	if err != nil {
		return nil, fmt.Errorf("create snapshot %q: %w", key, err)
	}
	lowers, err := s.beneath(ctx, snap)
	if err == nil {
		err = s.own(snap, info.Labels, lowers)
	}
	if err != nil {
		err = fmt.Errorf("create snapshot %q: %w", key, err)
		// The caller will not call Remove for what it was never given.
		return nil, errors.Join(err, s.Remove(context.WithoutCancel(ctx), key))
	}
	s.tellCreated(snap, key, info.Labels)
	return s.mounts(snap, info.Labels, lowers), nil
}

// makeDirs makes a new snapshot's directories, all of them or none. Directories
// of a transaction that then fails have an ID that the store doesn't know, so
// that Cleanup or a later snapshot of the same ID removes them.
func (s *Snapshotter) makeDirs(snap storage.Snapshot) error {
	tmp, err := os.MkdirTemp(s.dir(), "new-")
	if err != nil {
		return err
	}
	if err = os.Mkdir(filepath.Join(tmp, "fs"), 0o755); err == nil && snap.Kind == snapshots.KindActive {
		err = os.Mkdir(filepath.Join(tmp, "work"), 0o711)
	}
	if err == nil {
		// A transaction that failed to commit gave its ID back.
		err = os.RemoveAll(s.path(snap.ID))
	}
	if err == nil {
		err = os.Rename(tmp, s.path(snap.ID))
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	return nil
}

// own gives the upper directory the owner that the snapshot's root must have:
// the mapped root of a user namespace, or that of the layer beneath.
func (s *Snapshotter) own(snap storage.Snapshot, labels map[string]string, lowers []string) error {
	uid, gid, err := mappedRoot(labels)
	if err != nil {
		return err
	}
	if uid < 0 {
		if len(lowers) == 0 {
			return nil
		}
		fi, err := os.Stat(lowers[0])
		if err != nil {
			return fmt.Errorf("root of the layer beneath: %w", err)
		}
		st, ok := fi.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("owner of %s is unknown", lowers[0])
		}
		uid, gid = int(st.Uid), int(st.Gid)
	}
	return os.Lchown(s.upper(snap.ID), uid, gid)
}

// mappedRoot returns the host's IDs of a user namespace's root according to the
// labels, or -1 without such labels.
func mappedRoot(labels map[string]string) (uid, gid int, err error) {
	u, okU := labels[snapshots.LabelSnapshotUIDMapping]
	g, okG := labels[snapshots.LabelSnapshotGIDMapping]
	if !okU && !okG {
		return -1, -1, nil
	}
	if uid, err = hostRoot(u); err != nil {
		return 0, 0, fmt.Errorf("label %s: %w", snapshots.LabelSnapshotUIDMapping, err)
	}
	if gid, err = hostRoot(g); err != nil {
		return 0, 0, fmt.Errorf("label %s: %w", snapshots.LabelSnapshotGIDMapping, err)
	}
	return uid, gid, nil
}

// hostRoot returns the host ID of ID 0 in mappings, which is a list of
// "container:host:size" with commas between.
func hostRoot(mappings string) (int, error) {
	for m := range strings.SplitSeq(mappings, ",") {
		var ids [3]int
		fields := strings.Split(m, ":")
		if len(fields) != len(ids) {
			return 0, fmt.Errorf("mapping %q isn't container:host:size: %w", m, errdefs.ErrInvalidArgument)
		}
		for i, f := range fields {
			n, err := strconv.ParseUint(f, 10, 31)
			if err != nil {
				return 0, fmt.Errorf("mapping %q: %q isn't an ID: %w", m, f, errdefs.ErrInvalidArgument)
			}
			ids[i] = int(n)
		}
		if ids[0] == 0 && ids[2] > 0 {
			return ids[1], nil
		}
	}
	return 0, fmt.Errorf("mapping %q doesn't map root: %w", mappings, errdefs.ErrInvalidArgument)
}

// Commit turns the writable snapshot key into the committed snapshot name.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	info, err := apply(opts)
	if err != nil {
		return err
	}
	err = s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		id, _, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		usage, err := fs.DiskUsage(ctx, s.upper(id))
		if err != nil {
			return fmt.Errorf("disk usage: %w", err)
		}
		// The directories must not be younger than the record that names
		// them. What is in them is the unpacker's to sync.
		if err := errors.Join(durable.SyncDir(s.path(id)), durable.SyncDir(s.dir())); err != nil {
			return err
		}
		_, err = storage.CommitActive(ctx, key, name, snapshots.Usage(usage),
			snapshots.WithLabels(info.Labels), snapshots.WithParent(info.Parent))
		return err
	})
	if err != nil {
		return fmt.Errorf("commit snapshot %q as %q: %w", key, name, err)
	}
	return nil
}
