package stored

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/oci"
)

// Whoever has a repository alone may take every intent of it for one that was
// left behind, since who makes one shares the lock: also one from a clock that
// is ahead of ours.
const everyIntent = -24 * time.Hour

// Reconcile indexes anew the repositories whose tree and index a crash, or a
// failing store, left different. Call it before serving and every few minutes.
func (r *Registry) Reconcile(ctx context.Context) error {
	repos, err := r.db.Stale(ctx, everyIntent)
	if err != nil {
		return err
	}
	for _, repo := range repos {
		unlock, err := r.exclude(ctx, repo)
		if err != nil {
			return fmt.Errorf("reconcile repository %s: %w", repo, err)
		}
		unlock()
	}
	return nil
}

// settle indexes a repository anew if an intent was left behind. The caller has
// it alone.
func (r *Registry) settle(ctx context.Context, repo string) error {
	stale, err := r.db.Stale(ctx, everyIntent)
	if err != nil || !slices.Contains(stale, repo) {
		return err
	}
	r.opts.Log.Info("repository is indexed anew: a change of it did not end", "repository", repo)
	return r.reindex(ctx, repo)
}

// Rebuild indexes everything anew from the tree alone: after the index was lost,
// and when it is empty because the store is older than it. If it is
// interrupted, Reconcile goes on, once the index has a repository. progress,
// which may be nil, is called after each repository with how many are done.
func (r *Registry) Rebuild(ctx context.Context, progress func(repo string, done int)) error {
	if progress == nil {
		progress = func(string, int) {}
	}
	done := 0
	rebuild := func(repo string) error {
		unlock, err := r.db.Exclude(ctx, repositoryLock(repo))
		if err != nil {
			return err
		}
		defer unlock()
		if err := r.reindex(ctx, repo); err != nil {
			return fmt.Errorf("index repository %s: %w", repo, err)
		}
		done++
		progress(repo, done)
		return nil
	}
	seen := map[string]bool{}
	for repo, err := range r.walk(ctx) {
		if err == nil {
			_, err = r.db.Intend(ctx, repo)
		}
		if err != nil {
			return fmt.Errorf("look for repositories: %w", err)
		}
		seen[repo] = true
	}
	for _, repo := range slices.Sorted(maps.Keys(seen)) {
		if err := rebuild(repo); err != nil {
			return err
		}
	}
	// What only the index has.
	for row, err := range pages("", func(last string) ([]index.Repository, error) {
		return r.db.Repositories(ctx, index.RepositoryQuery{Last: last, N: pageSize, All: true})
	}, func(row index.Repository) string { return row.Name }) {
		if err == nil && !seen[row.Name] {
			err = rebuild(row.Name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// reindex makes the index of a repository what its tree says, after it has
// brought to an end what a crash left half done. The caller has it alone.
func (r *Registry) reindex(ctx context.Context, repo string) error {
	defer r.known.forget(repo)
	if err := r.finishDeletions(ctx, repo); err != nil {
		return err
	}
	if err := r.removeOrphans(ctx, repo); err != nil {
		return err
	}
	content, err := r.content(ctx, repo)
	if err != nil {
		return err
	}
	if len(content.Manifests)+len(content.Tags)+len(content.Blobs)+len(content.Deleted) == 0 && content.Name == "" {
		err = r.db.Update(ctx, func(tx *index.Tx) error { tx.RemoveRepository(repo); return nil })
	} else {
		err = r.db.ReplaceRepository(ctx, repo, content)
	}
	if err != nil {
		return err
	}
	return r.db.ClearStale(ctx, repo, everyIntent)
}

// finishDeletions looks at what is there and among the deleted ones at once: a
// deletion that didn't end is undone, a restoration goes on. What was pushed since
// is no longer among the deleted ones; its artifacts and tags stay deleted.
func (r *Registry) finishDeletions(ctx context.Context, repo string) error {
	for digest, err := range r.digests(ctx, repo, deletedPart) {
		if err != nil {
			return err
		}
		_, err = r.store.Stat(ctx, manifestKey(repo, digest))
		if errors.Is(err, storage.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		err = r.finishDeletion(ctx, repo, digest)
		if d := (damaged{}); errors.As(err, &d) {
			r.opts.Log.Warn("soft-deleted manifest can't be read", "repository", repo, "error", err)
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// finishDeletion does so for one manifest.
func (r *Registry) finishDeletion(ctx context.Context, repo string, digest oci.Digest) error {
	record, err := r.readDeleted(ctx, repo, digest)
	if err != nil {
		return err
	}
	// A deletion keeps the time of the push, and so does a restoration. Without the
	// record it's an older store's.
	var pushed manifestRecord
	if err := r.readRecord(ctx, attributesKey(repo, digest), maxRecord, &pushed); err != nil && !r.lost(err, repo) {
		return err
	}
	if pushed.Pushed.After(record.DeletedAt) {
		return r.remove(ctx, deletedKey(repo, digest))
	}
	back, err := r.revive(ctx, repo, record)
	if err != nil {
		return err
	}
	return r.putRevival(ctx, repo, digest, back)
}

// removeOrphans removes what describes manifests that aren't there.
func (r *Registry) removeOrphans(ctx context.Context, repo string) error {
	manifests := map[string]bool{}
	for digest, err := range r.digests(ctx, repo, manifestsPart) {
		if err != nil {
			return err
		}
		manifests[digest.String()] = true
	}
	parts := []string{attributesPart}
	for key, err := range r.store.List(ctx, partKey(repo, referrersPart), "") {
		if err != nil {
			return err
		}
		if strings.HasSuffix(key, "/") {
			parts = append(parts, strings.TrimPrefix(key, partKey(repo, "")))
		}
	}
	for _, part := range parts {
		for digest, err := range r.digests(ctx, repo, part) {
			if err == nil && !manifests[digest.String()] {
				err = r.remove(ctx, partKey(repo, part)+digest.String())
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// content reads the tree of a repository. A name is only in it if there is
// something.
func (r *Registry) content(ctx context.Context, repo string) (index.RepositoryContent, error) {
	var c index.RepositoryContent
	var err error
	if c.Blobs, err = collectDigests(ctx, r, repo, layersPart, func(ctx context.Context, d oci.Digest) (index.Blob, error) {
		size, err := r.store.Stat(ctx, layerKey(repo, d))
		return index.Blob{Repo: repo, Digest: d, Size: size}, err
	}); err != nil {
		return c, err
	}
	if c.Manifests, err = collectDigests(ctx, r, repo, manifestsPart, func(ctx context.Context, d oci.Digest) (index.Manifest, error) {
		return r.indexManifest(ctx, repo, d)
	}); err != nil {
		return c, err
	}
	if c.Deleted, err = collectDigests(ctx, r, repo, deletedPart, func(ctx context.Context, d oci.Digest) (index.Deleted, error) {
		record, err := r.readDeleted(ctx, repo, d)
		if err != nil {
			return index.Deleted{}, err
		}
		return record.row(repo)
	}); err != nil {
		return c, err
	}
	dir := tagKey(repo, "")
	for key, err := range r.store.List(ctx, dir, "") {
		if err != nil {
			return c, err
		}
		tag, err := r.indexTag(ctx, repo, strings.TrimPrefix(key, dir))
		if r.skip(err, repo) {
			continue
		}
		if err != nil {
			return c, err
		}
		c.Tags = append(c.Tags, tag)
	}
	_, err = r.store.Stat(ctx, repositoryKey(repo))
	if errors.Is(err, storage.ErrNotFound) && len(c.Manifests)+len(c.Tags)+len(c.Blobs)+len(c.Deleted) == 0 {
		return c, nil
	}
	if err != nil && !errors.Is(err, storage.ErrNotFound) {
		return c, err
	}
	c.Repository, err = r.describeRepository(ctx, repo)
	return c, err
}

// skip reports whether something is left out of the index: what is damaged
// can't be served. Any other failure must not make the index forget it.
func (r *Registry) skip(err error, repo string) bool {
	if d := (damaged{}); errors.As(err, &d) || errors.Is(err, oci.ErrManifestInvalid) {
		r.opts.Log.Warn("object is left out of the index", "repository", repo, "error", err)
		return true
	}
	return errors.Is(err, storage.ErrNotFound) || err != nil && errors.Is(err, errStrange)
}

// lost reports whether a record has to be made anew.
func (r *Registry) lost(err error, repo string) bool {
	d := damaged{}
	if errors.As(err, &d) {
		r.opts.Log.Warn("record is made anew, with the attributes of what nobody has locked", "repository", repo, "error", err)
		return true
	}
	return errors.Is(err, storage.ErrNotFound)
}

// errStrange is for an object that nobody but a stranger can have put there.
var errStrange = errors.New("not a name of the registry's")

// indexTag reads a tag for the index, and gives one of an older store its times.
func (r *Registry) indexTag(ctx context.Context, repo, name string) (index.Tag, error) {
	if oci.CheckTag(name) != nil {
		return index.Tag{}, errStrange
	}
	t, err := r.readTag(ctx, repo, name)
	if err == nil && t.Created.IsZero() {
		t.Created, t.Updated = now(), now()
		err = r.put(ctx, tagKey(repo, name), recordOfTag(t))
	}
	return t, err
}

// indexManifest reads a manifest for the index. To one of an older store it adds
// what is known now.
func (r *Registry) indexManifest(ctx context.Context, repo string, digest oci.Digest) (index.Manifest, error) {
	content, err := r.readManifest(ctx, repo, digest)
	if err != nil {
		return index.Manifest{}, err
	}
	record := manifestRecord{Attributes: index.DefaultAttributes()}
	err = r.readRecord(ctx, attributesKey(repo, digest), maxRecord, &record)
	older := r.lost(err, repo)
	if older {
		record = manifestRecord{Attributes: index.DefaultAttributes()}
		record.MediaType, err = mediaTypeOf(content)
		if err != nil {
			err = damaged{err}
		}
	}
	if err != nil {
		return index.Manifest{}, err
	}
	m, _, err := describeManifest(repo, digest, record.MediaType, content)
	if err != nil {
		return m, err
	}
	m.Pushed, m.Updated, m.By, m.Attributes = micro(record.Pushed), micro(record.Updated), record.By, record.Attributes
	m.OS, m.Architecture = record.OS, record.Architecture
	if older {
		m.Pushed, m.Updated = now(), now()
		if m.OS, m.Architecture, err = r.platform(ctx, m); err != nil {
			return m, err
		}
		err = r.put(ctx, attributesKey(repo, digest), recordOfManifest(m))
	}
	return m, err
}

// indexReaders is how many objects of a repository are read at a time.
const indexReaders = 16

// collectDigests reads the objects of a part of a repository with read.
func collectDigests[T any](ctx context.Context, r *Registry, repo, part string, read func(context.Context, oci.Digest) (T, error)) ([]T, error) {
	var mu sync.Mutex
	var all []T // guarded by mu
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(indexReaders)
	var listing error
	for digest, err := range r.digests(ctx, repo, part) {
		if err != nil {
			listing = err
			break
		}
		group.Go(func() error {
			item, err := read(ctx, digest)
			if r.skip(err, repo) {
				return nil
			}
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, item)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return all, listing
}

// digests yields the names in a part of a repository that are digests.
func (r *Registry) digests(ctx context.Context, repo, part string) func(yield func(oci.Digest, error) bool) {
	return func(yield func(oci.Digest, error) bool) {
		dir := partKey(repo, part)
		for key, err := range r.store.List(ctx, dir, "") {
			digest, derr := oci.ParseDigest(strings.TrimPrefix(key, dir))
			if err == nil && derr != nil {
				continue // a stranger's
			}
			if !yield(digest, err) {
				return
			}
		}
	}
}
