package operation

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"sluice/internal/index"
	"sluice/oci"
)

const (
	// MaxFailures is how many attempts may fail for a reason that may pass.
	MaxFailures = 6

	// MaxAttempts is how often a job is begun, for whatever reason it never ends:
	// one that takes too much memory kills its process each time.
	MaxAttempts = 20
)

// Work is a job that this process has the lease of.
type Work struct {
	Job  index.Job
	Repo string

	r    *Runner
	stop context.CancelCauseFunc // with the reason

	mu       sync.Mutex // guards progress
	progress progress
}

// run does a job and records what became of it.
func (r *Runner) run(ctx context.Context, job index.Job) {
	inner, stop := context.WithCancelCause(ctx)
	w := &Work{r: r, Job: job, Repo: job.Queue[len(r.opts.Queues):], stop: stop}
	_ = json.Unmarshal(job.Progress, &w.progress) // nothing, or of an attempt that didn't end
	w.progress.Percent = 0
	r.mu.Lock()
	r.running[job.ID] = stop
	r.mu.Unlock()
	var beats sync.WaitGroup
	beats.Go(func() { w.keep(inner) })
	message, err := w.do(inner)
	cause := context.Cause(inner)
	stop(nil)
	beats.Wait()
	r.mu.Lock()
	delete(r.running, job.ID)
	r.mu.Unlock()

	// Also when the process is being stopped, somebody is to know.
	last, end := context.WithTimeout(context.WithoutCancel(ctx), r.opts.Timing.Lease/2)
	defer end()
	if err := w.settle(last, ctx.Err() != nil, cause, message, err); err != nil && !errors.Is(err, index.ErrLeaseLost) {
		r.opts.Log.Error("record what became of an operation; it may be done again", "operation", job.ID, "error", err)
	}
}

func (w *Work) do(ctx context.Context) (message string, err error) {
	if w.Job.Attempts > MaxAttempts {
		return "", fmt.Errorf("it was begun %d times and %w: look into the registry's log for why its process ended (memory?), then start it again",
			w.Job.Attempts-1, errNeverEnds)
	}
	return w.r.opts.Do(ctx, w)
}

// errNeverEnds is the error of a job that is given up unseen.
var errNeverEnds = errors.New("never ended")

// permanent returns the code of an error that ends the operation, or nothing.
func (w *Work) permanent(err error) string {
	if errors.Is(err, errNeverEnds) {
		return CodeUnknown
	}
	return w.r.opts.Permanent(err)
}

// settle records what became of a job: err is that of its attempt, and cause why
// it was stopped, if it was.
func (w *Work) settle(ctx context.Context, stopping bool, cause error, message string, err error) error {
	noun := strings.ToLower(w.r.opts.Noun)
	log := w.r.opts.Log.With("operation", w.Job.ID, "repository", w.Repo, "subject", w.Job.Key)
	switch {
	case errors.Is(cause, index.ErrLeaseLost):
		log.Warn(noun+" was taken up elsewhere", "error", cause)
		return nil
	case errors.Is(cause, index.ErrCanceled):
		log.Info(noun + " canceled")
		return w.finish(ctx, index.Canceled, outcome{})
	case err == nil:
		return w.finish(ctx, index.Succeeded, outcome{Message: message})
	case stopping:
		return w.r.db.Retry(ctx, w.Job, 0)
	}
	if w.Job.Key != "" && w.r.opts.Gone(ctx, w.Repo, oci.Digest(w.Job.Key)) {
		log.Info(noun + " ended: the image was deleted")
		return w.finish(ctx, index.Canceled, outcome{Message: "the image was deleted"})
	}
	if code := w.permanent(err); code != "" {
		log.Warn(noun+" failed", "code", code, "error", err)
		return w.finish(ctx, index.Failed, outcome{Code: code, Message: err.Error()})
	}
	w.progress.Failures++
	w.progress.Failure = err.Error()
	if w.progress.Failures >= MaxFailures {
		log.Error(noun+" failed", "code", CodeUnknown, "attempts", w.progress.Failures, "error", err)
		return w.finish(ctx, index.Failed, outcome{CodeUnknown, fmt.Sprintf(
			"%d attempts failed, the last because: %v: see to that (storage, disk space, database), then start the %s again", w.progress.Failures, err, noun)})
	}
	pause := w.r.opts.Timing.Pause << (w.progress.Failures - 1)
	log.Warn(noun+" failed, it will be tried again", "attempt", w.progress.Failures, "after", pause, "error", err)
	w.r.Counts.Retried.Add(1)
	if err := w.extend(ctx); err != nil && !errors.Is(err, index.ErrCanceled) {
		return err
	}
	return w.r.db.Retry(ctx, w.Job, pause)
}

func (w *Work) finish(ctx context.Context, state string, result outcome) error {
	doc, err := json.Marshal(result)
	if err == nil {
		err = w.r.db.Finish(ctx, w.Job, state, doc)
	}
	if err == nil && w.Job.Key != "" {
		if state != index.Succeeded && w.r.opts.Ended != nil {
			w.r.opts.Ended(ctx, w.Repo)
		}
		c := &w.r.Counts
		map[string]interface{ Add(int64) int64 }{index.Succeeded: &c.Succeeded, index.Failed: &c.Failed, index.Canceled: &c.Canceled}[state].Add(1)
	}
	return err
}

// keep holds the lease and records progress until ctx ends. When the lease is
// lost or the job is to be canceled, it stops the work.
func (w *Work) keep(ctx context.Context) {
	tick := time.NewTicker(w.r.opts.Timing.Beat)
	defer tick.Stop()
	held := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		began := time.Now()
		switch err := w.Hold(ctx); {
		case err == nil:
			held = began
		case ctx.Err() != nil:
			return
		case time.Since(held) > w.r.opts.Timing.Lease*3/4:
			w.stop(fmt.Errorf("%w: the index can't be reached: %w", index.ErrLeaseLost, err))
			return
		}
	}
}

// Hold extends the lease, and stops the work if it may not go on. To be called
// right before something is published that only the job's worker may.
func (w *Work) Hold(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, w.r.opts.Timing.Lease/4)
	defer cancel()
	err := w.extend(ctx)
	if errors.Is(err, index.ErrLeaseLost) || errors.Is(err, index.ErrCanceled) {
		w.stop(err)
	}
	return err
}

func (w *Work) extend(ctx context.Context) error {
	w.mu.Lock()
	doc, err := json.Marshal(w.progress)
	w.mu.Unlock()
	if err != nil {
		return err
	}
	return w.r.db.Extend(ctx, w.Job, w.r.opts.Timing.Lease, doc)
}

// Advance tells how far the work is: done of size bytes, or of whatever is
// counted. It never goes back within an attempt, and stays below 100 percent.
func (w *Work) Advance(done, size int64) {
	if size <= 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.progress.Percent = max(w.progress.Percent, int(float64(min(done, size))/float64(size)*98))
}
