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

// PushBlob implements oci.Writer.
func (r *Registry) PushBlob(ctx context.Context, repo string, desc oci.Descriptor, content io.Reader) (oci.Descriptor, error) {
	if err := check(ctx, repo, desc.Digest); err != nil {
		return oci.Descriptor{}, err
	}
	u, err := r.store.StartUpload(ctx)
	if err != nil {
		return oci.Descriptor{}, err
	}
	_, err = copyContext(ctx, u, oci.VerifyReader(content, desc))
	if err == nil {
		err = u.Commit(ctx, layerKey(repo, desc.Digest))
	}
	u.Close()
	if err != nil && !errors.Is(err, storage.ErrExists) { // what exists has the same content, since that was verified
		_ = r.store.CancelUpload(context.WithoutCancel(ctx), u.ID()) // or it is swept
		return oci.Descriptor{}, fmt.Errorf("push blob %s to %s: %w", desc.Digest, repo, err)
	}
	return blobDescriptor(desc.Digest, desc.Size), nil
}

// MountBlob implements oci.Writer.
func (r *Registry) MountBlob(ctx context.Context, from, to string, digest oci.Digest) (oci.Descriptor, error) {
	if err := check(ctx, from, digest); err != nil {
		return oci.Descriptor{}, err
	}
	if err := oci.CheckRepository(to); err != nil {
		return oci.Descriptor{}, err
	}
	size, err := r.store.Stat(ctx, layerKey(from, digest))
	if err == nil && from != to {
		err = r.store.Link(ctx, layerKey(from, digest), layerKey(to, digest))
	}
	if err != nil && !errors.Is(err, storage.ErrExists) {
		return oci.Descriptor{}, r.missing(ctx, from, err, blobUnknown(from, digest))
	}
	return blobDescriptor(digest, size), nil
}

// PushManifest implements oci.Writer. A reference of the form TAG@DIGEST is
// understood too; it is the only way to give a tag to a manifest under a digest
// that isn't sha256.
func (r *Registry) PushManifest(ctx context.Context, repo, reference, mediaType string, content []byte) (oci.Descriptor, error) {
	if err := check(ctx, repo); err != nil {
		return oci.Descriptor{}, err
	}
	tag, digest, err := splitReference(reference)
	if err != nil {
		return oci.Descriptor{}, err
	}
	info, err := oci.ParseManifestInfo(content, mediaType)
	if err != nil {
		return oci.Descriptor{}, err
	}
	if digest == "" {
		digest = oci.DigestOf(content)
	} else if actual := digest.Algorithm().FromBytes(content); actual != digest {
		return oci.Descriptor{}, oci.ErrDigestInvalid.Withf("manifest pushed to %s as %s has the digest %s", repo, digest, actual)
	}
	desc := oci.Descriptor{MediaType: mediaType, Digest: digest, Size: int64(len(content))}

	// Nothing that the manifest needs may be deleted between the check and
	// the moment from which on it is visible that something needs it.
	unlock := r.locks.share(repo)
	defer unlock()
	if !r.sparse {
		if err := r.checkReferences(ctx, repo, info); err != nil {
			return oci.Descriptor{}, fmt.Errorf("push manifest %s to %s: %w", digest, repo, err)
		}
	}
	if err := r.putManifest(ctx, repo, tag, desc, info, content); err != nil {
		return oci.Descriptor{}, fmt.Errorf("push manifest %s to %s: %w", digest, repo, err)
	}
	return desc, nil
}

func (r *Registry) checkReferences(ctx context.Context, repo string, info *oci.ManifestInfo) error {
	stat := func(key string) (int64, error) {
		size, err := r.store.Stat(ctx, key)
		if errors.Is(err, storage.ErrNotFound) {
			err = oci.ErrBlobUnknown
		}
		return size, err
	}
	return info.CheckReferences(
		func(d oci.Digest) (int64, error) { return stat(layerKey(repo, d)) },
		func(d oci.Digest) (int64, error) { return stat(manifestKey(repo, d)) },
	)
}

// putManifest writes the objects of a manifest in the order that Stored
// explains.
func (r *Registry) putManifest(ctx context.Context, repo, tag string, desc oci.Descriptor, info *oci.ManifestInfo, content []byte) error {
	if info.Subject != nil {
		link, err := json.Marshal(info.Referrer(desc))
		if err != nil {
			return err
		}
		if err := r.store.Put(ctx, referrerKey(repo, info.Subject.Digest, desc.Digest), link); err != nil {
			return err
		}
	}
	if err := r.store.Put(ctx, manifestKey(repo, desc.Digest), content); err != nil {
		return err
	}
	if tag == "" {
		return nil
	}
	return r.store.Put(ctx, tagKey(repo, tag), []byte(desc.Digest.String()))
}

// copySize is the buffer of a blob that is being received: large enough that
// system calls don't matter, small enough for thousands of pushes at a time.
const copySize = 128 << 10

// copyContext copies until r ends, or ctx.
func copyContext(ctx context.Context, w io.Writer, r io.Reader) (int64, error) {
	buf := make([]byte, copySize)
	var total int64
	for {
		if err := ctx.Err(); err != nil {
			return total, err
		}
		n, err := r.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				return total, werr
			}
			total += int64(n)
		}
		if err == io.EOF {
			return total, ctx.Err()
		}
		if err != nil {
			return total, err
		}
	}
}
