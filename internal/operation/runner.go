package operation

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sluice/internal/index"
	"sluice/oci"
)

// Options says what a Runner does. All fields without "may" must be set.
type Options struct {
	// Queues begins the names of the queues, as in "convert/": the repository's
	// name comes behind it.
	Queues string

	// Noun is what an operation is called where one is described: "Conversion".
	Noun string

	// Workers is how many jobs are done at once.
	Workers int

	// Do does a job, and returns what is to be said of it, if anything. It must
	// stop soon when its context ends, and may be called for one job several
	// times, one after the other: what it does must be repeatable.
	Do func(context.Context, *Work) (message string, err error)

	// Permanent returns the code of an error that will be the same the next time,
	// or nothing.
	Permanent func(error) string

	// Gone reports whether what a job is about was deleted.
	Gone func(ctx context.Context, repo string, subject oci.Digest) bool

	// Ended, which may be nil, is called when an operation on an image has failed for
	// good or was canceled while it was being done.
	Ended func(ctx context.Context, repo string)

	// Describe may change how a job is described.
	Describe func(*Operation, index.Job)

	// Timing is how long things may take: DefaultTiming, but in tests.
	Timing Timing

	Log *slog.Logger
}

// Timing is how long things may take.
type Timing struct {
	Lease time.Duration // after which somebody else takes a dead worker's job up
	Beat  time.Duration // between extensions of a lease
	Poll  time.Duration // between looks into the queues, when they were empty
	Pause time.Duration // after the first failure; then twice as long each time
}

// DefaultTiming is that of servers.
func DefaultTiming() Timing {
	return Timing{Lease: 15 * time.Second, Beat: 2 * time.Second, Poll: 2 * time.Second, Pause: 5 * time.Second}
}

// Runner answers for the operations of one kind, and does them. Use New. Its
// methods may be called concurrently; any number of processes may have one on the
// same index.
type Runner struct {
	db   *index.DB
	opts Options
	wake chan struct{} // tells Run of this process of a new job; holds one element at most

	mu      sync.Mutex // guards running
	running map[string]context.CancelCauseFunc

	// Counts are of this process.
	Counts struct{ Succeeded, Failed, Canceled, Retried atomic.Int64 }
}

// New returns a runner of the jobs of db.
func New(db *index.DB, opts Options) *Runner {
	return &Runner{db: db, opts: opts, wake: make(chan struct{}, 1), running: make(map[string]context.CancelCauseFunc)}
}

// Queue returns the name of a repository's queue.
func (r *Runner) Queue(repo string) string { return r.opts.Queues + repo }

// Run does what is in the queues until ctx ends, and returns when the jobs under
// way have stopped; another process, or the next one, takes them up again.
func (r *Runner) Run(ctx context.Context) {
	last := ""
	index.Worker{
		Slots: r.opts.Workers, Poll: r.opts.Timing.Poll, Wake: r.wake,
		Next:   func(ctx context.Context) ([]index.Job, error) { return r.next(ctx, &last) },
		Do:     r.run,
		Failed: func(err error) { r.opts.Log.Error("look for operations", "queues", r.opts.Queues, "error", err) },
	}.Run(ctx)
}

// next leases a job of the first queue behind the last one that has any.
func (r *Runner) next(ctx context.Context, last *string) ([]index.Job, error) {
	for wrapped := *last == ""; ; {
		queue, err := r.db.NextQueue(ctx, r.opts.Queues, *last)
		if err != nil || queue == "" && wrapped {
			*last = queue
			return nil, err
		}
		*last = queue
		if queue == "" {
			wrapped = true
			continue
		}
		if jobs, err := r.db.Lease(ctx, queue, 1, r.opts.Timing.Lease); err != nil || len(jobs) > 0 {
			return jobs, err
		}
	}
}

// Wake tells Run that there is a new job.
func (r *Runner) Wake() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Start begins an operation on an image or index, whose job gets the payload, and
// returns it; if one is under way, that. It begins behind one that is just being
// canceled.
func (r *Runner) Start(ctx context.Context, repo string, subject oci.Digest, payload any) (Operation, error) {
	doc, err := json.Marshal(payload)
	if err != nil {
		return Operation{}, err
	}
	job, err := r.latestJob(ctx, repo, subject)
	if err != nil && !errors.Is(err, ErrUnknown) {
		return Operation{}, err
	}
	enqueue := (*index.Tx).EnqueueOnce
	if err == nil && active(job) {
		if !job.Canceling {
			return r.describe(repo, job), nil
		}
		enqueue = func(tx *index.Tx, queue, key string, payload []byte) { tx.Enqueue(queue, key, payload) }
	}
	err = r.db.Update(ctx, func(tx *index.Tx) error {
		enqueue(tx, r.Queue(repo), subject.String(), doc)
		return nil
	})
	if err != nil {
		return Operation{}, err
	}
	r.Wake()
	return r.Latest(ctx, repo, subject)
}

// Latest returns the last operation about an image or index, by its digest.
// Errors: ErrUnknown.
func (r *Runner) Latest(ctx context.Context, repo string, subject oci.Digest) (Operation, error) {
	job, err := r.latestJob(ctx, repo, subject)
	return r.describe(repo, job), err
}

// latestJob is Latest for the job behind it.
func (r *Runner) latestJob(ctx context.Context, repo string, subject oci.Digest) (index.Job, error) {
	job, err := r.db.LatestJob(ctx, r.Queue(repo), subject.String())
	return job, unknown(err, "there was no %s of %s@%s lately", strings.ToLower(r.opts.Noun), repo, subject)
}

// Operations returns the last n operations on images of a repository, the newest
// first.
func (r *Runner) Operations(ctx context.Context, repo string, n int) ([]Operation, error) {
	jobs, err := r.db.Jobs(ctx, r.Queue(repo), n)
	if err != nil {
		return nil, err
	}
	var all []Operation
	for _, job := range jobs {
		all = append(all, r.describe(repo, job))
	}
	return all, nil
}

// Operation returns an operation of a repository. Errors: ErrUnknown.
func (r *Runner) Operation(ctx context.Context, repo, id string) (Operation, error) {
	job, err := r.job(ctx, repo, id)
	return r.describe(repo, job), err
}

func (r *Runner) job(ctx context.Context, repo, id string) (index.Job, error) {
	job, err := r.db.Job(ctx, id)
	if err == nil && job.Queue != r.Queue(repo) {
		err = index.ErrNotFound
	}
	return job, unknown(err, "operation %.60s of %s does not exist, or ended long ago", id, repo)
}

func unknown(err error, format string, args ...any) error {
	if errors.Is(err, index.ErrNotFound) {
		return ErrUnknown.Withf("the specified operation does not exist: "+format, args...)
	}
	return err
}

// Cancel cancels an operation, unless it has ended. A worker that is at it in
// this process stops at once, one of another within seconds.
//
// Errors: ErrUnknown.
func (r *Runner) Cancel(ctx context.Context, repo, id string) (Operation, error) {
	job, err := r.job(ctx, repo, id)
	if err != nil {
		return Operation{}, err
	}
	if active(job) {
		job, err = r.db.CancelJob(ctx, id)
		if err != nil {
			return Operation{}, unknown(err, "operation %.60s of %s ended long ago", id, repo)
		}
		r.mu.Lock()
		stop := r.running[id]
		r.mu.Unlock()
		if stop != nil {
			stop(index.ErrCanceled)
		}
	}
	return r.describe(repo, job), nil
}

// Export tells of the operations by numbers that are asked for when they are
// wanted, with names such as sluice_conversions_queued.
func (r *Runner) Export(gauge, counter func(name, help string, value func() float64)) {
	nouns := r.opts.Noun + "s"
	name := "sluice_" + strings.ToLower(nouns)
	gauge(name+"_queued", nouns+" waiting, of all replicas; -1 if the index can't be asked.", func() float64 {
		queued, _ := r.countJobs()
		return float64(queued)
	})
	gauge(name+"_running", nouns+" under way, of all replicas; -1 if the index can't be asked.", func() float64 {
		_, running := r.countJobs()
		return float64(running)
	})
	counts := &r.Counts
	for _, n := range []struct {
		name, help string
		value      *atomic.Int64
	}{
		{"_succeeded_total", nouns + " that succeeded here, also those that found everything done.", &counts.Succeeded},
		{"_failed_total", nouns + " that failed here for good.", &counts.Failed},
		{"_canceled_total", nouns + " that were canceled here, or whose image was deleted.", &counts.Canceled},
		{"_retried_total", nouns + " that failed here and are tried again.", &counts.Retried},
	} {
		counter(name+n.name, n.help, func() float64 { return float64(n.value.Load()) })
	}
}

// countJobs returns how many jobs wait, and how many are under way, of all
// replicas; -1 if the index can't be asked soon.
func (r *Runner) countJobs() (queued, running int) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	queued, running, err := r.db.CountJobs(ctx, r.opts.Queues)
	if err != nil {
		return -1, -1
	}
	return queued, running
}
