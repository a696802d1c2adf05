package ocimem

import (
	"context"

	"sluice/oci"
)

// DeleteBlob implements oci.Deleter.
func (r *Registry) DeleteBlob(ctx context.Context, repo string, digest oci.Digest) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := oci.ParseDigest(digest.String()); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	repository, err := r.repo(repo)
	if err != nil {
		return err
	}
	if _, err := repository.blob(repo, digest); err != nil {
		return err
	}
	delete(repository.blobs, digest)
	r.prune(repo)
	return nil
}

// DeleteManifest implements oci.Deleter.
func (r *Registry) DeleteManifest(ctx context.Context, repo string, digest oci.Digest) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := oci.ParseDigest(digest.String()); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	repository, err := r.repo(repo)
	if err != nil {
		return err
	}
	if _, ok := repository.manifests[digest]; !ok {
		return oci.ErrManifestUnknown.Withf("manifest %s is not in repository %s", digest, repo)
	}
	repository.unlink(digest)
	delete(repository.manifests, digest)
	for tag, d := range repository.tags {
		if d == digest {
			delete(repository.tags, tag)
		}
	}
	r.prune(repo)
	return nil
}

// unlink removes a manifest, if it is there, from the referrers of its subject.
func (repo *repository) unlink(digest oci.Digest) {
	m, ok := repo.manifests[digest]
	if !ok || m.info.Subject == nil {
		return
	}
	subject := m.info.Subject.Digest
	delete(repo.referrers[subject], digest)
	if len(repo.referrers[subject]) == 0 {
		delete(repo.referrers, subject)
	}
}

// DeleteTag implements oci.Deleter.
func (r *Registry) DeleteTag(ctx context.Context, repo, tag string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := oci.CheckTag(tag); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	repository, err := r.repo(repo)
	if err != nil {
		return err
	}
	if _, ok := repository.tags[tag]; !ok {
		return oci.ErrManifestUnknown.Withf("tag %s is not in repository %s", tag, repo)
	}
	delete(repository.tags, tag)
	return nil
}
