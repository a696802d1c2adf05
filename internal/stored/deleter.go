package stored

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"sluice/internal/storage"
	"sluice/oci"
)

// DeleteBlob implements oci.Deleter.
func (r *Registry) DeleteBlob(ctx context.Context, repo string, digest oci.Digest) error {
	if err := check(ctx, repo, digest); err != nil {
		return err
	}
	unlock := r.locks.exclude(repo)
	defer unlock()
	err := r.store.Delete(ctx, layerKey(repo, digest))
	return r.missing(ctx, repo, err, blobUnknown(repo, digest))
}

// DeleteManifest implements oci.Deleter.
func (r *Registry) DeleteManifest(ctx context.Context, repo string, digest oci.Digest) error {
	if err := check(ctx, repo, digest); err != nil {
		return err
	}
	unlock := r.locks.exclude(repo)
	defer unlock()
	unknown := oci.ErrManifestUnknown.Withf("manifest %s is not in repository %s", digest, repo)
	content, err := storage.ReadAll(ctx, r.store, manifestKey(repo, digest), oci.MaxManifestSize)
	if err != nil {
		return r.missing(ctx, repo, err, unknown)
	}
	if err := r.deleteTags(ctx, repo, digest); err != nil {
		return fmt.Errorf("delete manifest %s of %s: its tags: %w", digest, repo, err)
	}
	if err := r.store.Delete(ctx, manifestKey(repo, digest)); err != nil {
		return r.missing(ctx, repo, err, unknown)
	}
	if subject := subjectOf(content); subject != "" {
		err := r.store.Delete(ctx, referrerKey(repo, subject, digest))
		if err != nil && !errors.Is(err, storage.ErrNotFound) {
			return fmt.Errorf("delete manifest %s of %s: its referrer link: %w", digest, repo, err)
		}
	}
	return nil
}

// deleteTags deletes the tags that point at a manifest.
func (r *Registry) deleteTags(ctx context.Context, repo string, digest oci.Digest) error {
	dir := tagKey(repo, "")
	for key, err := range r.store.List(ctx, dir, "") {
		if err != nil {
			return err
		}
		content, err := storage.ReadAll(ctx, r.store, key, maxTagSize)
		if err == nil && string(content) != digest.String() {
			continue
		}
		if err == nil {
			err = r.store.Delete(ctx, key)
		}
		if err != nil && !errors.Is(err, storage.ErrNotFound) {
			return err
		}
	}
	return nil
}

// subjectOf returns the subject of a stored manifest, "" if it has none. A
// damaged one must be deletable too.
func subjectOf(content []byte) oci.Digest {
	mediaType, err := mediaTypeOf(content)
	if err != nil {
		return ""
	}
	info, err := oci.ParseManifestInfo(content, mediaType)
	if err != nil || info.Subject == nil {
		return ""
	}
	return info.Subject.Digest
}

// DeleteTag implements oci.Deleter.
func (r *Registry) DeleteTag(ctx context.Context, repo, tag string) error {
	if err := check(ctx, repo); err != nil {
		return err
	}
	if err := oci.CheckTag(tag); err != nil {
		return err
	}
	unlock := r.locks.exclude(repo)
	defer unlock()
	err := r.store.Delete(ctx, tagKey(repo, tag))
	return r.missing(ctx, repo, err, oci.ErrManifestUnknown.Withf("tag %s is not in repository %s", tag, repo))
}

// repoLocks holds a lock for each repository that somebody is changing. Pushes
// of manifests share it, deletions have it alone. It is never held while
// reading from a client, so it is free again after a few disk writes.
type repoLocks struct {
	mu    sync.Mutex
	locks map[string]*repoLock // guarded by mu
}

type repoLock struct {
	sync.RWMutex
	users int // who hold or want it; guarded by repoLocks.mu
}

// share takes a repository's lock together with others who share it.
func (l *repoLocks) share(repo string) (unlock func()) {
	lock := l.enter(repo)
	lock.RLock()
	return func() { lock.RUnlock(); l.leave(repo, lock) }
}

// exclude takes a repository's lock alone.
func (l *repoLocks) exclude(repo string) (unlock func()) {
	lock := l.enter(repo)
	lock.Lock()
	return func() { lock.Unlock(); l.leave(repo, lock) }
}

func (l *repoLocks) enter(repo string) *repoLock {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.locks == nil {
		l.locks = map[string]*repoLock{}
	}
	lock := l.locks[repo]
	if lock == nil {
		lock = &repoLock{}
		l.locks[repo] = lock
	}
	lock.users++
	return lock
}

func (l *repoLocks) leave(repo string, lock *repoLock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if lock.users--; lock.users == 0 {
		delete(l.locks, repo)
	}
}
