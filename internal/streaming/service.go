package streaming

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"sluice/internal/convert"
	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

// ErrOperationUnknown is the error for operations that don't exist, or ended
// long ago.
var ErrOperationUnknown = &oci.Error{Code: "OPERATION_UNKNOWN", Message: "the specified operation does not exist"}

// codeUnknown is Azure Container Registry's code for what went wrong inside.
const codeUnknown = "UNKNOWN_ERROR"

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
	timing    timing

	wake chan struct{} // tells Run of this process of a new job; holds one element at most

	mu      sync.Mutex // guards running
	running map[string]context.CancelCauseFunc

	succeeded, failed, canceled, retried atomic.Int64 // conversions of this process
	converted, reused                    atomic.Int64 // layers
}

// timing is how long things may take.
type timing struct {
	lease time.Duration // after which somebody else takes a dead worker's job up
	beat  time.Duration // between extensions of a lease
	poll  time.Duration // between looks into the queues, when they were empty
	pause time.Duration // after the first failure; then twice as long each time
	layer time.Duration // between looks whether somebody has finished a layer
}

// New returns a service for the registry whose index is db.
func New(reg *stored.Registry, db *index.DB, opts Options) *Service {
	if opts.Workers <= 0 {
		opts.Workers = 2
	}
	if opts.Layers <= 0 {
		opts.Layers = 2
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	return &Service{
		registry: reg, generator: reg.Generator(), db: db, opts: opts,
		timing:  timing{lease: 15 * time.Second, beat: 2 * time.Second, poll: 2 * time.Second, pause: 5 * time.Second, layer: time.Second},
		wake:    make(chan struct{}, 1),
		running: make(map[string]context.CancelCauseFunc),
	}
}

// The states of an operation, as Azure Container Registry has them. The last
// three are final.
const (
	StatusNotStarted = "NotStarted"
	StatusRunning    = "Running"
	StatusSucceeded  = "Succeeded"
	StatusFailed     = "Failed"
	StatusCanceled   = "Canceled"
)

// Operation is a conversion, or another thing that was asked for.
type Operation struct {
	ID, Repo         string
	Subject          oci.Digest // what is converted; empty: the setting of the repository was changed
	Status           string
	Started, Updated time.Time
	Progress         int    // percent
	Details          string // for people
	ErrorCode        string // if it failed
}

// Start has an image converted that a tag or digest names. If that is going on
// already, it returns the operation that does it. What can't be converted is an
// error with one of package convert's codes.
func (s *Service) Start(ctx context.Context, repo, reference string) (Operation, error) {
	checked, err := convert.Check(ctx, s.generator, repo, reference, convert.Options{Platforms: s.opts.Platforms})
	if err != nil {
		return Operation{}, err
	}
	digest := checked.Subject.Digest
	job, err := s.latest(ctx, repo, digest)
	if err != nil && !errors.Is(err, ErrOperationUnknown) {
		return Operation{}, err
	}
	if err == nil && active(job) && !job.Canceling {
		return operation(repo, job), nil
	}
	err = s.db.Update(ctx, func(tx *index.Tx) error {
		c := stored.Conversion{Actor: oci.ActorOf(ctx)}
		if err == nil && active(job) { // behind the one that is being canceled
			payload, err := json.Marshal(c)
			tx.Enqueue(stored.ConvertQueue(repo), digest.String(), payload)
			return err
		}
		return stored.EnqueueConversion(tx, repo, digest, c)
	})
	if err != nil {
		return Operation{}, err
	}
	s.notify()
	return s.Latest(ctx, repo, digest)
}

// Latest returns the last operation on an image or index, by its digest. Errors:
// ErrOperationUnknown.
func (s *Service) Latest(ctx context.Context, repo string, subject oci.Digest) (Operation, error) {
	job, err := s.latest(ctx, repo, subject)
	return operation(repo, job), err
}

func (s *Service) latest(ctx context.Context, repo string, subject oci.Digest) (index.Job, error) {
	job, err := s.db.LatestJob(ctx, stored.ConvertQueue(repo), subject.String())
	return job, unknown(err, "nothing was converted for %s@%s lately", repo, subject)
}

// Operation returns an operation of a repository. Errors: ErrOperationUnknown.
func (s *Service) Operation(ctx context.Context, repo, id string) (Operation, error) {
	job, err := s.job(ctx, repo, id)
	return operation(repo, job), err
}

func (s *Service) job(ctx context.Context, repo, id string) (index.Job, error) {
	job, err := s.db.Job(ctx, id)
	if err == nil && job.Queue != stored.ConvertQueue(repo) {
		err = index.ErrNotFound
	}
	return job, unknown(err, "operation %.60s of %s does not exist, or ended long ago", id, repo)
}

func unknown(err error, format string, args ...any) error {
	if errors.Is(err, index.ErrNotFound) {
		return ErrOperationUnknown.Withf("the specified operation does not exist: "+format, args...)
	}
	return err
}

// Cancel cancels an operation, unless it has ended. A worker that is at it in
// this process stops at once, one of another within seconds.
//
// Errors: ErrOperationUnknown.
func (s *Service) Cancel(ctx context.Context, repo, id string) (Operation, error) {
	job, err := s.job(ctx, repo, id)
	if err != nil {
		return Operation{}, err
	}
	if active(job) {
		job, err = s.db.CancelJob(ctx, id)
		if err != nil {
			return Operation{}, unknown(err, "operation %.60s of %s ended long ago", id, repo)
		}
		s.mu.Lock()
		stop := s.running[id]
		s.mu.Unlock()
		if stop != nil {
			stop(index.ErrCanceled)
		}
	}
	return operation(repo, job), nil
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
	s.notify()
	return s.Operation(ctx, repo, id)
}

// setting is the payload of a job without a key: a change of the repository's
// setting, which is there to be asked for, and a back-fill if that was wanted.
type setting struct {
	stored.Conversion
	Backfill bool `json:"backfill"`
}

// notify tells Run that there is a new job.
func (s *Service) notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func active(job index.Job) bool { return job.State == index.Queued || job.State == index.Running }

// progress is what a worker tells of a job under way.
type progress struct {
	Percent  int    `json:"percent"`
	Failures int    `json:"failures,omitempty"` // attempts that failed
	Failure  string `json:"failure,omitempty"`  // why the last of them did
}

// outcome is the result of a job that has ended.
type outcome struct {
	Code    string `json:"code,omitempty"`
	Message string `json:"message,omitempty"`
}

// operation describes a job. Progress and result that can't be read are those of
// no worker, and left out.
func operation(repo string, job index.Job) Operation {
	op := Operation{ID: job.ID, Repo: repo, Subject: oci.Digest(job.Key), Started: job.Created, Updated: job.Updated}
	var p progress
	var end outcome
	_ = json.Unmarshal(job.Progress, &p)
	_ = json.Unmarshal(job.Result, &end)
	op.Progress, op.ErrorCode = p.Percent, end.Code
	resource, verb := repo+"@"+job.Key, "started"
	if job.Key == "" {
		resource = repo
	}
	switch {
	case job.State == index.Succeeded:
		op.Status, op.Progress, verb = StatusSucceeded, 100, "succeeded"
	case job.State == index.Failed:
		op.Status, verb = StatusFailed, "failed"
	case job.State == index.Canceled || job.Canceling:
		op.Status, verb = StatusCanceled, "canceled"
	case job.State == index.Queued && job.Attempts == 0:
		op.Status = StatusNotStarted
	default:
		op.Status = StatusRunning
		if p.Percent > 0 {
			verb = "ongoing"
		}
		if p.Failure != "" {
			end.Message = fmt.Sprintf("attempt %d failed and it is tried again: %s", p.Failures, p.Failure)
		}
	}
	op.Details = fmt.Sprintf("Conversion %s for resource %s", verb, resource)
	if end.Message != "" {
		op.Details += ": " + end.Message
	}
	var set setting
	if job.Key == "" && json.Unmarshal(job.Payload, &set) == nil && !set.Backfill {
		op.Status, op.Progress, op.Details = StatusSucceeded, 100, "Setting changed for resource "+repo // before there was a job
	}
	return op
}

// Export tells of the service by numbers that are asked for when they are wanted.
func (s *Service) Export(gauge, counter func(name, help string, value func() float64)) {
	jobs := func(choose func(queued, running int) int) func() float64 {
		return func() float64 {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			queued, running, err := s.db.CountJobs(ctx, stored.ConvertQueues)
			if err != nil {
				return -1
			}
			return float64(choose(queued, running))
		}
	}
	gauge("sluice_conversions_queued", "Conversions waiting, of all replicas; -1 if the index can't be asked.", jobs(func(queued, _ int) int { return queued }))
	gauge("sluice_conversions_running", "Conversions under way, of all replicas; -1 if the index can't be asked.", jobs(func(_, running int) int { return running }))
	for _, n := range []struct {
		name, help string
		value      *atomic.Int64
	}{
		{"sluice_conversions_succeeded_total", "Conversions that succeeded here, also those that found everything done.", &s.succeeded},
		{"sluice_conversions_failed_total", "Conversions that failed here for good.", &s.failed},
		{"sluice_conversions_canceled_total", "Conversions that were canceled here, or whose image was deleted.", &s.canceled},
		{"sluice_conversions_retried_total", "Attempts that failed here and are made again.", &s.retried},
		{"sluice_layers_converted_total", "Layers converted here.", &s.converted},
		{"sluice_layers_reused_total", "Layers that had been converted before.", &s.reused},
	} {
		counter(n.name, n.help, func() float64 { return float64(n.value.Load()) })
	}
}
