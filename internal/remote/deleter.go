package remote

import (
	"context"
	"net/http"

	"sluice/oci"
)

// DeleteBlob implements oci.Deleter.
func (r *Registry) DeleteBlob(ctx context.Context, repo string, digest oci.Digest) error {
	if err := checkBlob(repo, digest); err != nil {
		return err
	}
	return r.delete(ctx, "blob "+digest.String(), repo, "/blobs/"+digest.String(), oci.ErrBlobUnknown)
}

// DeleteManifest implements oci.Deleter. Where the registry has no referrers
// API, a manifest with a subject is removed from the subject's tag of the
// referrers tag schema as well.
func (r *Registry) DeleteManifest(ctx context.Context, repo string, digest oci.Digest) error {
	if err := checkBlob(repo, digest); err != nil {
		return err
	}
	subject, err := r.subjectOf(ctx, repo, digest)
	if err != nil {
		return err
	}
	if err := r.delete(ctx, "manifest "+digest.String(), repo, "/manifests/"+digest.String(), oci.ErrManifestUnknown); err != nil {
		return err
	}
	if subject == "" {
		return nil
	}
	return r.removeFromTagIndex(ctx, repo, subject, digest)
}

// subjectOf returns the digest of a manifest's subject, or "".
func (r *Registry) subjectOf(ctx context.Context, repo string, digest oci.Digest) (oci.Digest, error) {
	m, err := r.GetManifest(ctx, repo, digest.String())
	if err != nil {
		if isUnknown(err) || ctx.Err() != nil {
			return "", err
		}
		return "", nil // what can't be read may still be deleted
	}
	info, err := oci.ParseManifestInfo(m.Content, m.Descriptor.MediaType)
	if err != nil || info.Subject == nil {
		return "", nil // likewise
	}
	return info.Subject.Digest, nil
}

// DeleteTag implements oci.Deleter.
func (r *Registry) DeleteTag(ctx context.Context, repo, tag string) error {
	if err := oci.CheckRepository(repo); err != nil {
		return err
	}
	if err := oci.CheckTag(tag); err != nil {
		return err
	}
	return r.delete(ctx, "tag "+tag, repo, "/manifests/"+tag, oci.ErrManifestUnknown)
}

func (r *Registry) delete(ctx context.Context, thing, repo, path string, unknown *oci.Error) error {
	c := call{
		what:   "deleting " + thing + " of " + repo,
		method: http.MethodDelete,
		url:    r.endpoint(repo+path, nil),
		scopes: remove(repo),
	}
	resp, err := r.do(ctx, c)
	if err != nil {
		return err
	}
	switch resp.StatusCode {
	case http.StatusAccepted, http.StatusOK, http.StatusNoContent:
		drain(resp)
		return nil
	}
	return r.failure(c, resp, unknown)
}
