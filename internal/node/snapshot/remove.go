package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
)

// Remove removes the snapshot key. What it needed of a streamed image is given
// up, so that the mount goes when nobody else needs it. Its directories are
// gone when Remove returns, unless that fails: then Cleanup tries again.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.store.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		return err
	})
	if err != nil {
		return fmt.Errorf("remove snapshot %q: %w", key, err)
	}
	s.forget(ctx, id)
	if err := os.RemoveAll(s.path(id)); err != nil {
		s.log.WarnContext(ctx, "a removed snapshot's directory is left over", "path", s.path(id), "error", err)
	}
	return nil
}

// Cleanup removes directories that belong to no snapshot, which crashes and
// failed removals left, and what is here of images of which no snapshot is left.
// containerd calls it after each garbage collection that removed snapshots, and
// waits for it before it says that an image is removed.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	if s.images != nil {
		s.images.Collect(ctx)
	}
	stale, err := s.setAside(ctx)
	if err != nil {
		return fmt.Errorf("find left-over snapshot directories: %w", err)
	}
	for _, dir := range stale {
		if err := os.RemoveAll(dir); err != nil {
			s.log.WarnContext(ctx, "a left-over snapshot directory can't be removed", "path", dir, "error", err)
		}
	}
	return nil
}

// stalePrefix is of directories that are being removed.
const stalePrefix = "stale-"

// setAside moves the directories that belong to no snapshot to where no snapshot
// will be, and returns them.
func (s *Snapshotter) setAside(ctx context.Context) (stale []string, err error) {
	// A write transaction keeps new snapshots, whose directories come before
	// their records, from being taken for stale ones; and new names keep a
	// snapshot from being removed that gets its ID right after it: one that
	// failed to commit gave it back.
	err = s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		entries, err := os.ReadDir(s.dir())
		if err != nil {
			return err
		}
		for _, e := range entries {
			if _, ok := ids[e.Name()]; ok {
				continue
			}
			dir := s.path(e.Name())
			if !strings.HasPrefix(e.Name(), stalePrefix) {
				aside, err := os.MkdirTemp(s.dir(), stalePrefix)
				if err != nil {
					return err
				}
				if err := os.Rename(dir, filepath.Join(aside, e.Name())); err != nil {
					return errors.Join(err, os.Remove(aside))
				}
				dir = aside
			}
			stale = append(stale, dir)
		}
		return nil
	})
	return stale, err
}
