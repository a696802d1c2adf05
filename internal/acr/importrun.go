package acr

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"sluice/internal/index"
	"sluice/internal/remote"
	"sluice/internal/transfer"
	"sluice/oci"
)

const (
	importsAtOnce = 2 // of one process; each copies several blobs at once

	// importLease is how long nobody else takes an import up again whose
	// process ended. It is extended, with the progress, importBeats times in
	// that time.
	importLease = 30 * time.Second
	importBeats = 6

	// importPoll is how often the queue is looked into for imports that
	// another replica was asked for, or left.
	importPoll = 5 * time.Second

	// importAttempts is how often an import is begun whose failure may pass.
	// The connection to the source is tried more often in each.
	importAttempts = 3
	importPause    = 5 * time.Second // after the first failure, and then longer
)

// RunImports does the imports of the queue until ctx ends, and returns when
// those under way have stopped; another process, or the next one, continues
// them: what the registry has already isn't copied again. Every replica may
// run it.
func (h *Handler) RunImports(ctx context.Context) {
	index.Worker{
		Slots: importsAtOnce, Poll: importPoll, Wake: h.wake,
		Next: func(ctx context.Context) ([]index.Job, error) {
			return h.index.Lease(ctx, importQueue, 1, importLease)
		},
		Do:     h.runImport,
		Failed: func(err error) { h.opts.Log.Error("look for imports", "error", err) },
	}.Run(ctx)
}

// runImport does one import and records what became of it.
func (h *Handler) runImport(ctx context.Context, job index.Job) {
	inner, cancel := context.WithCancelCause(ctx)
	meter := &importMeter{}
	var beats sync.WaitGroup
	beats.Go(func() { h.keepImport(inner, job, meter, cancel) })
	result, err := h.importImage(inner, job, meter)
	cause := context.Cause(inner)
	cancel(nil)
	beats.Wait()

	// Also when the process is being stopped, somebody is to know.
	last, stop := context.WithTimeout(context.WithoutCancel(ctx), importLease/2)
	defer stop()
	log := h.opts.Log.With("operation", job.ID, "target", job.Key)
	switch {
	case err == nil:
		err = h.finishImport(last, job, index.Succeeded, result)
		log.Info("imported", "digest", result.Digest)
	case ctx.Err() != nil:
		err = h.index.Retry(last, job, 0)
	case errors.Is(cause, index.ErrLeaseLost):
		log.Warn("import was taken up elsewhere")
		return
	case errors.Is(cause, index.ErrCanceled):
		err = h.finishImport(last, job, index.Canceled, importResult{Details: "canceled"})
		log.Info("import canceled")
	case job.Attempts < importAttempts && mayPass(err):
		pause := importPause << (job.Attempts - 1)
		log.Warn("import failed, it will be tried again", "attempt", job.Attempts, "after", pause, "error", err)
		err = h.retryImport(last, job, pause, importProgress{Failed: err.Error()})
	default:
		log.Warn("import failed", "error", err)
		err = h.finishImport(last, job, index.Failed, importResult{Details: err.Error()})
	}
	if err != nil {
		log.Error("record what became of an import; it may be done again", "error", err)
	}
}

// retryImport gives an import back to the queue, with the reason.
func (h *Handler) retryImport(ctx context.Context, job index.Job, pause time.Duration, p importProgress) error {
	doc, err := json.Marshal(p)
	if err != nil {
		return err
	}
	if err := h.index.Extend(ctx, job, importLease, doc); err != nil && !errors.Is(err, index.ErrCanceled) {
		return err
	}
	return h.index.Retry(ctx, job, pause)
}

func (h *Handler) finishImport(ctx context.Context, job index.Job, state string, result importResult) error {
	doc, err := json.Marshal(result)
	if err != nil {
		return err
	}
	return h.index.Finish(ctx, job, state, doc)
}

// mayPass reports whether a failure may have passed when one tries again:
// not one that the source or this registry has a code for.
func mayPass(err error) bool {
	var coded *oci.Error
	return !errors.As(err, &coded) || coded.Code == oci.ErrTooManyRequests.Code
}

// keepImport holds the lease and records progress until ctx ends. When the
// lease is lost or the import is to be canceled, it cancels it.
func (h *Handler) keepImport(ctx context.Context, job index.Job, meter *importMeter, cancel context.CancelCauseFunc) {
	tick := time.NewTicker(importLease / importBeats)
	defer tick.Stop()
	held := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		progress, err := json.Marshal(meter.progress())
		if err == nil {
			err = h.index.Extend(ctx, job, importLease, progress)
		}
		switch {
		case err == nil:
			held = time.Now()
		case errors.Is(err, index.ErrLeaseLost), errors.Is(err, index.ErrCanceled):
			cancel(err)
			return
		case time.Since(held) > importLease:
			cancel(fmt.Errorf("%w: the index can't be reached: %w", index.ErrLeaseLost, err))
			return
		}
	}
}

// importImage copies what an import asks for.
func (h *Handler) importImage(ctx context.Context, job index.Job, meter *importMeter) (importResult, error) {
	var p importJob
	if err := json.Unmarshal(job.Payload, &p); err != nil {
		return importResult{}, oci.ErrUnsupported.Withf("the import was queued by another version of the registry: start it again")
	}
	source, target, err := p.parse()
	if err != nil {
		return importResult{}, err
	}
	platforms, err := p.platforms()
	if err != nil {
		return importResult{}, err
	}
	credential, err := h.unseal(ctx, p.Credential, job.Key)
	if err != nil {
		return importResult{}, err
	}
	opts := remote.Options{
		Transport: h.opts.ImportTransport, Log: h.opts.Log,
		// Never those of the user that the registry runs as.
		Credentials: func(_ context.Context, host string) (remote.Credential, error) {
			if host != source.Registry {
				return remote.Credential{}, nil
			}
			return credential, nil
		},
	}
	if p.PlainHTTP {
		opts.PlainHTTP = remote.PlainHTTPAlways
	}
	from, err := remote.New(source.Registry, opts)
	if err != nil {
		return importResult{}, badRequest("%v", err)
	}
	to := transfer.Target{Registry: h.registry, Repo: target.repo, Name: "this registry"}
	if target.tag != "" {
		to.Tags = []string{target.tag}
	}
	r, err := transfer.Copy(oci.WithActor(ctx, p.Actor), to,
		transfer.Source{Registry: from, Repo: source.Repository, Reference: source.Target()},
		transfer.Options{Platforms: platforms, Referrers: p.Referrers, Progress: meter.update, Log: h.opts.Log})
	if err != nil {
		return importResult{}, err
	}
	copied, size := r.Count(transfer.Copied)
	return importResult{
		Digest:  r.Root.Digest,
		Details: fmt.Sprintf("copied: manifests %d, blobs %d with %d bytes; the rest was there", r.Manifests, copied, size),
	}, nil
}

// importMeter adds up the progress of a copy.
type importMeter struct {
	mu    sync.Mutex // guards what follows
	blobs map[int]int64
	size  int64
}

func (m *importMeter) update(p transfer.Progress) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.size = p.Size
	if m.blobs == nil {
		m.blobs = map[int]int64{}
	}
	switch p.State {
	case transfer.Waiting:
	case transfer.Copying:
		m.blobs[p.Number] = p.Done
	default:
		m.blobs[p.Number] = p.Blob.Size
	}
}

func (m *importMeter) progress() importProgress {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := importProgress{Size: m.size}
	for _, done := range m.blobs {
		p.Done += done
	}
	return p
}
