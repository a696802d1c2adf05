package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/snapshotters"

	"sluice/internal/node/mount"
	"sluice/oci"
)

// beneath is lowers for callers who can wait for a registry. An image that the
// node lost, with its disk or parts of it, is asked for again: containerd has
// it, and won't.
func (s *Snapshotter) beneath(ctx context.Context, snap storage.Snapshot) ([]string, error) {
	dirs, err := s.lowers(ctx, snap)
	if !errors.Is(err, mount.ErrUnknownImage) {
		return dirs, err
	}
	if rerr := s.restore(ctx, snap); rerr != nil {
		return nil, errors.Join(err, rerr)
	}
	return s.lowers(ctx, snap)
}

// restore pulls the images of the streamed layers beneath a snapshot, by what
// containerd said of the layers when it pulled them.
func (s *Snapshotter) restore(ctx context.Context, snap storage.Snapshot) error {
	for _, id := range snap.ParentIDs {
		r, ok := s.remote(id)
		if !ok {
			continue
		}
		labels, err := s.labels(ctx, id)
		if err != nil {
			return err
		}
		// Empty, and so ignored, where containerd didn't say it.
		manifest := oci.Digest(labels[snapshotters.TargetManifestDigestLabel])
		image, err := s.images.Pull(ctx, labels[snapshotters.TargetRefLabel], manifest)
		if err != nil {
			return fmt.Errorf("pull the lost image %s again: %w", labels[snapshotters.TargetRefLabel], err)
		}
		if image.ID != r.image {
			return fmt.Errorf("%s has another streaming artifact by now, %s: remove the image from containerd and pull it again", image.Reference, image.ID)
		}
		if err := s.holdAll(ctx, r.image); err != nil {
			return err
		}
		if r.top() {
			break
		}
	}
	return nil
}

// labels returns those of the committed snapshot with an ID.
func (s *Snapshotter) labels(ctx context.Context, id string) (map[string]string, error) {
	var info snapshots.Info
	err := s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		keys, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		_, info, _, err = storage.GetInfo(ctx, keys[id])
		return err
	})
	return info.Labels, err
}

// holdAll holds an image for all snapshots that are layers of it.
func (s *Snapshotter) holdAll(ctx context.Context, image oci.Digest) error {
	s.mu.RLock()
	layers := make(map[string]int)
	for id, r := range s.remotes {
		if r.image == image {
			layers[id] = r.layer
		}
	}
	s.mu.RUnlock()
	for id, layer := range layers {
		if err := s.images.Hold(ctx, image, layer, owner(id)); err != nil {
			return err
		}
	}
	return nil
}
