package stored

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sluice/internal/index"
	"sluice/internal/storage"
)

// Collected is what garbage collection has deleted.
type Collected struct {
	Blobs int
	Bytes int64
}

// touchResolution is how much earlier than the last HEAD the time of a blob's
// row may be: see index.DB.Touch.
const touchResolution = time.Minute

// collectBatch is how many blobs are deleted while a repository is had alone:
// few, since pushes wait.
const collectBatch = 16

// Collect deletes the blobs that no manifest needs, neither one that is there
// nor one that can be restored, and that nobody has pushed, mounted or asked for
// (HEAD) for at least grace. It runs while the registry serves. A client that
// pushes a manifest later than grace after it learned that a blob is there may
// have to push the blob again: an hour is little, a day is usual.
//
// Of several replicas one at a time collects; the others return at once.
func (r *Registry) Collect(ctx context.Context, grace time.Duration) (Collected, error) {
	var all Collected
	// Held while waiting for locks of repositories, whose holders never
	// wait for this one.
	unlock, ok, err := r.db.TryExclude(ctx, "collect")
	if err != nil || !ok {
		return all, err
	}
	defer unlock()
	before := now().Add(-grace - touchResolution)
	repositories := pages("", func(last string) ([]index.Repository, error) {
		return r.db.Repositories(ctx, index.RepositoryQuery{Last: last, N: pageSize})
	}, func(row index.Repository) string { return row.Name })
	for row, err := range repositories {
		if err != nil {
			return all, err
		}
		n, err := r.collect(ctx, row.Name, before)
		all.Blobs += n.Blobs
		all.Bytes += n.Bytes
		if err != nil {
			return all, fmt.Errorf("collect garbage of %s: %w", row.Name, err)
		}
	}
	return all, nil
}

// collect deletes the garbage of a repository, a batch at a time.
func (r *Registry) collect(ctx context.Context, repo string, before time.Time) (Collected, error) {
	var all Collected
	for {
		some, err := r.db.Garbage(ctx, repo, before, "", 1) // without troubling anybody
		if err != nil || len(some) == 0 {
			return all, err
		}
		n, err := r.collectBatch(ctx, repo, before)
		all.Blobs += n.Blobs
		all.Bytes += n.Bytes
		if err != nil {
			return all, err
		}
	}
}

func (r *Registry) collectBatch(ctx context.Context, repo string, before time.Time) (Collected, error) {
	unlock, err := r.exclude(ctx, repo)
	if err != nil {
		return Collected{}, err
	}
	defer unlock()
	return r.deleteSome(ctx, repo, before, collectBatch)
}

// deleteGarbage deletes all garbage of a repository that the caller has alone.
func (r *Registry) deleteGarbage(ctx context.Context, repo string, before time.Time) (Collected, error) {
	var all Collected
	for {
		n, err := r.deleteSome(ctx, repo, before, pageSize)
		all.Blobs += n.Blobs
		all.Bytes += n.Bytes
		if err != nil || n.Blobs < pageSize {
			return all, err
		}
	}
}

// deleteSome deletes up to n blobs that are garbage now, that is while nobody
// else can begin to need one. A crash leaves rows without objects, which are
// garbage the next time.
func (r *Registry) deleteSome(ctx context.Context, repo string, before time.Time, n int) (Collected, error) {
	var done Collected
	blobs, err := r.db.Garbage(ctx, repo, before, "", n)
	if err != nil {
		return done, err
	}
	for _, b := range blobs {
		if err := r.store.Delete(ctx, layerKey(repo, b.Digest)); err != nil && !errors.Is(err, storage.ErrNotFound) {
			return done, err
		}
		done.Blobs++
		done.Bytes += b.Size
	}
	return done, r.db.Update(context.WithoutCancel(ctx), func(tx *index.Tx) error {
		for _, b := range blobs {
			tx.DeleteBlob(repo, b.Digest)
		}
		return nil
	})
}
