package streaming

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"sluice/internal/blob"
	"sluice/internal/convert"
	"sluice/internal/index"
	"sluice/internal/operation"
	"sluice/internal/stored"
	"sluice/oci"
)

// do does a job, and returns what is to be said of it.
func (s *Service) do(ctx context.Context, w *operation.Work) (message string, err error) {
	var payload setting
	if err := json.Unmarshal(w.Job.Payload, &payload); err != nil {
		return "", oci.ErrUnsupported.Withf("the job was queued by another version of the registry: start it again")
	}
	ctx = oci.WithActor(ctx, payload.Actor)
	if w.Job.Key == "" {
		if payload.Backfill {
			return s.backfill(ctx, w.Repo, payload.Conversion)
		}
		return "", nil
	}
	m := meter{work: w, done: make(map[string]int64)}
	opts := convert.Options{
		Platforms: s.opts.Platforms, Layers: s.opts.Layers, Progress: m.update, Log: s.opts.Log,
	}
	if s.opts.Store != nil {
		opts.Reuse = s.layer
	}
	reg := guard{s.generator, w.Hold}
	checked, err := convert.Check(ctx, reg, w.Repo, w.Job.Key, opts)
	if err != nil {
		return "", err
	}
	m.size = checked.Size
	result, err := convert.Convert(ctx, reg, w.Repo, w.Job.Key, opts)
	if err == nil && result.Existed() {
		message = "it was converted before"
	}
	return message, err
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
	case blob.Final(err), errors.Is(err, oci.ErrManifestInvalid), convert.Ineligible(err):
		return coded.Code
	}
	return ""
}

// meter takes the progress of a conversion. Reading the layers is nearly all of
// it.
type meter struct {
	work *operation.Work
	size int64            // of all layers
	done map[string]int64 // bytes by layer
}

// update is convert's Progress, called by one goroutine at a time.
func (m *meter) update(p convert.Progress) {
	platform := p.Platform.OS + "/" + p.Platform.Architecture + "/" + p.Platform.Variant
	switch p.Stage {
	case convert.StageLayer:
		m.done[fmt.Sprint(platform, p.Layer)] = p.Done
	case convert.StageDone:
		if p.Existed {
			m.done[platform] = p.Size
		}
	}
	var done int64
	for _, n := range m.done {
		done += n
	}
	m.work.Advance(done, m.size)
}

// backfill has a repository's images converted that are there. Those without a
// tag are parts of indexes, or what a tag has left behind.
func (s *Service) backfill(ctx context.Context, repo string, c stored.Conversion) (string, error) {
	const page = 100
	count := 0
	for last := ""; ; {
		list, err := s.db.Manifests(ctx, index.ManifestQuery{Repo: repo, Last: last, N: page})
		if err != nil {
			return "", err
		}
		err = s.db.Update(ctx, func(tx *index.Tx) error {
			for _, m := range list {
				last = m.Digest.String()
				if len(m.Tags) == 0 || !stored.Convertible(m) {
					continue
				}
				count++
				if err := stored.EnqueueConversion(tx, repo, m.Digest, c); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return "", err
		}
		if len(list) < page {
			s.ops.Wake()
			return fmt.Sprintf("%d images are converted now, each by an operation of its own", count), nil
		}
	}
}
