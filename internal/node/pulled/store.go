// Package pulled has images that were pulled the ordinary way, all of their
// content before they start, but never unpacked: each layer is kept as the tar
// that it is, and one EROFS file of metadata shows all of them merged. The kernel
// reads both by itself, so that a mounted image needs no process.
//
// It is what orca falls back to where images can be neither teleported nor
// streamed, and works with any registry. A pull
//
//	asks for the manifest, and picks this machine's platform of an index
//	fetches the layers that aren't here, a few at a time; cut connections are
//	  resumed (package convert reads them: the blob's digest and the diff ID are
//	  compared at the end, and only then has the layer its name)
//	reads the trees of the others from their tars, which verifies them again
//	merges the trees into EROFS metadata, checks that, and writes it down
//
// On disk:
//
//	ROOT/lock                       one process at a time
//	ROOT/layers/DIFFID/tar          the layer, decompressed, padded to 512 bytes
//	                   sparse       what its sparse members expand to, if it has any
//	                   layer.json   their sizes and digests
//	ROOT/images/MANIFEST/image.json what it is
//	                     config.json, image.erofs
//	ROOT/mounts/MANIFEST            where it is mounted while somebody uses it
//
// Layers and images appear under their names complete and durable, or not at all.
// Who an image is for is told by Hold and Stack and is not remembered beyond this
// process: after a start, owners say so again before Collect removes what nobody
// has.
//
// The files: store.go opens it, pull.go and layer.go bring images here, image.go
// remembers them, use.go mounts and removes them.
package pulled

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"sluice/internal/durable"
	"sluice/internal/node/plane"
	"sluice/oci"
)

// Options configures a Store. Root and Registry are required.
type Options struct {
	// Root is the directory, made if it's missing. EROFS can't be mounted from
	// files on overlayfs.
	Root string

	// Registry returns the registry that images of a repository come from.
	Registry func(host, repository string) (oci.Registry, error)

	// Mode is how the kernel reads EROFS; default plane.FileBacked.
	Mode plane.Mode

	// Platform is the one whose images are wanted; default this machine's.
	Platform oci.Platform

	// Layers is how many layers of an image are fetched at once; default 3.
	Layers int

	// MaxImage is how many bytes an image's layers may have, decompressed;
	// default 100 GiB. KeepFree is how many bytes of the file system a pull
	// leaves free; default 1 GiB, negative: none.
	MaxImage, KeepFree int64

	// Log receives what was tried again and cleared away. Nil discards it.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.Mode == "" {
		o.Mode = plane.FileBacked
	}
	if o.Platform.OS == "" {
		o.Platform = oci.Platform{OS: "linux", Architecture: runtime.GOARCH}
	}
	if o.Layers <= 0 {
		o.Layers = 3
	}
	if o.MaxImage <= 0 {
		o.MaxImage = 100 << 30
	}
	if o.KeepFree == 0 {
		o.KeepFree = 1 << 30
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// Store has images. Its methods may be called concurrently.
type Store struct {
	opts Options
	log  *slog.Logger
	lock *os.File

	// locks are held by name while an image ("image/…") is pulled, mounted or
	// removed, and while a layer ("layer/…") is fetched or read: the image's
	// before a layer's, and mu after both.
	locks locks

	mu     sync.Mutex
	images map[oci.Digest]*image // by their manifests
	pinned map[oci.Digest]int    // layers that pulls under way count on
}

// lockPatience is how long Open waits for a process that is ending.
const lockPatience = 10 * time.Second

// Open opens the store in o.Root, with the images that are complete there.
func Open(ctx context.Context, o Options) (*Store, error) {
	s := &Store{
		opts: o.withDefaults(), images: make(map[oci.Digest]*image), pinned: make(map[oci.Digest]int),
		locks: locks{held: make(map[string]*namedLock)},
	}
	s.log = s.opts.Log
	var err error
	if s.opts.Root, err = durable.Directory(s.opts.Root, layersName, imagesName, mountsName); err != nil {
		return nil, fmt.Errorf("open the store of pulled images: %w", err)
	}
	lctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	if s.lock, err = durable.Lock(lctx, filepath.Join(s.opts.Root, "lock")); err != nil {
		return nil, fmt.Errorf("open the store of pulled images: %w", err)
	}
	if err := s.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("open the store of pulled images: %w", err), s.lock.Close())
	}
	return s, nil
}

// Close gives the directory up. Mounts stay. Pulls under way must have ended.
func (s *Store) Close() error { return s.lock.Close() }

// The directories in the store's.
const (
	layersName = "layers"
	imagesName = "images"
	mountsName = "mounts"
)

func (s *Store) layersDir() string { return filepath.Join(s.opts.Root, layersName) }
func (s *Store) imagesDir() string { return filepath.Join(s.opts.Root, imagesName) }
func (s *Store) mountsDir() string { return filepath.Join(s.opts.Root, mountsName) }

func (s *Store) layerDir(diffID oci.Digest) string {
	return filepath.Join(s.layersDir(), diffID.Encoded())
}

func (s *Store) imageDir(id oci.Digest) string { return filepath.Join(s.imagesDir(), id.Encoded()) }

// mountName is how many digits of its digest an image's mount has: overlayfs takes
// paths in a page of options.
const mountName = 32

func (s *Store) mountDir(id oci.Digest) string {
	return filepath.Join(s.mountsDir(), id.Encoded()[:mountName])
}

// locks are locks by name.
type locks struct {
	mu   sync.Mutex
	held map[string]*namedLock
}

// namedLock is a lock that somebody has or waits for.
type namedLock struct {
	token chan struct{} // holds a token while nobody has it
	users int           // guarded by locks.mu
}

// take waits for a lock. give gives it back.
func (l *locks) take(ctx context.Context, name string) (give func(), err error) {
	l.mu.Lock()
	n := l.held[name]
	if n == nil {
		n = &namedLock{token: make(chan struct{}, 1)}
		n.token <- struct{}{}
		l.held[name] = n
	}
	n.users++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if n.users--; n.users == 0 {
			delete(l.held, name)
		}
	}
	select {
	case <-n.token:
		return func() { n.token <- struct{}{}; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}
