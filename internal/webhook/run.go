package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"time"

	"sluice/internal/convert"
	"sluice/internal/index"
	"sluice/oci"
)

const (
	lease   = time.Minute // of a job; what was under way at a crash goes on after it
	idle    = time.Second
	settle  = 5 * time.Second // how long the index has to note how a job ended, when Run is told to
	retain  = 24 * time.Hour  // of jobs that have ended
	cleanUp = time.Hour
)

// Run converts what is in the queue until ctx ends; what it was at then is
// begun again by the next Run. It converts one image at a time: a conversion
// uses all processors, and an index comes after its images, which it then has
// nothing left to do for.
func (r *Receiver) Run(ctx context.Context) {
	pruned := time.Time{}
	for ctx.Err() == nil {
		if time.Since(pruned) > cleanUp {
			if err := r.db.PruneJobs(ctx, time.Now().Add(-retain)); err == nil {
				pruned = time.Now()
			}
		}
		jobs, err := r.db.Lease(ctx, queue, 1, lease)
		if err == nil && len(jobs) > 0 {
			r.do(ctx, jobs[0])
			continue
		}
		if err != nil && ctx.Err() == nil {
			r.opts.Log.ErrorContext(ctx, "the queue of webhooks can't be read", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-r.wake:
		case <-time.After(idle):
		}
	}
}

// do does a job and notes what became of it.
func (r *Receiver) do(ctx context.Context, job index.Job) {
	var p Push
	err := json.Unmarshal(job.Payload, &p)
	if err == nil {
		err = r.convert(ctx, job, p)
	}
	noting, cancel := context.WithTimeout(context.WithoutCancel(ctx), settle)
	defer cancel()
	log := r.opts.Log.With("image", p, "attempt", job.Attempts)
	pause := r.pause(job.Attempts)
	switch {
	case err == nil:
		err = r.db.Finish(noting, job, index.Succeeded, nil)
	case ctx.Err() != nil:
		err = r.db.Retry(noting, job, 0)
	case artifactItself(err):
		log.DebugContext(ctx, "it is a streaming artifact") // one that we pushed, most likely
		err = r.db.Finish(noting, job, index.Succeeded, nil)
	case final(err) || job.Attempts >= r.opts.Attempts:
		log.WarnContext(ctx, "an image that was pushed has no streaming artifact", "error", err)
		err = r.db.Finish(noting, job, index.Failed, nil)
	default:
		log.WarnContext(ctx, "an image that was pushed can't be converted yet", "again", pause, "error", err)
		err = r.db.Retry(noting, job, pause)
	}
	if err != nil && !errors.Is(err, index.ErrLeaseLost) {
		r.opts.Log.ErrorContext(ctx, "the queue of webhooks can't be written", "error", err)
	}
}

// convert converts an image while it keeps the job's lease.
func (r *Receiver) convert(ctx context.Context, job index.Job, p Push) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan struct{})
	defer func() { <-done }()
	finished := make(chan struct{})
	defer close(finished)
	go func() {
		defer close(done)
		for {
			select {
			case <-finished:
				return
			case <-time.After(lease / 3):
				if err := r.db.Extend(ctx, job, lease, nil); errors.Is(err, index.ErrLeaseLost) {
					cancel(err)
				}
			}
		}
	}()
	_, err := convert.Convert(ctx, r.opts.Registry, p.Repository, p.Reference(), r.opts.Convert)
	return err
}

// artifactItself reports whether what was pushed is a streaming artifact.
func artifactItself(err error) bool { return errors.Is(err, convert.ErrUnsupportedArtifactType) }

// final reports whether trying again is of no use: the image is what it is. One
// that doesn't exist may be on its way to where we read.
func final(err error) bool {
	for _, e := range []error{
		convert.ErrUnsupportedPlatform, convert.ErrNoSupportedPlatform, convert.ErrUnsupportedMediaType, convert.ErrImageNotRunnable,
		oci.ErrDenied, oci.ErrManifestInvalid, oci.ErrNameInvalid,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// pause is how long to wait after so many attempts, between half of it and all
// of it at random.
func (r *Receiver) pause(attempts int) time.Duration {
	p := r.opts.RetryMin
	for i := 1; i < attempts && p < r.opts.RetryMax; i++ {
		p *= 2
	}
	p = min(p, r.opts.RetryMax)
	return p/2 + rand.N(p/2+1)
}
