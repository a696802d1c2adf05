package disks

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"sluice/internal/background"
	"sluice/internal/blob"
	"sluice/internal/durable"
	"sluice/internal/node/cache"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/node/smb"
	"sluice/internal/remote"
	"sluice/oci"
)

// Options configures a Manager. Root, Cache, Plane, Registry and Share are required.
type Options struct {
	// Root is the directory of all state. It must be on a real file system (not
	// overlayfs), which EROFS needs of its metadata files, and only root may enter
	// it. A short path leaves room in overlayfs's mount options.
	Root string

	// Cache holds content, Plane mounts it. They stay the caller's, who closes the
	// plane before the Manager, so that reads under way aren't failed but left to the
	// next process, and the cache after it. Nobody else has layers in the cache that
	// nothing may remove.
	Cache *cache.Cache
	Plane plane.Plane

	// Registry returns the registry itself that has a repository, not a mirror of it:
	// the host is spelled as in references, "docker.io", "127.0.0.1:5000". It is
	// called for every question, so it should be quick.
	Registry func(host, repository string) (*remote.Registry, error)

	// Share returns a share that is reached with what login returns, as in
	// smb.Options. It is called once for each repository that images come from, and
	// doesn't call login itself.
	Share func(login func(ctx context.Context, refused string) (smb.Login, error)) smb.Share

	// Identity tells who this node is to a registry, for a repository: a value that
	// changes when there are other credentials for it. What was refused is asked for
	// again then, whatever Remember is. Nil: that never changes.
	Identity func(registry, repository string) string

	// Region is where this machine is, as in the registry's teleport.region. Empty:
	// where the registry is.
	Region string

	// Platform is what images must be for; the zero value is this machine's.
	Platform oci.Platform

	// Decide bounds how long a pull may wait for the registry to say where the disks
	// are; default 10 s. Fetch bounds how long it may take to bring what a mount
	// needs from the share; default 30 s.
	Decide, Fetch time.Duration

	// Remember is for how long the answer "can't be mounted" is given again without
	// asking; default 1 min. A pull asks once per layer.
	Remember time.Duration

	// Linger is for how long what nobody uses is kept: mounts, and images that were
	// never used; default 10 min.
	Linger time.Duration

	// Retry bounds the patience with the share when content is read.
	Retry blob.RetryOptions

	// Log receives what operators should know. Nil discards it.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	set := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	set(&o.Decide, 10*time.Second)
	set(&o.Fetch, 30*time.Second)
	set(&o.Remember, time.Minute)
	set(&o.Linger, 10*time.Minute)
	if o.Identity == nil {
		o.Identity = func(string, string) string { return "" }
	}
	if o.Platform.OS == "" {
		o.Platform = oci.Platform{OS: "linux", Architecture: runtime.GOARCH}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// Manager makes images usable. Its methods may be called concurrently.
type Manager struct {
	opts Options
	log  *slog.Logger

	background *background.Work // until Close
	ledger     *mount.Ledger

	counter   blob.Counter  // what was asked of shares
	expecting chan struct{} // a token for each image that is looked up ahead

	// files is held while something in images or disks gets or loses its name.
	files sync.Mutex

	// mu guards what follows, and the fields of image and disk that say so. Nothing
	// is waited for under it. See the package comment for the order of locks.
	mu       sync.Mutex
	settled  bool
	images   map[oci.Digest]*image
	disks    map[content]*disk
	repos    map[repoName]*repo
	known    map[subject]oci.Digest // what earlier pulls found
	calls    map[subject]*call
	attaches Attaches
	offers   map[string]bool // registries that have disks of images
}

// Open opens the state in o.Root, adopts the mounts that an earlier process left, and
// declares the plane ready: others who mount through it adopt theirs before. What
// can't be adopted is logged and concerns only its own users.
//
// At most one Manager may be open on a directory; the caller sees to that.
func Open(ctx context.Context, o Options) (*Manager, error) {
	o = o.withDefaults()
	m := &Manager{
		opts: o, log: o.Log,
		expecting: make(chan struct{}, maxExpected),

		images: make(map[oci.Digest]*image),
		disks:  make(map[content]*disk),
		repos:  make(map[repoName]*repo),
		known:  make(map[subject]oci.Digest),
		calls:  make(map[subject]*call),
		offers: make(map[string]bool),
	}
	m.ledger = mount.NewLedger(m.logOutcome)
	var err error
	if m.opts.Root, err = durable.Directory(o.Root, imagesName, disksName, mountsName); err != nil {
		return nil, fmt.Errorf("directory of disks: %w", err)
	}
	if err := m.load(); err != nil {
		return nil, fmt.Errorf("read the images of %s: %w", o.Root, err)
	}
	m.background = background.New()
	if err := m.adopt(ctx); err != nil {
		m.background.Stop()
		return nil, fmt.Errorf("adopt the mounts of %s: %w", o.Root, err)
	}
	o.Plane.Ready()
	m.background.Go(m.sweepLoop)
	return m, nil
}

// Close ends background work, gives the cache's layers back and disconnects from all
// shares. All mounts stay, so that containers go on; the next process adopts them.
func (m *Manager) Close() error {
	m.background.Stop()
	m.mu.Lock()
	disks, repos := m.allDisks(), m.repos
	m.repos = make(map[repoName]*repo)
	m.mu.Unlock()
	for _, d := range disks {
		<-d.lock // whoever has it ends with its own context, or with that of the background
		m.release(d)
		d.lock <- struct{}{}
	}
	return closeAll(repos)
}

// Settled tells the Manager that every owner has attached again after a start. From
// then on it removes what nobody owns.
func (m *Manager) Settled() {
	m.mu.Lock()
	m.settled = true
	m.mu.Unlock()
	m.opts.Cache.Settled(m.needs)
}

// The directories in the Manager's.
const (
	imagesName = "images"
	disksName  = "disks"
	mountsName = "m" // short: mount options have many
)

func (m *Manager) imagesDir() string { return filepath.Join(m.opts.Root, imagesName) }
func (m *Manager) disksDir() string  { return filepath.Join(m.opts.Root, disksName) }
func (m *Manager) mountsDir() string { return filepath.Join(m.opts.Root, mountsName) }

// lookup returns an image that is here.
func (m *Manager) lookup(id oci.Digest) (*image, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	img := m.images[id]
	if img == nil {
		return nil, fmt.Errorf("image %s: %w", id, mount.ErrUnknownImage)
	}
	return img, nil
}

// Hold keeps an image's state, and the content of its lowest layers up to the given
// one, from 0, for owner until Release.
func (m *Manager) Hold(_ context.Context, id oci.Digest, layer int, owner string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	img := m.images[id]
	if img == nil {
		return fmt.Errorf("image %s: %w", id, mount.ErrUnknownImage)
	}
	img.holders[owner] = layer + 1
	img.removed = img.removed && img.held() < len(img.disks)
	return nil
}

// Release gives up all that owner holds and has attached. What nobody else needs
// lingers for a while, or until Collect. An owner that has nothing is fine.
func (m *Manager) Release(_ context.Context, owner string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for _, img := range m.images {
		if img.holders[owner] > 0 {
			delete(img.holders, owner)
			img.used, img.removed = now, img.held() < len(img.disks)
		}
	}
	for _, d := range m.disks {
		for o := range d.owners {
			if o.name != owner {
				continue
			}
			delete(d.owners, o)
			d.used = now
			if img := m.images[o.image]; img != nil {
				img.used = now
			}
		}
	}
	return nil
}
