package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"

	"sluice/internal/node/mount"
	"sluice/oci"
)

// errNoLabels is why a layer can't stream when containerd doesn't say which
// image it belongs to.
var errNoLabels = errors.New("containerd doesn't tell which image the layer belongs to: set enable_remote_snapshot_annotations = \"true\" in [proxy_plugins.sluice.exports]")

// prepareRemote commits the streamed snapshot of the layer whose chain ID is
// target. Nil means that a snapshot with that label and parent exists when it
// returns; an error, that the layer can't be streamed.
func (s *Snapshotter) prepareRemote(ctx context.Context, key, parent, target string, labels map[string]string) error {
	ref := labels[snapshotters.TargetRefLabel]
	if ref == "" {
		return errNoLabels
	}
	var manifest oci.Digest
	if m := labels[snapshotters.TargetManifestDigestLabel]; m != "" {
		var err error
		if manifest, err = oci.ParseDigest(m); err != nil {
			return fmt.Errorf("label %s: %w", snapshotters.TargetManifestDigestLabel, err)
		}
	}
	image, err := s.images.Pull(ctx, ref, manifest)
	if err != nil {
		return err
	}
	chain := chainIDs(image.DiffIDs)
	layer := slices.Index(chain, target)
	if layer < 0 {
		return &mount.NotStreaming{
			Reason: mount.IntegrityFailure,
			Err:    fmt.Errorf("the streaming artifact %s has no layer with chain ID %s: it isn't this image's", image.ID, target),
		}
	}
	if (layer == 0) != (parent == "") {
		return fmt.Errorf("layer %d is to be prepared without its parent: streamed layers can't be rebased, so leave \"rebase\" out of the proxy plugin's capabilities", layer)
	}
	var exists bool
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		_, exists, err = remoteName(ctx, target, parent)
		return err
	})
	if err != nil || exists {
		return err
	}
	return s.commitRemote(ctx, key, parent, chain, labels, remote{image: image.ID, layer: layer, layers: len(chain), layered: image.Layered})
}

// chainIDs returns the chain IDs of layers with the given diff IDs: what names
// a layer together with all beneath it (image-spec, config.md, "Layer
// ChainID").
func chainIDs(diffIDs []oci.Digest) []string {
	names := make([]string, len(diffIDs))
	for i, id := range diffIDs {
		if i > 0 {
			id = oci.DigestOf([]byte(names[i-1] + " " + id.String()))
		}
		names[i] = id.String()
	}
	return names
}

// commitRemote records the streamed snapshot of layer r, and of all layers of
// the image above it, in one transaction: containerd will ask for them next,
// and a transaction for each is what pulling many layers would wait for. If it
// doesn't, its garbage collection removes them like any that it doesn't know.
func (s *Snapshotter) commitRemote(ctx context.Context, key, parent string, chain []string, labels map[string]string, r remote) error {
	var ids []string
	err := s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		for ; r.layer < len(chain); r.layer++ {
			name, exists, err := remoteName(ctx, chain[r.layer], parent)
			if err != nil {
				return err
			}
			if !exists {
				id, err := s.addRemote(ctx, fmt.Sprintf("%s %d", key, r.layer), name, parent, layerLabels(labels, chain[r.layer], r))
				if err != nil {
					return err
				}
				ids = append(ids, id)
				// Before the transaction's end, because the record can be
				// used as a parent from then on.
				s.mu.Lock()
				s.remotes[id] = r
				s.mu.Unlock()
				if err := s.images.Hold(ctx, r.image, r.layer, owner(id)); err != nil {
					return err
				}
			}
			parent = name
		}
		return nil
	})
	if err != nil {
		for _, id := range ids {
			s.forget(ctx, id)
		}
		return fmt.Errorf("record the streamed layer: %w", err)
	}
	return nil
}

// addRemote adds a committed snapshot that has no directory to a transaction.
func (s *Snapshotter) addRemote(ctx context.Context, key, name, parent string, labels map[string]string) (id string, err error) {
	if _, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, parent); err != nil {
		return "", err
	}
	return storage.CommitActive(ctx, key, name, snapshots.Usage{}, snapshots.WithLabels(labels))
}

// layerLabels returns the labels of layer r, whose chain ID is chain, from
// those that containerd gave for a layer of the same image. containerd adds its
// own to them when it gets there.
func layerLabels(labels map[string]string, chain string, r remote) map[string]string {
	labels = maps.Clone(labels)
	if labels[snapshots.LabelSnapshotRef] != chain {
		labels[snapshots.LabelSnapshotRef] = chain
		delete(labels, snapshots.LabelSnapshotDiffID)
		delete(labels, snapshotters.TargetLayerDigestLabel)
		delete(labels, snapshotters.TargetImageLayersLabel)
	}
	maps.Copy(labels, r.labels())
	return labels
}

// remoteName returns the name under which the snapshot of chain ID target on
// top of parent is to be committed, and whether there is one already that
// containerd will find: by that label and parent. The name is the chain ID
// unless another namespace of containerd, whose layers beneath have other
// names, took it.
func remoteName(ctx context.Context, target, parent string) (name string, exists bool, err error) {
	name = target
	for {
		_, info, _, err := storage.GetInfo(ctx, name)
		if errdefs.IsNotFound(err) {
			return name, false, nil
		}
		if err != nil {
			return "", false, err
		}
		if info.Kind == snapshots.KindCommitted && info.Parent == parent && info.Labels[snapshots.LabelSnapshotRef] == target {
			return name, true, nil
		}
		// Names with a parent in them can only collide with themselves, so
		// this ends with the second round; a client that names its own
		// snapshots like this costs one more.
		name += "@" + oci.DigestOf([]byte(parent)).Encoded()[:16]
	}
}

// forget gives up what a snapshot needed of images.
func (s *Snapshotter) forget(ctx context.Context, id string) {
	s.mu.Lock()
	delete(s.remotes, id)
	s.mu.Unlock()
	if s.images == nil {
		return
	}
	if err := s.images.Release(context.WithoutCancel(ctx), owner(id)); err != nil {
		s.log.WarnContext(ctx, "a removed snapshot's image is still in use", "snapshot", id, "error", err)
	}
}

// logOrdinary tells why a layer is pulled the ordinary way, unless it's for a
// reason that concerns the whole image: the log has that once for each pull.
func (s *Snapshotter) logOrdinary(ctx context.Context, target string, labels map[string]string, err error) {
	log := s.log.WarnContext
	if mount.ReasonOf(err) != "" {
		log = s.log.DebugContext
	}
	log(ctx, "layer is pulled the ordinary way",
		"image", labels[snapshotters.TargetRefLabel],
		"manifest", labels[snapshotters.TargetManifestDigestLabel],
		"layer", labels[snapshotters.TargetLayerDigestLabel],
		"chain", target, "reason", string(mount.ReasonOf(err)), "error", err)
}

// tellAsked tells of a layer that containerd asked for.
func (s *Snapshotter) tellAsked(ctx context.Context, labels map[string]string, err error) {
	ref := labels[snapshotters.TargetRefLabel]
	if s.watcher == nil || ref == "" || err != nil && ctx.Err() != nil {
		return
	}
	manifest, _ := oci.ParseDigest(labels[snapshotters.TargetManifestDigestLabel]) // or err says what is wrong with it
	s.watcher.Asked(ref, manifest, err)
}

// tellCreated tells of a snapshot that isn't made for a layer.
func (s *Snapshotter) tellCreated(snap storage.Snapshot, key string, labels map[string]string) {
	if s.watcher == nil || snap.Kind != snapshots.KindActive || len(snap.ParentIDs) == 0 || labels[snapshots.LabelSnapshotRef] != "" {
		return
	}
	r, _ := s.remote(snap.ParentIDs[0])
	s.watcher.Created(key, r.image)
}

// claim registers, after a start, what every snapshot needs of images. Nothing
// is mounted for it: what containers use is, unless the machine was rebooted,
// and then few of them come back. So nothing that is wrong with an image, or
// with its registry, can keep others waiting.
func (s *Snapshotter) claim(ctx context.Context) error {
	var actives []storage.Snapshot
	err := s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if err != nil {
			if errdefs.IsNotFound(err) {
				return nil
			}
			return err
		}
		for id, key := range ids {
			_, info, _, err := storage.GetInfo(ctx, key)
			if err != nil {
				return err
			}
			if info.Kind == snapshots.KindCommitted {
				if r, ok := remoteOf(info.Labels); ok {
					s.remotes[id] = r
				}
				continue
			}
			snap, err := storage.GetSnapshot(ctx, key)
			if err != nil {
				return err
			}
			actives = append(actives, snap)
		}
		return nil
	})
	if err != nil || s.images == nil {
		return err
	}
	for id, r := range s.remotes {
		if err := s.images.Hold(ctx, r.image, r.layer, owner(id)); err != nil {
			s.log.ErrorContext(ctx, "a streamed image is lost: it is pulled again when a container needs it", "image", r.image, "layer", r.layer, "error", err)
		}
	}
	for _, snap := range actives {
		s.ownStreamed(ctx, snap)
	}
	return nil
}

// ownStreamed makes a snapshot an owner of what is streamed beneath it.
func (s *Snapshotter) ownStreamed(ctx context.Context, snap storage.Snapshot) {
	for _, id := range snap.ParentIDs {
		r, ok := s.remote(id)
		if !ok {
			continue
		}
		if err := s.images.Own(ctx, r.image, r.part(), owner(snap.ID)); err != nil && !errors.Is(err, mount.ErrUnknownImage) { // which was said
			s.log.ErrorContext(ctx, "a container's image can't be kept", "snapshot", snap.ID, "image", r.image, "error", err)
		}
		if r.top() {
			return
		}
	}
}

// lowers returns the directories beneath a snapshot, topmost first, and
// attaches those that are streamed.
func (s *Snapshotter) lowers(ctx context.Context, snap storage.Snapshot) ([]string, error) {
	dirs := make([]string, 0, len(snap.ParentIDs))
	for _, id := range snap.ParentIDs {
		r, ok := s.remote(id)
		if !ok {
			dirs = append(dirs, s.upper(id))
			continue
		}
		part := r.part()
		if s.images == nil {
			return nil, fmt.Errorf("layer %d of %s is streamed and streaming is off: %w", r.layer, r.image, errdefs.ErrUnavailable)
		}
		dir, err := s.images.Attach(ctx, r.image, part, owner(snap.ID))
		if err != nil {
			return nil, fmt.Errorf("mount %s of the streamed image %s: %w (%w)", part, r.image, err, errdefs.ErrUnavailable)
		}
		if strings.ContainsAny(dir, ":,\\") {
			return nil, fmt.Errorf("mount directory %q has characters that overlayfs gives a meaning: use another root directory", dir)
		}
		// A layer that is in the chain twice is one mount, and overlayfs wants no
		// directory twice. The upper one covers all that the lower one has or hides.
		if !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
		if r.top() {
			// The merged mount has everything beneath it too.
			break
		}
	}
	return dirs, nil
}
