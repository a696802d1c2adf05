package teleport

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"sluice/internal/convert"
	"sluice/internal/index"
	"sluice/internal/operation"
	"sluice/internal/stored"
	"sluice/oci"
)

// Options says how a Service works.
type Options struct {
	// Directory is where disks are kept: the one that a file server shares.
	Directory string

	// Workers is how many images are expanded at once; default 1.
	Workers int

	// MaxRepositories is how many repositories may take part; default 10.
	MaxRepositories int

	// Auto has a repository take part as soon as something is pushed to it, while
	// fewer than MaxRepositories do: also one that was switched off by hand, as in
	// Azure Container Registry. The registry must have stored.Options.ExpandAll.
	Auto bool

	// MaxLayer and MaxImage bound what a layer and an image may take when they are
	// expanded, in bytes; default 16 and 100 GiB.
	MaxLayer, MaxImage int64

	// Log gets what becomes of expansions. Nil: no log.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.Workers <= 0 {
		o.Workers = 1
	}
	if o.MaxRepositories <= 0 {
		o.MaxRepositories = 10
	}
	if o.MaxLayer <= 0 {
		o.MaxLayer = 16 << 30
	}
	if o.MaxImage <= 0 {
		o.MaxImage = 100 << 30
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// Service expands images of a registry. Use New. Its methods may be called
// concurrently; any number of processes may have one on the same index, if they
// have the same directory.
type Service struct {
	registry *stored.Registry
	db       *index.DB
	opts     Options
	share    share
	ops      *operation.Runner
	pause    time.Duration // between looks whether somebody has finished a layer

	expanded, reused atomic.Int64 // layers, of this process
}

// New returns a service for the registry whose index is db. The registry must have
// stored.Options.Expand. The directory is made if it isn't there.
func New(reg *stored.Registry, db *index.DB, opts Options) (*Service, error) {
	return newService(reg, db, opts, operation.DefaultTiming())
}

func newService(reg *stored.Registry, db *index.DB, opts Options, timing operation.Timing) (*Service, error) {
	s := &Service{registry: reg, db: db, opts: opts.withDefaults(), share: share{opts.Directory}, pause: timing.Poll / 2}
	if err := s.share.makePool(); err != nil {
		return nil, fmt.Errorf("directory of Teleport's disks: %w", err)
	}
	s.ops = operation.New(db, operation.Options{
		Queues: stored.ExpandQueues, Noun: "Expansion", Workers: s.opts.Workers,
		Do: s.do, Permanent: permanent, Gone: s.gone, Ended: s.ended, Timing: timing, Log: s.opts.Log,
	})
	return s, nil
}

// gone reports whether an image was deleted.
func (s *Service) gone(ctx context.Context, repo string, subject oci.Digest) bool {
	_, err := s.registry.Manifest(ctx, repo, subject)
	return errors.Is(err, oci.ErrManifestUnknown) || errors.Is(err, oci.ErrNameUnknown)
}

// ended has removed what an expansion has made that came to nothing.
func (s *Service) ended(ctx context.Context, repo string) {
	if err := s.enqueue(ctx, repo, ""); err != nil {
		s.opts.Log.Warn("the disks of an expansion that came to nothing are removed later", "repository", repo, "error", err)
	}
}

// Run expands what is in the queues until ctx ends, and returns when the
// expansions under way have stopped; another process, or the next one, takes them
// up again.
func (s *Service) Run(ctx context.Context) { s.ops.Run(ctx) }

// Change changes the attributes of a repository as
// stored.Registry.SetRepositoryAttributes does, and heeds how many repositories
// may take part. One that takes part no longer loses its disks; images that are
// there when it begins to are expanded when they are pushed again, or by Start.
//
// Errors: oci.ErrDenied if there are too many, and those of
// SetRepositoryAttributes.
func (s *Service) Change(ctx context.Context, repo string, set func(*index.Attributes) error) (index.Repository, error) {
	unlock, err := s.db.PollExclude(ctx, "teleport repositories", s.pause)
	if err != nil {
		return index.Repository{}, err
	}
	defer unlock()
	others, err := s.enabled(ctx, repo)
	if err != nil {
		return index.Repository{}, err
	}
	before := false
	row, err := s.registry.SetRepositoryAttributes(ctx, repo, func(a *index.Attributes) error {
		before = a.TeleportEnabled
		if err := set(a); err != nil {
			return err
		}
		if a.TeleportEnabled && !before && len(others) >= s.opts.MaxRepositories {
			return oci.ErrDenied.Withf("%d repositories have teleportEnabled, which is as many as may have it (teleport.max_repositories): set it to false for another one first, such as %s", len(others), others[0])
		}
		return nil
	})
	if err == nil && before && !row.TeleportEnabled {
		err = s.enqueue(ctx, repo, "")
	}
	return row, err
}

func (s *Service) enqueue(ctx context.Context, repo string, digest oci.Digest) error {
	err := s.db.Update(ctx, func(tx *index.Tx) error {
		return stored.EnqueueExpansion(tx, repo, digest, stored.Expansion{Actor: oci.ActorOf(ctx)})
	})
	s.ops.Wake()
	return err
}

// enabled returns the repositories that take part, but for one.
func (s *Service) enabled(ctx context.Context, but string) ([]string, error) {
	const page = 500
	var names []string
	for last := ""; ; {
		list, err := s.db.Repositories(ctx, index.RepositoryQuery{Last: last, N: page, All: true})
		if err != nil {
			return nil, err
		}
		for _, r := range list {
			last = r.Name
			if r.TeleportEnabled && r.Name != but {
				names = append(names, r.Name)
			}
		}
		if len(list) < page {
			return names, nil
		}
	}
}

// Enabled returns the names of the repositories that take part.
func (s *Service) Enabled(ctx context.Context) ([]string, error) { return s.enabled(ctx, "") }

// takesPart reports whether a repository takes part, and why not. With
// Options.Auto it does from now on if it may.
func (s *Service) takesPart(ctx context.Context, repo string) (ok bool, why string, err error) {
	row, err := s.registry.Repository(ctx, repo)
	if err != nil || row.TeleportEnabled {
		return err == nil, "", err
	}
	const off = "the repository's teleportEnabled is false"
	if !s.opts.Auto {
		return false, off, nil
	}
	_, err = s.Change(ctx, repo, func(a *index.Attributes) error { a.TeleportEnabled = true; return nil })
	if errors.Is(err, oci.ErrDenied) {
		return false, off + ", and as many others as may have it have it", nil
	}
	return err == nil, "", err
}

// What has become of an image.
const (
	Ready     = "ready"     // all its layers have disks
	Expanding = "expanding" // it is waiting to be expanded, or that is under way
	Failed    = "failed"    // it can't be expanded
	Absent    = "absent"    // it was pushed before its repository took part, or its expansion has ended without: see Start
)

// State is what has become of an image's layers.
type State struct {
	Status string
	Image  convert.Image

	// Disks are those of the layers, the lowest first, if the image is Ready.
	Disks []Disk

	// Operation is the last one on the image, if there was one lately.
	Operation operation.Operation
}

// ErrNotEnabled is the error for repositories that don't take part.
var ErrNotEnabled = &oci.Error{Code: "TELEPORT_NOT_ENABLED", Message: "Teleport is not enabled"}

func notEnabled(repo string) error {
	return ErrNotEnabled.Withf("Teleport is not enabled for %s: set its teleportEnabled to true with PATCH /acr/v1/%s, and its images are expanded", repo, repo)
}

// Find returns what has become of the image that a digest or tag names; of an
// index, of the image for the platform.
//
// Errors: ErrNotEnabled, oci.ErrManifestUnknown and oci.ErrNameUnknown, and those
// of package convert for what is no image that could be expanded.
func (s *Service) Find(ctx context.Context, repo, reference string, platform oci.Platform) (State, error) {
	row, err := s.registry.Repository(ctx, repo)
	if err != nil {
		return State{}, err
	}
	if !row.TeleportEnabled {
		if state, joins := s.joining(ctx, repo, reference, platform); joins {
			return state, nil
		}
		return State{}, notEnabled(repo)
	}
	img, err := s.image(ctx, repo, reference, platform)
	if err != nil {
		return State{}, err
	}
	state := State{Image: img, Status: Ready}
	// Before the disks: what ends after this has ended with its disks there.
	switch op, err := s.ops.Latest(ctx, repo, img.Manifest.Digest); {
	case err == nil:
		state.Operation = op
	case !errors.Is(err, operation.ErrUnknown):
		return State{}, err
	}
	if state.Disks, err = s.disks(repo, img); err != nil {
		return State{}, err
	}
	if len(state.Disks) == 0 {
		state.Status = Absent
		switch state.Operation.Status {
		case operation.StatusNotStarted, operation.StatusRunning:
			state.Status = Expanding
		case operation.StatusFailed:
			if !passed(state.Operation) {
				state.Status = Failed
			}
		}
	}
	return state, nil
}

// passed reports whether the reason why an operation has failed may have passed, such
// as a share that was full.
func passed(op operation.Operation) bool {
	return op.ErrorCode == operation.CodeUnknown && time.Since(op.Updated) > 10*time.Minute
}

// joining reports whether a repository may take part as soon as an image of it is
// looked at, which waits for that. What goes wrong is the same to its clients as that
// it doesn't.
func (s *Service) joining(ctx context.Context, repo, reference string, platform oci.Platform) (State, bool) {
	if !s.opts.Auto {
		return State{}, false
	}
	img, err := s.image(ctx, repo, reference, platform)
	if err != nil {
		return State{}, false
	}
	op, err := s.ops.Latest(ctx, repo, img.Manifest.Digest)
	return State{Status: Expanding, Image: img, Operation: op}, err == nil && (op.Status == operation.StatusNotStarted || op.Status == operation.StatusRunning)
}

// disks returns the disks of an image, or none if one is missing.
func (s *Service) disks(repo string, img convert.Image) ([]Disk, error) {
	var all []Disk
	for i := range img.Layers {
		d, ok, err := findLayer(s.share.layers(repo), img, i)
		if err != nil || !ok {
			return nil, err
		}
		all = append(all, d)
	}
	return all, nil
}

// image returns the image that a reference means for a platform.
func (s *Service) image(ctx context.Context, repo, reference string, platform oci.Platform) (convert.Image, error) {
	m, err := s.registry.GetManifest(ctx, repo, reference)
	if err != nil {
		return convert.Image{}, err
	}
	opts := convert.Options{Platforms: []oci.Platform{platform}}
	if !oci.IsIndex(m.Descriptor.MediaType) {
		opts.Platforms = nil // whoever names an image means it
	}
	images, err := convert.Images(ctx, s.registry, repo, m.Descriptor.Digest.String(), opts)
	if err != nil {
		return convert.Image{}, err
	}
	return images[0], nil
}

// Start has an image or index expanded that a digest or tag names, also one whose
// expansion has failed or was canceled, and returns the operation; if one is under way,
// that.
//
// Errors: ErrNotEnabled, and those of package convert for what is no image that could
// be expanded.
func (s *Service) Start(ctx context.Context, repo, reference string) (operation.Operation, error) {
	checked, err := convert.Check(ctx, s.registry, repo, reference, convert.Options{})
	if err != nil {
		return operation.Operation{}, err
	}
	row, err := s.registry.Repository(ctx, repo)
	if err == nil && !row.TeleportEnabled && !s.opts.Auto {
		err = notEnabled(repo)
	}
	if err != nil {
		return operation.Operation{}, err
	}
	return s.ops.Start(ctx, repo, checked.Subject.Digest, stored.Expansion{Actor: oci.ActorOf(ctx)})
}

// Latest returns the last operation on an image or index, by its digest. Errors:
// operation.ErrUnknown.
func (s *Service) Latest(ctx context.Context, repo string, subject oci.Digest) (operation.Operation, error) {
	return s.ops.Latest(ctx, repo, subject)
}

// Operations returns the last n operations on images of a repository, the newest
// first.
func (s *Service) Operations(ctx context.Context, repo string, n int) ([]operation.Operation, error) {
	return s.ops.Operations(ctx, repo, n)
}

// Operation returns an operation of a repository. Errors: operation.ErrUnknown.
func (s *Service) Operation(ctx context.Context, repo, id string) (operation.Operation, error) {
	return s.ops.Operation(ctx, repo, id)
}

// Cancel cancels an operation, unless it has ended; the disks that it has made are
// removed, as far as nothing else needs them. Errors: operation.ErrUnknown.
func (s *Service) Cancel(ctx context.Context, repo, id string) (operation.Operation, error) {
	op, err := s.ops.Cancel(ctx, repo, id)
	if err == nil && op.Status == operation.StatusCanceled {
		s.ended(ctx, repo)
	}
	return op, err
}

// Export tells of the service by numbers that are asked for when they are wanted.
func (s *Service) Export(gauge, counter func(name, help string, value func() float64)) {
	s.ops.Export(gauge, counter)
	counter("sluice_layers_expanded_total", "Layers expanded here.", func() float64 { return float64(s.expanded.Load()) })
	counter("sluice_layers_expanded_before_total", "Layers that had been expanded before.", func() float64 { return float64(s.reused.Load()) })
}

// count counts a layer.
func (s *Service) count(isNew bool, err error) {
	switch {
	case err != nil:
	case isNew:
		s.expanded.Add(1)
	default:
		s.reused.Add(1)
	}
}
