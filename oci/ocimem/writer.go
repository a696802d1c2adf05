package ocimem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"sluice/oci"
)

// PushBlob implements oci.Writer.
func (r *Registry) PushBlob(ctx context.Context, repo string, desc oci.Descriptor, src io.Reader) (oci.Descriptor, error) {
	if err := oci.CheckRepository(repo); err != nil {
		return oci.Descriptor{}, err
	}
	// The buffer grows with what comes, not with what desc promises.
	var content bytes.Buffer
	if _, err := io.Copy(&content, withContext(ctx, oci.VerifyReader(src, desc))); err != nil {
		return oci.Descriptor{}, fmt.Errorf("pushing blob %s to %s: %w", desc.Digest, repo, err)
	}
	return r.putBlob(repo, desc.Digest, content.Bytes()), nil
}

// putBlob stores content, which it keeps, under digest, which has been verified.
func (r *Registry) putBlob(repo string, digest oci.Digest, content []byte) oci.Descriptor {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.makeRepo(repo).blobs[digest] = content
	return blobDescriptor(digest, content)
}

// MountBlob implements oci.Writer.
func (r *Registry) MountBlob(ctx context.Context, from, to string, digest oci.Digest) (oci.Descriptor, error) {
	if err := oci.CheckRepository(to); err != nil {
		return oci.Descriptor{}, err
	}
	content, err := r.blob(ctx, from, digest)
	if err != nil {
		return oci.Descriptor{}, err
	}
	return r.putBlob(to, digest, content), nil
}

// PushManifest implements oci.Writer.
func (r *Registry) PushManifest(ctx context.Context, repo, reference, mediaType string, content []byte) (oci.Descriptor, error) {
	if err := ctx.Err(); err != nil {
		return oci.Descriptor{}, err
	}
	if err := oci.CheckRepository(repo); err != nil {
		return oci.Descriptor{}, err
	}
	digest, err := parseTarget(reference)
	if err != nil {
		return oci.Descriptor{}, err
	}
	info, err := oci.ParseManifestInfo(content, mediaType)
	if err != nil {
		return oci.Descriptor{}, err
	}
	tag := ""
	if digest == "" {
		tag, digest = reference, oci.DigestOf(content)
	} else if actual := digest.Algorithm().FromBytes(content); actual != digest {
		return oci.Descriptor{}, oci.ErrDigestInvalid.Withf("manifest pushed to %s as %s has the digest %s", repo, digest, actual)
	}
	m := &manifest{
		desc:    oci.Descriptor{MediaType: mediaType, Digest: digest, Size: int64(len(content))},
		content: bytes.Clone(content),
		info:    info,
	}
	if err := r.putManifest(repo, tag, m); err != nil {
		return oci.Descriptor{}, err
	}
	return m.desc, nil
}

// putManifest stores m if what it refers to is there, and points tag at it
// unless that is empty.
func (r *Registry) putManifest(name, tag string, m *manifest) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	repo := r.makeRepo(name)
	defer r.prune(name) // if nothing has been stored in a new one
	err := m.info.CheckReferences(func(digest oci.Digest) (int64, error) {
		content, err := repo.blob(name, digest)
		return int64(len(content)), err
	}, func(digest oci.Digest) (int64, error) {
		if m, ok := repo.manifests[digest]; ok {
			return m.desc.Size, nil
		}
		return 0, oci.ErrManifestUnknown
	})
	if err != nil {
		return fmt.Errorf("pushing manifest %s to %s: %w", m.desc.Digest, name, err)
	}
	repo.unlink(m.desc.Digest) // pushed before, perhaps with another media type
	repo.manifests[m.desc.Digest] = m
	if subject := m.info.Subject; subject != nil {
		if repo.referrers[subject.Digest] == nil {
			repo.referrers[subject.Digest] = map[oci.Digest]oci.Descriptor{}
		}
		repo.referrers[subject.Digest][m.desc.Digest] = m.info.Referrer(m.desc)
	}
	if tag != "" {
		repo.tags[tag] = m.desc.Digest
	}
	return nil
}

// withContext returns a reader of r that fails once ctx is done.
func withContext(ctx context.Context, r io.Reader) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		n, err := r.Read(p)
		if err != nil && !errors.Is(err, io.EOF) {
			return n, err
		}
		if ctxErr := ctx.Err(); ctxErr != nil {
			return n, ctxErr
		}
		return n, err
	})
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
