package stored

import (
	"context"
	"errors"
	"io"
	"time"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/oci"
)

// GetBlob implements oci.Reader.
func (r *Registry) GetBlob(ctx context.Context, repo string, digest oci.Digest) (oci.BlobReader, error) {
	return r.openBlob(ctx, repo, digest, 0, -1)
}

// GetBlobRange implements oci.Reader.
func (r *Registry) GetBlobRange(ctx context.Context, repo string, digest oci.Digest, offset, length int64) (oci.BlobReader, error) {
	b, err := r.openBlob(ctx, repo, digest, offset, length)
	if err == nil && offset == b.object.Size() {
		b.Close()
		err = storage.ErrRange // storage lets a range begin at the end
	}
	if errors.Is(err, storage.ErrRange) {
		return nil, oci.ErrRangeInvalid.Withf("blob %s of %s has no byte at offset %d", digest, repo, offset)
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

func (r *Registry) openBlob(ctx context.Context, repo string, digest oci.Digest, offset, length int64) (*storedBlob, error) {
	if err := check(ctx, repo, digest); err != nil {
		return nil, err
	}
	if err := r.checkReadable(ctx, repo); err != nil {
		return nil, err
	}
	o, err := r.store.Open(ctx, layerKey(repo, digest), offset, length)
	if err != nil {
		return nil, r.missing(ctx, repo, err, blobUnknown(repo, digest))
	}
	return &storedBlob{canceled: ctx.Err, object: o, desc: blobDescriptor(digest, o.Size())}, nil
}

// ResolveBlob implements oci.Reader. Whoever learns here that a blob is there
// may rely on it for as long as garbage collection's grace lasts.
func (r *Registry) ResolveBlob(ctx context.Context, repo string, digest oci.Digest) (oci.Descriptor, error) {
	if err := check(ctx, repo, digest); err != nil {
		return oci.Descriptor{}, err
	}
	if err := r.checkReadable(ctx, repo); err != nil {
		return oci.Descriptor{}, err
	}
	unlock, err := r.share(ctx, repo)
	if err != nil {
		return oci.Descriptor{}, err
	}
	defer unlock()
	size, err := r.store.Stat(ctx, layerKey(repo, digest))
	if err != nil {
		return oci.Descriptor{}, r.missing(ctx, repo, err, blobUnknown(repo, digest))
	}
	return blobDescriptor(digest, size), r.db.Touch(ctx, repo, digest)
}

// FindBlob returns a repository that has a blob and may be pulled from, "" if
// there is none: for mounting from anywhere.
func (r *Registry) FindBlob(ctx context.Context, digest oci.Digest) (repo string, err error) {
	if _, err := oci.ParseDigest(digest.String()); err != nil {
		return "", err
	}
	repo, _, err = r.db.FindBlob(ctx, digest)
	if err == nil {
		err = r.checkReadable(ctx, repo)
	}
	if errors.Is(err, index.ErrNotFound) || errors.Is(err, oci.ErrDenied) {
		return "", nil
	}
	return repo, err
}

// BlobURL returns a URL from which a client can read a blob by itself until ttl
// is over, or "" if the store has none to give.
//
// Errors: as GetBlob.
func (r *Registry) BlobURL(ctx context.Context, repo string, digest oci.Digest, ttl time.Duration) (string, error) {
	if err := check(ctx, repo, digest); err != nil {
		return "", err
	}
	signer, ok := r.store.(storage.Signer)
	if !ok {
		return "", nil
	}
	if err := r.checkReadable(ctx, repo); err != nil {
		return "", err
	}
	url, err := signer.SignedURL(ctx, layerKey(repo, digest), ttl)
	return url, r.missing(ctx, repo, err, blobUnknown(repo, digest))
}

// checkReadable returns an error if nothing may be pulled from a repository.
func (r *Registry) checkReadable(ctx context.Context, repo string) error {
	a, err := r.attributes(ctx, repo)
	if err != nil {
		return err
	}
	return readable(a, "repository", repositoryTarget(repo))
}

// GetManifest implements oci.Reader.
func (r *Registry) GetManifest(ctx context.Context, repo, reference string) (oci.Manifest, error) {
	if err := check(ctx, repo); err != nil {
		return oci.Manifest{}, err
	}
	tag, digest, err := splitReference(reference)
	if err != nil {
		return oci.Manifest{}, err
	}
	if err := r.checkReadable(ctx, repo); err != nil {
		return oci.Manifest{}, err
	}
	unknown := manifestUnknown(repo, reference)
	if digest != "" {
		m, err := r.manifest(ctx, repo, digest)
		return m, r.missing(ctx, repo, err, unknown)
	}
	// A tag that moves while we look may leave us with the digest of a
	// manifest that has been deleted; then it has another one by now.
	var m oci.Manifest
	for range 10 {
		var t index.Tag
		if t, err = r.db.Tag(ctx, repo, tag); err != nil {
			break
		}
		if err := readable(t.Attributes, "tag", tagTarget(repo, tag)); err != nil {
			return m, err
		}
		m, err = r.manifest(ctx, repo, t.Digest)
		if !errors.Is(err, storage.ErrNotFound) && !errors.Is(err, index.ErrNotFound) {
			break
		}
	}
	return m, r.missing(ctx, repo, err, unknown)
}

// ResolveManifest implements oci.Reader.
func (r *Registry) ResolveManifest(ctx context.Context, repo, reference string) (oci.Descriptor, error) {
	m, err := r.GetManifest(ctx, repo, reference)
	return m.Descriptor, err
}

// manifest returns a manifest that may be pulled and that it has verified.
// Errors: index.ErrNotFound, and storage.ErrNotFound for what is being deleted.
func (r *Registry) manifest(ctx context.Context, repo string, digest oci.Digest) (oci.Manifest, error) {
	row, err := r.db.Manifest(ctx, repo, digest)
	if err != nil {
		return oci.Manifest{}, err
	}
	if err := readable(row.Attributes, "manifest", manifestTarget(repo, digest)); err != nil {
		return oci.Manifest{}, err
	}
	content, err := r.readManifest(ctx, repo, digest)
	if err != nil {
		return oci.Manifest{}, err
	}
	return oci.Manifest{Descriptor: manifestDescriptor(row), Content: content}, nil
}

func manifestDescriptor(m index.Manifest) oci.Descriptor {
	return oci.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: m.Size}
}

func blobDescriptor(digest oci.Digest, size int64) oci.Descriptor {
	return oci.Descriptor{MediaType: oci.MediaTypeOctetStream, Digest: digest, Size: size}
}

// storedBlob is an open blob, or a range of one.
type storedBlob struct {
	canceled func() error // of the context
	object   storage.Object
	desc     oci.Descriptor
}

func (b *storedBlob) Descriptor() oci.Descriptor { return b.desc }

func (b *storedBlob) Close() error { return b.object.Close() }

func (b *storedBlob) Read(p []byte) (int, error) {
	if err := b.canceled(); err != nil {
		return 0, err
	}
	return b.object.Read(p)
}

// WriteTo keeps the way open for sendfile: see storage.Object.
func (b *storedBlob) WriteTo(w io.Writer) (int64, error) {
	if err := b.canceled(); err != nil {
		return 0, err
	}
	return b.object.WriteTo(w)
}
