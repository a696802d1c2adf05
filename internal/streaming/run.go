package streaming

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"sluice/internal/blob"
	"sluice/internal/convert"
	"sluice/internal/index"
	"sluice/internal/stored"
	"sluice/oci"
)

const (
	// maxFailures is how many attempts may fail for a reason that may pass.
	maxFailures = 6

	// maxAttempts is how often a conversion is begun, for whatever reason it
	// never ends: one that takes too much memory kills its process each time.
	maxAttempts = 20
)

// Run converts what is in the queues until ctx ends, and returns when the
// conversions under way have stopped; another process, or the next one, takes
// them up again.
func (s *Service) Run(ctx context.Context) {
	last := ""
	index.Worker{
		Slots: s.opts.Workers, Poll: s.timing.poll, Wake: s.wake,
		Next:   func(ctx context.Context) ([]index.Job, error) { return s.next(ctx, &last) },
		Do:     s.run,
		Failed: func(err error) { s.opts.Log.Error("look for conversions", "error", err) },
	}.Run(ctx)
}

// next leases a job of the first queue behind the last one that has any.
func (s *Service) next(ctx context.Context, last *string) ([]index.Job, error) {
	for wrapped := *last == ""; ; {
		queue, err := s.db.NextQueue(ctx, stored.ConvertQueues, *last)
		if err != nil || queue == "" && wrapped {
			*last = queue
			return nil, err
		}
		*last = queue
		if queue == "" {
			wrapped = true
			continue
		}
		if jobs, err := s.db.Lease(ctx, queue, 1, s.timing.lease); err != nil || len(jobs) > 0 {
			return jobs, err
		}
	}
}

// work is a job that this process has the lease of.
type work struct {
	s    *Service
	job  index.Job
	repo string
	stop context.CancelCauseFunc // with the reason

	mu       sync.Mutex // guards what follows
	progress progress
	done     map[string]int64 // bytes by layer
	size     int64            // of all layers
}

// run does a job and records what became of it.
func (s *Service) run(ctx context.Context, job index.Job) {
	inner, stop := context.WithCancelCause(ctx)
	w := &work{s: s, job: job, repo: job.Queue[len(stored.ConvertQueues):], stop: stop, done: make(map[string]int64)}
	_ = json.Unmarshal(job.Progress, &w.progress) // nothing, or of an attempt that didn't end
	w.progress.Percent = 0
	s.mu.Lock()
	s.running[job.ID] = stop
	s.mu.Unlock()
	var beats sync.WaitGroup
	beats.Go(func() { w.keep(inner) })
	message, err := w.do(inner)
	cause := context.Cause(inner)
	stop(nil)
	beats.Wait()
	s.mu.Lock()
	delete(s.running, job.ID)
	s.mu.Unlock()

	// Also when the process is being stopped, somebody is to know.
	last, end := context.WithTimeout(context.WithoutCancel(ctx), s.timing.lease/2)
	defer end()
	if err := w.settle(last, ctx.Err() != nil, cause, message, err); err != nil && !errors.Is(err, index.ErrLeaseLost) {
		s.opts.Log.Error("record what became of a conversion; it may be done again", "operation", job.ID, "error", err)
	}
}

// settle records what became of a job: err is that of its attempt, and cause why
// it was stopped, if it was.
func (w *work) settle(ctx context.Context, stopping bool, cause error, message string, err error) error {
	log := w.s.opts.Log.With("operation", w.job.ID, "repository", w.repo, "subject", w.job.Key)
	switch {
	case errors.Is(cause, index.ErrLeaseLost):
		log.Warn("conversion was taken up elsewhere", "error", cause)
		return nil
	case errors.Is(cause, index.ErrCanceled):
		log.Info("conversion canceled")
		return w.finish(ctx, index.Canceled, outcome{})
	case err == nil:
		return w.finish(ctx, index.Succeeded, outcome{Message: message})
	case stopping:
		return w.s.db.Retry(ctx, w.job, 0)
	}
	if w.job.Key != "" {
		if _, gone := w.s.registry.Manifest(ctx, w.repo, oci.Digest(w.job.Key)); errors.Is(gone, oci.ErrManifestUnknown) || errors.Is(gone, oci.ErrNameUnknown) {
			log.Info("conversion ended: the image was deleted")
			return w.finish(ctx, index.Canceled, outcome{Message: "the image was deleted"})
		}
	}
	if code := permanent(err); code != "" {
		log.Warn("conversion failed", "code", code, "error", err)
		return w.finish(ctx, index.Failed, outcome{Code: code, Message: err.Error()})
	}
	w.progress.Failures++
	w.progress.Failure = err.Error()
	if w.progress.Failures >= maxFailures {
		log.Error("conversion failed", "code", codeUnknown, "attempts", w.progress.Failures, "error", err)
		return w.finish(ctx, index.Failed, outcome{codeUnknown, fmt.Sprintf(
			"%d attempts failed, the last because: %v: see to that (storage, disk space, database), then start the conversion again", w.progress.Failures, err)})
	}
	pause := w.s.timing.pause << (w.progress.Failures - 1)
	log.Warn("conversion failed, it will be tried again", "attempt", w.progress.Failures, "after", pause, "error", err)
	w.s.retried.Add(1)
	if err := w.extend(ctx); err != nil && !errors.Is(err, index.ErrCanceled) {
		return err
	}
	return w.s.db.Retry(ctx, w.job, pause)
}

func (w *work) finish(ctx context.Context, state string, result outcome) error {
	doc, err := json.Marshal(result)
	if err == nil {
		err = w.s.db.Finish(ctx, w.job, state, doc)
	}
	if err == nil && w.job.Key != "" {
		map[string]interface{ Add(int64) int64 }{index.Succeeded: &w.s.succeeded, index.Failed: &w.s.failed, index.Canceled: &w.s.canceled}[state].Add(1)
	}
	return err
}

// permanent returns the code of an error that will be the same the next time, or
// nothing.
func permanent(err error) string {
	var coded *oci.Error
	switch {
	case errors.Is(err, convert.ErrContent):
		return convert.ErrImageNotRunnable.Code
	case errors.Is(err, oci.ErrBlobUnknown):
		return convert.ErrResourceNotFound.Code // a layer that was never pushed
	case !errors.As(err, &coded):
		return ""
	case blob.Final(err), errors.Is(err, oci.ErrManifestInvalid):
		return coded.Code
	}
	for _, e := range []*oci.Error{
		convert.ErrResourceNotFound, convert.ErrUnsupportedPlatform, convert.ErrNoSupportedPlatform,
		convert.ErrUnsupportedMediaType, convert.ErrUnsupportedArtifactType, convert.ErrImageNotRunnable,
	} {
		if errors.Is(err, e) {
			return e.Code
		}
	}
	return ""
}

// keep holds the lease and records progress until ctx ends. When the lease is
// lost or the job is to be canceled, it stops the work.
func (w *work) keep(ctx context.Context) {
	tick := time.NewTicker(w.s.timing.beat)
	defer tick.Stop()
	held := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		began := time.Now()
		switch err := w.hold(ctx); {
		case err == nil:
			held = began
		case ctx.Err() != nil:
			return
		case time.Since(held) > w.s.timing.lease*3/4:
			w.stop(fmt.Errorf("%w: the index can't be reached: %w", index.ErrLeaseLost, err))
			return
		}
	}
}

// hold extends the lease, and stops the work if it may not go on.
func (w *work) hold(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, w.s.timing.lease/4)
	defer cancel()
	err := w.extend(ctx)
	if errors.Is(err, index.ErrLeaseLost) || errors.Is(err, index.ErrCanceled) {
		w.stop(err)
	}
	return err
}

func (w *work) extend(ctx context.Context) error {
	w.mu.Lock()
	doc, err := json.Marshal(w.progress)
	w.mu.Unlock()
	if err != nil {
		return err
	}
	return w.s.db.Extend(ctx, w.job, w.s.timing.lease, doc)
}

// do does a job, and returns what is to be said of it.
func (w *work) do(ctx context.Context) (message string, err error) {
	var payload setting
	if err := json.Unmarshal(w.job.Payload, &payload); err != nil {
		return "", oci.ErrUnsupported.Withf("the job was queued by another version of the registry: start it again")
	}
	if w.job.Attempts > maxAttempts {
		return "", &oci.Error{Code: codeUnknown, Message: fmt.Sprintf(
			"it was begun %d times and never ended: look into the registry's log for why its process ended (memory?), then start it again", w.job.Attempts-1)}
	}
	ctx = oci.WithActor(ctx, payload.Actor)
	if w.job.Key == "" {
		if payload.Backfill {
			return w.backfill(ctx, payload.Conversion)
		}
		return "", nil
	}
	opts := convert.Options{
		Platforms: w.s.opts.Platforms, Layers: w.s.opts.Layers, Progress: w.update, Log: w.s.opts.Log,
	}
	if w.s.opts.Store != nil {
		opts.Reuse = w.s.layer
	}
	reg := guard{w.s.generator, w.hold}
	checked, err := convert.Check(ctx, reg, w.repo, w.job.Key, opts)
	if err != nil {
		return "", err
	}
	w.mu.Lock()
	w.size = checked.Size
	w.mu.Unlock()
	result, err := convert.Convert(ctx, reg, w.repo, w.job.Key, opts)
	if err == nil && result.Existed() {
		message = "it was converted before"
	}
	return message, err
}

// update takes the progress of a conversion. Reading the layers is nearly all of
// it.
func (w *work) update(p convert.Progress) {
	w.mu.Lock()
	defer w.mu.Unlock()
	platform := p.Platform.OS + "/" + p.Platform.Architecture + "/" + p.Platform.Variant
	switch p.Stage {
	case convert.StageLayer:
		w.done[fmt.Sprint(platform, p.Layer)] = p.Done
	case convert.StageDone:
		if p.Existed {
			w.done[platform] = p.Size
		}
	}
	var done int64
	for _, n := range w.done {
		done += n
	}
	if w.size > 0 {
		w.progress.Percent = max(w.progress.Percent, int(min(done, w.size)*98/w.size))
	}
}

// backfill has a repository's images converted that are there. Those without a
// tag are parts of indexes, or what a tag has left behind.
func (w *work) backfill(ctx context.Context, c stored.Conversion) (string, error) {
	const page = 100
	count := 0
	for last := ""; ; {
		list, err := w.s.db.Manifests(ctx, index.ManifestQuery{Repo: w.repo, Last: last, N: page})
		if err != nil {
			return "", err
		}
		err = w.s.db.Update(ctx, func(tx *index.Tx) error {
			for _, m := range list {
				last = m.Digest.String()
				if len(m.Tags) == 0 || !stored.Convertible(m) {
					continue
				}
				count++
				if err := stored.EnqueueConversion(tx, w.repo, m.Digest, c); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return "", err
		}
		if len(list) < page {
			w.s.notify()
			return fmt.Sprintf("%d images are converted now, each by an operation of its own", count), nil
		}
	}
}
