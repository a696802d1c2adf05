package snapshot

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

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

// Cleanup removes directories that belong to no snapshot: what crashes and
// failed removals left.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	var stale []string
	// A write transaction keeps new snapshots, whose directories come before
	// their records, from being taken for stale ones.
	err := s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		entries, err := os.ReadDir(s.dir())
		if err != nil {
			return err
		}
		for _, e := range entries {
			if _, ok := ids[e.Name()]; !ok {
				stale = append(stale, filepath.Join(s.dir(), e.Name()))
			}
		}
		return nil
	})
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
