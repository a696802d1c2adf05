package streaming

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"sluice/internal/convert"
	"sluice/internal/index"
	"sluice/internal/operation"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

// ErrOperationUnknown is the error for operations that don't exist, or ended
// long ago.
var ErrOperationUnknown = operation.ErrUnknown

// Options says how a Service works. The zero value is ready for use.
type Options struct {
	// Workers is how many images are converted at once, and Layers how many
	// layers of each; defaults 2 and 2. A layer takes about 20 MiB of memory, and
	// an image that of its files' names.
	Workers, Layers int

	// Platforms, if not empty, are the only ones that are converted.
	Platforms []oci.Platform

	// Store is where converted layers are written down; nil: they aren't, and
	// each is converted with every image that has it.
	Store storage.Store

	// Log gets what becomes of conversions. Nil: no log.
	Log *slog.Logger
}

// Service converts images of a registry. Use New. Its methods may be called
// concurrently; any number of processes may have one on the same index.
type Service struct {
	registry  *stored.Registry
	generator oci.Registry // the registry, as conversions see it
	db        *index.DB
	opts      Options
	ops       *operation.Runner
	pause     time.Duration // between looks whether somebody has finished a layer

	converted, reused atomic.Int64 // layers, of this process
}

// New returns a service for the registry whose index is db.
func New(reg *stored.Registry, db *index.DB, opts Options) *Service {
	return newService(reg, db, opts, operation.DefaultTiming())
}

func newService(reg *stored.Registry, db *index.DB, opts Options, timing operation.Timing) *Service {
	if opts.Workers <= 0 {
		opts.Workers = 2
	}
	if opts.Layers <= 0 {
		opts.Layers = 2
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	s := &Service{registry: reg, generator: reg.Generator(), db: db, opts: opts, pause: timing.Poll / 2}
	s.ops = operation.New(db, operation.Options{
		Queues: stored.ConvertQueues, Noun: "Conversion", Workers: opts.Workers,
		Do: s.do, Permanent: permanent, Gone: s.gone, Describe: describe, Timing: timing, Log: opts.Log,
	})
	return s
}

// gone reports whether an image was deleted.
func (s *Service) gone(ctx context.Context, repo string, subject oci.Digest) bool {
	_, err := s.registry.Manifest(ctx, repo, subject)
	return errors.Is(err, oci.ErrManifestUnknown) || errors.Is(err, oci.ErrNameUnknown)
}

// Operation is a conversion, or a change of a repository's setting; then it has
// no subject.
type Operation = operation.Operation

// Run converts what is in the queues until ctx ends, and returns when the
// conversions under way have stopped; another process, or the next one, takes
// them up again.
func (s *Service) Run(ctx context.Context) { s.ops.Run(ctx) }

// Start has an image converted that a tag or digest names. If that is going on
// already, it returns the operation that does it. What can't be converted is an
// error with one of package convert's codes.
func (s *Service) Start(ctx context.Context, repo, reference string) (Operation, error) {
	checked, err := convert.Check(ctx, s.generator, repo, reference, convert.Options{Platforms: s.opts.Platforms})
	if err != nil {
		return Operation{}, err
	}
	return s.ops.Start(ctx, repo, checked.Subject.Digest, stored.Conversion{Actor: oci.ActorOf(ctx)})
}

// Latest returns the last operation on an image or index, by its digest. Errors:
// ErrOperationUnknown.
func (s *Service) Latest(ctx context.Context, repo string, subject oci.Digest) (Operation, error) {
	return s.ops.Latest(ctx, repo, subject)
}

// Operations returns the last n operations on images of a repository, the newest
// first.
func (s *Service) Operations(ctx context.Context, repo string, n int) ([]Operation, error) {
	return s.ops.Operations(ctx, repo, n)
}

// Operation returns an operation of a repository. Errors: ErrOperationUnknown.
func (s *Service) Operation(ctx context.Context, repo, id string) (Operation, error) {
	return s.ops.Operation(ctx, repo, id)
}

// Cancel cancels an operation, unless it has ended. A worker that is at it in
// this process stops at once, one of another within seconds.
//
// Errors: ErrOperationUnknown.
func (s *Service) Cancel(ctx context.Context, repo, id string) (Operation, error) {
	return s.ops.Cancel(ctx, repo, id)
}

// SetEnabled switches on or off that a repository's images are converted when
// they are pushed. With backfill, those that are there already and have a tag are
// converted as well. Errors: oci.ErrNameUnknown.
func (s *Service) SetEnabled(ctx context.Context, repo string, enabled, backfill bool) (Operation, error) {
	_, err := s.registry.SetRepositoryAttributes(ctx, repo, func(a *index.Attributes) error {
		a.StreamingEnabled = enabled
		return nil
	})
	if err != nil {
		return Operation{}, err
	}
	payload, err := json.Marshal(setting{Conversion: stored.Conversion{Actor: oci.ActorOf(ctx)}, Backfill: backfill})
	if err != nil {
		return Operation{}, err
	}
	var id string
	err = s.db.Update(ctx, func(tx *index.Tx) error {
		id = tx.Enqueue(stored.ConvertQueue(repo), "", payload)
		return nil
	})
	if err != nil {
		return Operation{}, err
	}
	s.ops.Wake()
	return s.Operation(ctx, repo, id)
}

// setting is the payload of a job without a key: a change of the repository's
// setting, which is there to be asked for, and a back-fill if that was wanted.
type setting struct {
	stored.Conversion
	Backfill bool `json:"backfill"`
}

// describe describes a change of the setting, which was done before there was a
// job.
func describe(op *Operation, job index.Job) {
	var set setting
	if job.Key == "" && json.Unmarshal(job.Payload, &set) == nil && !set.Backfill {
		op.Status, op.Progress, op.Details = operation.StatusSucceeded, 100, "Setting changed for resource "+op.Repo
	}
}

// Export tells of the service by numbers that are asked for when they are wanted.
func (s *Service) Export(gauge, counter func(name, help string, value func() float64)) {
	s.ops.Export(gauge, counter)
	counter("sluice_layers_converted_total", "Layers converted here.", func() float64 { return float64(s.converted.Load()) })
	counter("sluice_layers_reused_total", "Layers that had been converted before.", func() float64 { return float64(s.reused.Load()) })
}
