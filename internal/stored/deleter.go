package stored

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"sluice/internal/index"
	"sluice/oci"
)

// DeleteBlob implements oci.Deleter. Errors besides: ErrDenied if the repository
// is locked, or a manifest that needs the blob.
func (r *Registry) DeleteBlob(ctx context.Context, repo string, digest oci.Digest) error {
	if err := check(ctx, repo, digest); err != nil {
		return err
	}
	unlock, err := r.exclude(ctx, repo)
	if err != nil {
		return err
	}
	defer unlock()
	if err := r.checkDeletable(ctx, repo); err != nil {
		return err
	}
	if err := r.checkBlobDeletable(ctx, repo, digest); err != nil {
		return err
	}
	// The object first: a row without object is what Collect looks for.
	unknown := r.missing(ctx, repo, r.store.Delete(ctx, layerKey(repo, digest)), blobUnknown(repo, digest))
	if unknown != nil && !errors.Is(unknown, oci.ErrBlobUnknown) {
		return unknown
	}
	err = r.db.Update(context.WithoutCancel(ctx), func(tx *index.Tx) error { tx.DeleteBlob(repo, digest); return nil })
	return errors.Join(unknown, err)
}

// checkBlobDeletable returns an error if a locked manifest needs a blob.
func (r *Registry) checkBlobDeletable(ctx context.Context, repo string, digest oci.Digest) error {
	needed, err := r.db.Needed(ctx, repo, digest)
	if err != nil || !needed {
		return err
	}
	for m, err := range r.manifests(ctx, repo) {
		if err != nil {
			return err
		}
		if slices.ContainsFunc(m.Blobs, func(b oci.Descriptor) bool { return b.Digest == digest }) {
			if err := deletable(m.Attributes, "manifest", manifestTarget(repo, m.Digest)); err != nil {
				return fmt.Errorf("delete blob %s of %s: %w", digest, repo, err)
			}
		}
	}
	return nil
}

// checkDeletable returns an error if nothing of a repository may be deleted.
func (r *Registry) checkDeletable(ctx context.Context, repo string) error {
	row, err := r.db.Repository(ctx, repo)
	if errors.Is(err, index.ErrNotFound) {
		return oci.ErrNameUnknown.Withf("repository %s is unknown", repo)
	}
	if err != nil {
		return err
	}
	return deletable(row.Attributes, "repository", repositoryTarget(repo))
}

// DeleteManifest implements oci.Deleter. The streaming artifacts that were made
// of the manifest go with it. With Options.SoftDelete it can be restored.
//
// Errors besides: ErrDenied if the repository, the manifest, an artifact or a
// tag of them is locked.
func (r *Registry) DeleteManifest(ctx context.Context, repo string, digest oci.Digest) error {
	if err := check(ctx, repo, digest); err != nil {
		return err
	}
	unlock, err := r.exclude(ctx, repo)
	if err != nil {
		return err
	}
	defer unlock()
	if err := r.checkDeletable(ctx, repo); err != nil {
		return err
	}
	return r.deleteManifest(ctx, repo, digest)
}

// deleteManifest deletes a manifest of a repository that the caller has alone.
func (r *Registry) deleteManifest(ctx context.Context, repo string, digest oci.Digest) error {
	doomed, err := r.withArtifacts(ctx, repo, digest)
	if err != nil {
		return r.missing(ctx, repo, err, manifestUnknown(repo, digest.String()))
	}
	for _, m := range doomed {
		if err := m.deletable(); err != nil {
			return fmt.Errorf("delete manifest %s of %s: %w", digest, repo, err)
		}
	}
	at := now()
	record, keep, err := r.deletedRecord(ctx, doomed, at)
	if err != nil {
		return fmt.Errorf("delete manifest %s of %s: %w", digest, repo, err)
	}
	shrink, err := r.shrink(ctx, repo)
	if err != nil {
		return fmt.Errorf("delete manifest %s of %s: %w", digest, repo, err)
	}
	var events []Event
	for _, m := range doomed {
		events = append(events, newEvent(ActionDelete, repo, "", manifestDescriptor(m.Manifest), at, oci.ActorOf(ctx)))
	}
	err = r.change(ctx, repo, func(ctx context.Context) error {
		if keep {
			if err := r.put(ctx, deletedKey(repo, digest), record); err != nil {
				return err
			}
		}
		return r.removeManifests(ctx, doomed)
	}, func(tx *index.Tx) error {
		for _, m := range doomed {
			for _, t := range m.tags {
				tx.DeleteTag(repo, t.Name)
			}
			tx.DeleteManifest(repo, m.Digest)
		}
		if keep {
			row, err := record.row(repo)
			if err != nil {
				return err
			}
			tx.PutDeleted(row)
		}
		return shrink(tx)
	}, events...)
	if err != nil {
		return fmt.Errorf("delete manifest %s of %s: %w", digest, repo, err)
	}
	return nil
}

// taggedManifest is a manifest with the tags that point at it.
type taggedManifest struct {
	index.Manifest
	tags []index.Tag
}

// deletable returns an error if a lock keeps the manifest, or one of its tags.
func (m taggedManifest) deletable() error {
	if err := deletable(m.Attributes, "manifest", manifestTarget(m.Repo, m.Digest)); err != nil {
		return err
	}
	for _, t := range m.tags {
		if err := deletable(t.Attributes, "tag", tagTarget(m.Repo, t.Name)); err != nil {
			return err
		}
	}
	return nil
}

// withArtifacts returns a manifest, its streaming artifacts, and theirs.
func (r *Registry) withArtifacts(ctx context.Context, repo string, digest oci.Digest) ([]taggedManifest, error) {
	first, err := r.db.Manifest(ctx, repo, digest)
	if err != nil {
		return nil, err
	}
	all := []taggedManifest{{Manifest: first}}
	for i := 0; i < len(all); i++ {
		for t, err := range r.tags(ctx, repo, all[i].Digest) {
			if err != nil {
				return nil, err
			}
			all[i].tags = append(all[i].tags, t)
		}
		for a, err := range r.referrers(ctx, repo, all[i].Digest, oci.ArtifactTypeStreaming) {
			if err != nil {
				return nil, err
			}
			all = append(all, taggedManifest{Manifest: a})
		}
	}
	return all, nil
}

// removeManifests removes the objects of manifests, in the order that the
// package's documentation explains: all tags, then manifest by manifest from
// the last, the first being what the others belong to.
func (r *Registry) removeManifests(ctx context.Context, doomed []taggedManifest) error {
	for _, m := range doomed {
		for _, t := range m.tags {
			if err := r.remove(ctx, tagKey(m.Repo, t.Name)); err != nil {
				return fmt.Errorf("its tag %s: %w", t.Name, err)
			}
		}
	}
	for _, m := range slices.Backward(doomed) {
		keys := []string{manifestKey(m.Repo, m.Digest), attributesKey(m.Repo, m.Digest)}
		if m.Subject != "" {
			keys = append(keys, referrerKey(m.Repo, m.Subject, m.Digest))
		}
		for _, key := range keys {
			if err := r.remove(ctx, key); err != nil {
				return err
			}
		}
	}
	return nil
}

// DeleteTag implements oci.Deleter. Errors besides: ErrDenied if the repository
// or the tag is locked.
func (r *Registry) DeleteTag(ctx context.Context, repo, tag string) error {
	if err := check(ctx, repo); err != nil {
		return err
	}
	if err := oci.CheckTag(tag); err != nil {
		return err
	}
	unlock, err := r.exclude(ctx, repo)
	if err != nil {
		return err
	}
	defer unlock()
	if err := r.checkDeletable(ctx, repo); err != nil {
		return err
	}
	row, err := r.db.Tag(ctx, repo, tag)
	if err != nil {
		return r.missing(ctx, repo, err, tagUnknown(repo, tag))
	}
	if err := deletable(row.Attributes, "tag", tagTarget(repo, tag)); err != nil {
		return err
	}
	err = r.change(ctx, repo,
		func(ctx context.Context) error { return r.remove(ctx, tagKey(repo, tag)) },
		func(tx *index.Tx) error { tx.DeleteTag(repo, tag); return nil },
		newEvent(ActionDelete, repo, tag, oci.Descriptor{}, now(), oci.ActorOf(ctx)))
	if err != nil {
		return fmt.Errorf("delete tag %s of %s: %w", tag, repo, err)
	}
	return nil
}

// DeleteRepository deletes everything in a repository: manifests as
// DeleteManifest does, with Options.SoftDelete restorable, and the blobs that
// nothing restorable needs. Its attributes are forgotten. If it is interrupted,
// what was deleted is, and another call goes on.
//
// Errors: ErrNameUnknown; ErrDenied, before anything is deleted, if the
// repository or anything in it is locked.
func (r *Registry) DeleteRepository(ctx context.Context, repo string) error {
	if err := check(ctx, repo); err != nil {
		return err
	}
	unlock, err := r.exclude(ctx, repo)
	if err != nil {
		return err
	}
	defer unlock()
	defer r.known.forget(repo)
	if err := r.exists(ctx, repo); err != nil {
		return err
	}
	if err := r.checkAllDeletable(ctx, repo); err != nil {
		return fmt.Errorf("delete repository %s: %w", repo, err)
	}
	if err := r.empty(ctx, repo); err != nil {
		return fmt.Errorf("delete repository %s: %w", repo, err)
	}
	return nil
}

func (r *Registry) checkAllDeletable(ctx context.Context, repo string) error {
	if err := r.checkDeletable(ctx, repo); err != nil {
		return err
	}
	for m, err := range r.manifests(ctx, repo) {
		if err == nil {
			err = deletable(m.Attributes, "manifest", manifestTarget(repo, m.Digest))
		}
		if err != nil {
			return err
		}
	}
	for t, err := range r.tags(ctx, repo, "") {
		if err == nil {
			err = deletable(t.Attributes, "tag", tagTarget(repo, t.Name))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// empty deletes what is in a repository that the caller has alone.
func (r *Registry) empty(ctx context.Context, repo string) error {
	// Streaming artifacts go with what they belong to, so that they can be
	// restored with it; those that are left have nothing to belong to.
	for _, artifacts := range []bool{false, true} {
		for m, err := range r.manifests(ctx, repo) {
			if err == nil && (artifacts || m.Subject == "" || m.ArtifactType != oci.ArtifactTypeStreaming) {
				err = r.deleteManifest(ctx, repo, m.Digest)
			}
			if err != nil && !errors.Is(err, oci.ErrManifestUnknown) && !errors.Is(err, oci.ErrNameUnknown) {
				return err
			}
		}
	}
	for t, err := range r.tags(ctx, repo, "") { // of manifests that a bad disk lost
		if err == nil {
			err = r.change(ctx, repo,
				func(ctx context.Context) error { return r.remove(ctx, tagKey(repo, t.Name)) },
				func(tx *index.Tx) error { tx.DeleteTag(repo, t.Name); return nil })
		}
		if err != nil {
			return err
		}
	}
	if _, err := r.deleteGarbage(ctx, repo, now().Add(time.Hour)); err != nil {
		return err
	}
	restorable, err := r.db.DeletedManifests(ctx, repo, time.Time{}, "", 1)
	if err != nil {
		return err
	}
	if len(restorable) == 0 {
		return r.change(ctx, repo,
			func(ctx context.Context) error { return r.remove(ctx, repositoryKey(repo)) },
			func(tx *index.Tx) error { tx.RemoveRepository(repo); return nil })
	}
	row, err := r.db.Repository(ctx, repo)
	if err != nil {
		return err
	}
	row.Updated, row.Attributes = now(), index.DefaultAttributes()
	return r.change(ctx, repo,
		func(ctx context.Context) error { return r.put(ctx, repositoryKey(repo), recordOfRepository(row)) },
		func(tx *index.Tx) error { tx.PutRepository(row); return nil })
}

func tagUnknown(repo, tag string) *oci.Error {
	return oci.ErrManifestUnknown.Withf("tag %s is not in repository %s", tag, repo)
}
