package ocimem

import (
	"bytes"
	"context"
	"io/fs"
	"strings"

	"sluice/oci"
)

// GetBlob implements oci.Reader.
func (r *Registry) GetBlob(ctx context.Context, repo string, digest oci.Digest) (oci.BlobReader, error) {
	content, err := r.blob(ctx, repo, digest)
	if err != nil {
		return nil, err
	}
	return newBlobReader(ctx, blobDescriptor(digest, content), content), nil
}

// GetBlobRange implements oci.Reader.
func (r *Registry) GetBlobRange(ctx context.Context, repo string, digest oci.Digest, offset, length int64) (oci.BlobReader, error) {
	content, err := r.blob(ctx, repo, digest)
	if err != nil {
		return nil, err
	}
	size := int64(len(content))
	if offset < 0 || offset >= size {
		return nil, oci.ErrRangeInvalid.Withf("blob %s of %s: no byte at offset %d of %d", digest, repo, offset, size)
	}
	part := content[offset:]
	if length >= 0 && length < int64(len(part)) {
		part = part[:length]
	}
	return newBlobReader(ctx, blobDescriptor(digest, content), part), nil
}

// ResolveBlob implements oci.Reader.
func (r *Registry) ResolveBlob(ctx context.Context, repo string, digest oci.Digest) (oci.Descriptor, error) {
	content, err := r.blob(ctx, repo, digest)
	if err != nil {
		return oci.Descriptor{}, err
	}
	return blobDescriptor(digest, content), nil
}

// GetManifest implements oci.Reader.
func (r *Registry) GetManifest(ctx context.Context, repo, reference string) (oci.Manifest, error) {
	m, err := r.manifest(ctx, repo, reference)
	if err != nil {
		return oci.Manifest{}, err
	}
	return oci.Manifest{Descriptor: m.desc, Content: bytes.Clone(m.content)}, nil
}

// ResolveManifest implements oci.Reader.
func (r *Registry) ResolveManifest(ctx context.Context, repo, reference string) (oci.Descriptor, error) {
	m, err := r.manifest(ctx, repo, reference)
	if err != nil {
		return oci.Descriptor{}, err
	}
	return m.desc, nil
}

func (r *Registry) blob(ctx context.Context, name string, digest oci.Digest) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if _, err := oci.ParseDigest(digest.String()); err != nil {
		return nil, err
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	repo, err := r.repo(name)
	if err != nil {
		return nil, err
	}
	return repo.blob(name, digest)
}

func (repo *repository) blob(name string, digest oci.Digest) ([]byte, error) {
	content, ok := repo.blobs[digest]
	if !ok {
		return nil, oci.ErrBlobUnknown.Withf("blob %s is not in repository %s", digest, name)
	}
	return content, nil
}

func (r *Registry) manifest(ctx context.Context, name, reference string) (*manifest, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	digest, err := parseTarget(reference)
	if err != nil {
		return nil, err
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	repo, err := r.repo(name)
	if err != nil {
		return nil, err
	}
	if digest == "" {
		digest = repo.tags[reference]
	}
	m, ok := repo.manifests[digest]
	if !ok {
		return nil, oci.ErrManifestUnknown.Withf("manifest %s is not in repository %s", reference, name)
	}
	return m, nil
}

// parseTarget tells a digest from a tag, for which it returns "".
func parseTarget(reference string) (oci.Digest, error) {
	if strings.Contains(reference, ":") {
		return oci.ParseDigest(reference)
	}
	return "", oci.CheckTag(reference)
}

// blobReader reads from memory for as long as its context lasts.
type blobReader struct {
	err     func() error // that of the context
	desc    oci.Descriptor
	content *bytes.Reader
	closed  bool
}

func newBlobReader(ctx context.Context, desc oci.Descriptor, part []byte) *blobReader {
	return &blobReader{err: ctx.Err, desc: desc, content: bytes.NewReader(part)}
}

func (b *blobReader) Descriptor() oci.Descriptor { return b.desc }

func (b *blobReader) Read(p []byte) (int, error) {
	if b.closed {
		return 0, &fs.PathError{Op: "read", Path: b.desc.Digest.String(), Err: fs.ErrClosed}
	}
	if err := b.err(); err != nil {
		return 0, err
	}
	return b.content.Read(p)
}

func (b *blobReader) Close() error {
	b.closed = true
	return nil
}
