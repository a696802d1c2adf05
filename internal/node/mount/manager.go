package mount

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

	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"sluice/internal/background"
	"sluice/internal/blob"
	"sluice/internal/durable"
	"sluice/internal/node/cache"
	"sluice/internal/node/plane"
	"sluice/oci"
)

// Registry is what a Manager needs of a registry: it only reads.
type Registry interface {
	oci.Reader
	oci.Lister
}

// Options configures a Manager. Root, Cache, Plane and Registry are required.
type Options struct {
	// Root is the directory of all state. It must be on a real file system
	// (not overlayfs), which EROFS needs of its metadata files, and only root
	// may enter it. A short path leaves room in overlayfs's mount options.
	Root string

	// Cache holds content, Plane mounts it. They stay the caller's, who closes
	// the plane before the Manager, so that reads under way aren't failed but left
	// to the next process, and the cache after it.
	Cache *cache.Cache
	Plane plane.Plane

	// PlaneName is how status output calls the plane; default "fuse".
	PlaneName string

	// Registry returns where to read a repository of a registry, whose host is
	// spelled as in references: "docker.io", "127.0.0.1:5000". Credentials and
	// mirrors are per repository. It is called for every use, so it should be
	// quick.
	Registry func(host, repository string) (Registry, error)

	// Platform is what images must be for; the zero value is this machine's.
	Platform oci.Platform

	// Decide bounds how long a pull may look for an artifact before the
	// ordinary pull has to do; default 10 s. Fetch bounds how long it may
	// take to bring metadata and chunk table; default 60 s.
	Decide, Fetch time.Duration

	// Remember is for how long the answer "doesn't stream" is given again
	// without asking; default 1 min. A pull asks once per layer.
	Remember time.Duration

	// Identity tells who this node is to a registry, for a repository: a value
	// that changes when there are other credentials for it. What a registry
	// refused is asked for again then, whatever Remember is. It is called
	// after each refusal that is given as an answer. Nil: that never changes.
	Identity func(registry, repository string) string

	// Linger is for how long what nobody uses is kept: mounts, and images
	// that were never used; default 10 min.
	Linger time.Duration

	// Disabled makes every Pull fail with reason Disabled. Images that are
	// already here go on working.
	Disabled bool

	// From, if not empty, are the registries, as HOST or HOST:PORT, that
	// images are streamed from; a Pull from another one fails with reason
	// Disabled. Whoever can attach artifacts to images there decides what
	// layers show until they are complete, also where another image has the
	// same layers.
	From []string

	// Conversion asks a registry what became of the conversion of an image or
	// index that has no artifact. oci.ErrUnsupported: it can't say so, and isn't
	// asked again for an hour. Nil: no registry is asked.
	Conversion func(ctx context.Context, host, repository string, subject oci.Digest) (Conversion, error)

	// NoFill leaves content that nobody reads in the registry, but for pinned
	// images.
	NoFill bool

	// wholeTable is wholeTableSize, but for tests.
	wholeTable int64

	// Retry bounds the patience with a registry during reads of content.
	Retry blob.RetryOptions

	// Tracer makes a trace of each pull. Steps that are somebody's who is
	// traced, of pulls and mounts, are part of that trace. Nil makes none.
	Tracer trace.Tracer

	// Log receives what operators should know. Nil discards it.
	Log *slog.Logger
}

// Manager makes images usable. Its methods may be called concurrently.
type Manager struct {
	opts Options
	log  *slog.Logger

	background *background.Work // until Close
	ledger     *Ledger

	counter blob.Counter // what was asked of registries
	hedger  blob.Hedger  // how long their answers take
	fills   chan oci.Digest

	expecting chan struct{} // a token for each image that is looked up ahead
	garbage   chan struct{} // see noteGarbage

	sharing sync.Mutex // guards shared; a leaf lock
	shared  devicesByKey

	// naming is held while a directory beneath images gets or loses its name,
	// or an image is pinned.
	naming sync.Mutex

	// mu guards what follows, and the fields of image and point that say so.
	// Nothing is waited for under it. Lock order: a point's lock, an image's
	// opening lock, naming, mu.
	mu        sync.Mutex
	settled   bool
	images    map[oci.Digest]*image
	known     map[subject]oci.Digest // what earlier pulls found
	calls     map[subject]*call
	turned    Switch               // see SetSwitch
	streaming map[string]bool      // registries that have artifacts
	mute      map[string]time.Time // registries that don't say what they convert, and until when they aren't asked
	claims    map[string]*claim
}

// Defaults.
const (
	defaultDecide   = 10 * time.Second
	defaultFetch    = time.Minute
	defaultRemember = time.Minute
	defaultLinger   = 10 * time.Minute
)

func (o Options) withDefaults() Options {
	set := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	set(&o.Decide, defaultDecide)
	set(&o.Fetch, defaultFetch)
	set(&o.Remember, defaultRemember)
	set(&o.Linger, defaultLinger)
	if o.PlaneName == "" {
		o.PlaneName = "fuse"
	}
	if o.Identity == nil {
		o.Identity = func(string, string) string { return "" }
	}
	if o.Tracer == nil {
		o.Tracer = noop.NewTracerProvider().Tracer("")
	}
	if o.wholeTable == 0 {
		o.wholeTable = wholeTableSize
	}
	if o.Platform.OS == "" {
		o.Platform = oci.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// Open opens the state in opts.Root, adopts the mounts that an earlier process
// left, and declares the plane ready. What can't be adopted is logged.
//
// At most one Manager may be open on a directory; the caller sees to that.
func Open(ctx context.Context, opts Options) (*Manager, error) {
	opts = opts.withDefaults()
	m := &Manager{
		opts: opts, log: opts.Log,
		fills:     make(chan oci.Digest, maxQueuedFills),
		expecting: make(chan struct{}, maxExpected),
		garbage:   make(chan struct{}, 1),
		shared:    make(devicesByKey),

		images: make(map[oci.Digest]*image),
		known:  make(map[subject]oci.Digest),
		calls:  make(map[subject]*call),
		claims: make(map[string]*claim),

		streaming: make(map[string]bool),
		mute:      make(map[string]time.Time),
	}
	m.ledger = NewLedger(m.logOutcome)
	var err error
	if m.opts.Root, err = durable.Directory(opts.Root, imagesName, mountsName, claimsName); err != nil {
		return nil, fmt.Errorf("mount manager's directory: %w", err)
	}
	if err := m.load(); err != nil {
		return nil, fmt.Errorf("read the images of %s: %w", opts.Root, err)
	}
	m.background = background.New()
	if err := m.adopt(ctx); err != nil {
		m.background.Stop()
		return nil, fmt.Errorf("adopt the mounts of %s: %w", opts.Root, err)
	}
	opts.Plane.Ready()
	m.loadClaims(ctx)
	m.background.Go(m.fillLoop)
	m.background.Go(m.sweepLoop)
	m.background.Go(m.tidyLoop)
	m.resumeFills(ctx)
	return m, nil
}

// Close ends background work and gives the cache's layers back. All mounts
// stay, so that containers go on; the next process adopts them.
func (m *Manager) Close() error {
	m.background.Stop()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, img := range m.images {
		for _, p := range img.points {
			p.releaseLayers()
		}
	}
	return nil
}

// Settled tells the Manager that every owner has attached again after a start.
// From then on it collects what nobody owns.
func (m *Manager) Settled() {
	m.mu.Lock()
	m.settled = true
	m.mu.Unlock()
	m.opts.Cache.Settled(m.needs)
}

// The directories in the Manager's.
const (
	imagesName = "images"
	mountsName = "m" // where images are mounted; short: mount options have many
	claimsName = "claims"
)

func (m *Manager) imagesDir() string { return filepath.Join(m.opts.Root, imagesName) }
func (m *Manager) mountsDir() string { return filepath.Join(m.opts.Root, mountsName) }
func (m *Manager) claimsDir() string { return filepath.Join(m.opts.Root, claimsName) }

// Hold keeps an image's state, and the content of its lowest layers up to the
// given one, from 0, for owner until Release.
func (m *Manager) Hold(_ context.Context, id oci.Digest, layer int, owner string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	img, ok := m.images[id]
	if !ok {
		return fmt.Errorf("image %s: %w", id, ErrUnknownImage)
	}
	img.holders[owner] = layer + 1
	img.removed = img.removed && img.held() < len(img.manifest.Layers)
	return nil
}

// Release gives up all that owner holds and has attached. What nobody else
// needs lingers for a while, or until Collect. An owner that has nothing is
// fine.
func (m *Manager) Release(_ context.Context, owner string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for _, img := range m.images {
		if img.holders[owner] > 0 {
			delete(img.holders, owner)
			img.used, img.removed = now, img.held() < len(img.manifest.Layers)
		}
		for _, p := range img.points {
			if p.owners[owner] {
				delete(p.owners, owner)
				p.used, img.used = now, now
			}
		}
	}
	return nil
}

// ErrUnknownImage: no image of this digest was pulled, or it's gone.
var ErrUnknownImage = errors.New("not an image of this node")

// removeTemp removes files and directories that a crash left half made in dir.
func removeTemp(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if durable.IsTemp(e.Name()) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}
