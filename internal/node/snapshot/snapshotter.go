package snapshot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/continuity/fs"

	"sluice/oci"
)

// Options configures a Snapshotter. Root is required.
type Options struct {
	// Root is the directory of the metadata store and of the ordinary
	// snapshots, on a file system that can be overlayfs's upper directory.
	// A short path leaves room in the mount options of deep images.
	Root string

	// Images streams images. With nil every snapshot is an ordinary one.
	Images Images

	// MountOptions are added to every overlayfs mount. Unless they say
	// otherwise, "index=off" and, where the kernel needs it, "userxattr" are.
	MountOptions []string

	// RemapIDs gives containers of a user namespace their image through
	// ID-mapped mounts, as containerd's overlayfs snapshotter does with the
	// capability "remap-ids".
	RemapIDs bool

	// Observer is told what containerd asks for. Nil: nobody is.
	Observer Observer

	// Log receives what operators should know. Nil discards it.
	Log *slog.Logger
}

// Observer is told what happens to images. Its methods must be quick, and may be
// called concurrently.
type Observer interface {
	// Asked is called when containerd has asked for a layer of the image ref,
	// whose manifest has that digest (empty when unknown); err is why the layer
	// can't be streamed, nil if it is.
	Asked(ref string, manifest oci.Digest, err error)

	// Created is called when the writable snapshot key, not a layer's to be, was
	// made on top of the streaming artifact image; that is empty if what is
	// right beneath isn't streamed.
	Created(key string, image oci.Digest)
}

// Snapshotter implements containerd's snapshots.Snapshotter and
// snapshots.Cleaner. Its methods may be called concurrently.
//
// What a method has acknowledged survives a crash: it is in the metadata
// store, whose transactions are synced to disk.
type Snapshotter struct {
	root    string
	images  Images
	watcher Observer // may be nil
	options []string
	remap   bool
	log     *slog.Logger
	store   *storage.MetaStore

	// mu guards remotes. It is never held while anything else is locked or
	// waited for.
	mu sync.RWMutex
	// remotes says which committed snapshots are streamed, by snapshot ID.
	remotes map[string]remote
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// Open opens the snapshotter whose state is in opts.Root, which is created if
// need be, and claims the mounts of all snapshots in it. A mount that can't be
// had is logged and concerns only the containers that use it.
//
// At most one Snapshotter may be open on a directory; a second Open fails
// after a second.
func Open(ctx context.Context, opts Options) (*Snapshotter, error) {
	s := &Snapshotter{
		root:    opts.Root,
		images:  opts.Images,
		watcher: opts.Observer,
		options: slices.Clone(opts.MountOptions),
		remap:   opts.RemapIDs,
		log:     opts.Log,
		remotes: make(map[string]remote),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(s.dir(), 0o700); err != nil {
		return nil, fmt.Errorf("snapshotter's directory: %w", err)
	}
	if ok, err := fs.SupportsDType(s.root); err != nil {
		return nil, fmt.Errorf("examine the file system of %s: %w", s.root, err)
	} else if !ok {
		return nil, fmt.Errorf("the file system of %s has no d_type, which overlayfs needs: use ext4, btrfs or xfs with ftype=1", s.root)
	}
	s.chooseOptions()
	var err error
	if s.store, err = storage.NewMetaStore(filepath.Join(s.root, "metadata.db"), withLockTimeout); err != nil {
		return nil, fmt.Errorf("metadata store of %s: %w", s.root, err)
	}
	if err := s.claim(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("read the snapshots of %s: %w", s.root, err), s.store.Close())
	}
	return s, nil
}

// chooseOptions adds the overlayfs options that the kernel wants.
func (s *Snapshotter) chooseOptions() {
	if !hasOption(s.options, "userxattr") {
		need, err := overlayutils.NeedsUserXAttr(s.root)
		if err != nil {
			s.log.Warn("can't find out whether overlayfs needs userxattr, assuming not", "error", err)
		}
		if need {
			s.options = append(s.options, "userxattr")
		}
	}
	// The kernel lets the last of two contradicting options win, so a
	// configured "index" must not be followed by ours. Index is off because
	// it forbids sharing lower directories between mounts that live in
	// different namespaces.
	if !hasOption(s.options, "index") {
		if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil {
			s.options = append(s.options, "index=off")
		}
	}
}

// hasOption reports whether options has key, with or without a value.
func hasOption(options []string, key string) bool {
	return slices.ContainsFunc(options, func(o string) bool {
		name, _, _ := strings.Cut(o, "=")
		return name == key
	})
}

// Stat returns what is known of the snapshot key.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update changes a snapshot's labels, all but the ones that say that it is
// streamed.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, old, _, err := storage.GetInfo(ctx, info.Name)
		if err != nil {
			return err
		}
		labels := make(map[string]string, len(info.Labels))
		for k, v := range info.Labels {
			labels[k] = v
		}
		dropReserved(labels)
		if r, ok := remoteOf(old.Labels); ok {
			for k, v := range r.labels() {
				labels[k] = v
			}
		}
		info.Labels = labels
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return updated, err
}

// Usage returns what the snapshot alone takes of the disk. For a streamed
// layer that is what has arrived of it.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var (
		info snapshots.Info
		id   string
	)
	if err := s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, info, usage, err = storage.GetInfo(ctx, key)
		return err
	}); err != nil {
		return snapshots.Usage{}, err
	}
	if info.Kind == snapshots.KindActive {
		du, err := fs.DiskUsage(ctx, s.upper(id))
		if err != nil {
			return snapshots.Usage{}, fmt.Errorf("disk usage of snapshot %q: %w", key, err)
		}
		return snapshots.Usage(du), nil
	}
	r, ok := s.remote(id)
	if !ok || s.images == nil {
		return usage, nil
	}
	size, err := s.images.Usage(ctx, r.image, r.layer)
	if err != nil {
		s.log.WarnContext(ctx, "disk usage of a streamed layer is unknown", "snapshot", key, "image", r.image, "error", err)
		return usage, nil
	}
	return snapshots.Usage{Size: size}, nil
}

// Walk calls fn for every snapshot that matches the filters.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, fn, filters...)
	})
}

// Mounts returns the mounts of the active snapshot or view key.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var (
		snap storage.Snapshot
		info snapshots.Info
	)
	err := s.store.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if snap, err = storage.GetSnapshot(ctx, key); err != nil {
			return fmt.Errorf("mounts of snapshot %q: %w", key, err)
		}
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return nil, err
	}
	lowers, err := s.beneath(ctx, snap)
	if err != nil {
		return nil, fmt.Errorf("mounts of snapshot %q: %w", key, err)
	}
	return s.mounts(snap, info.Labels, lowers), nil
}

// Close closes the metadata store. It leaves all mounts alone: containers go
// on running.
func (s *Snapshotter) Close() error {
	return s.store.Close()
}

// remote returns what is streamed under a committed snapshot's ID.
func (s *Snapshotter) remote(id string) (remote, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r, ok := s.remotes[id]
	return r, ok
}

func (s *Snapshotter) dir() string            { return filepath.Join(s.root, "snapshots") }
func (s *Snapshotter) path(id string) string  { return filepath.Join(s.dir(), id) }
func (s *Snapshotter) upper(id string) string { return filepath.Join(s.dir(), id, "fs") }
func (s *Snapshotter) work(id string) string  { return filepath.Join(s.dir(), id, "work") }

// owner is the name under which a snapshot keeps what it needs of images. IDs
// are never used twice.
func owner(id string) string { return ownerPrefix + id }

const ownerPrefix = "snapshot/"
