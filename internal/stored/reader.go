package stored

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"sluice/internal/storage"
	"sluice/oci"
)

// maxTagSize bounds the content of a tag's object, which is a digest.
const maxTagSize = 256

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
	o, err := r.store.Open(ctx, layerKey(repo, digest), offset, length)
	if err != nil {
		return nil, r.missing(ctx, repo, err, blobUnknown(repo, digest))
	}
	return &storedBlob{canceled: ctx.Err, object: o, desc: blobDescriptor(digest, o.Size())}, nil
}

// ResolveBlob implements oci.Reader.
func (r *Registry) ResolveBlob(ctx context.Context, repo string, digest oci.Digest) (oci.Descriptor, error) {
	if err := check(ctx, repo, digest); err != nil {
		return oci.Descriptor{}, err
	}
	size, err := r.store.Stat(ctx, layerKey(repo, digest))
	if err != nil {
		return oci.Descriptor{}, r.missing(ctx, repo, err, blobUnknown(repo, digest))
	}
	return blobDescriptor(digest, size), nil
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
	unknown := oci.ErrManifestUnknown.Withf("manifest %s is not in repository %s", reference, repo)
	if digest != "" {
		m, err := r.manifest(ctx, repo, digest)
		return m, r.missing(ctx, repo, err, unknown)
	}
	// A tag that moves while we look may leave us with the digest of a
	// manifest that has been deleted; then it has another one by now.
	var m oci.Manifest
	for range 10 {
		if digest, err = r.tag(ctx, repo, tag); err == nil {
			m, err = r.manifest(ctx, repo, digest)
			if errors.Is(err, storage.ErrNotFound) {
				continue
			}
		}
		break
	}
	return m, r.missing(ctx, repo, err, unknown)
}

// ResolveManifest implements oci.Reader.
func (r *Registry) ResolveManifest(ctx context.Context, repo, reference string) (oci.Descriptor, error) {
	m, err := r.GetManifest(ctx, repo, reference)
	return m.Descriptor, err
}

// tag returns the digest that a tag points at, or storage.ErrNotFound.
func (r *Registry) tag(ctx context.Context, repo, tag string) (oci.Digest, error) {
	content, err := storage.ReadAll(ctx, r.store, tagKey(repo, tag), maxTagSize)
	if err != nil {
		return "", err
	}
	digest, err := oci.ParseDigest(string(content))
	if err != nil {
		return "", fmt.Errorf("stored tag %s of %s is damaged: it holds %.80q: push the tag again", tag, repo, content)
	}
	return digest, nil
}

// manifest returns a manifest that it has verified, or storage.ErrNotFound.
func (r *Registry) manifest(ctx context.Context, repo string, digest oci.Digest) (oci.Manifest, error) {
	content, err := storage.ReadAll(ctx, r.store, manifestKey(repo, digest), oci.MaxManifestSize)
	if err != nil {
		return oci.Manifest{}, err
	}
	// %v, not %w: to a client this is our failure and not a wrong digest of
	// theirs.
	if actual := digest.Algorithm().FromBytes(content); actual != digest {
		return oci.Manifest{}, fmt.Errorf("stored manifest %s of %s is damaged: its digest is %v: push it again", digest, repo, actual)
	}
	mediaType, err := mediaTypeOf(content)
	if err != nil {
		return oci.Manifest{}, fmt.Errorf("stored manifest %s of %s: %w", digest, repo, err)
	}
	return oci.Manifest{
		Descriptor: oci.Descriptor{MediaType: mediaType, Digest: digest, Size: int64(len(content))},
		Content:    content,
	}, nil
}

// mediaTypeOf returns the media type of a manifest that was accepted. One
// without the member mediaType is of an OCI type, since Docker's always have
// it, and indexes alone have the member manifests.
func mediaTypeOf(content []byte) (string, error) {
	var m struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
	}
	switch err := json.Unmarshal(content, &m); {
	case err != nil:
		return "", err
	case m.MediaType != "":
		return m.MediaType, nil
	case m.Manifests != nil:
		return oci.MediaTypeIndex, nil
	}
	return oci.MediaTypeImageManifest, nil
}

func blobUnknown(repo string, digest oci.Digest) *oci.Error {
	return oci.ErrBlobUnknown.Withf("blob %s is not in repository %s", digest, repo)
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
