package stored

import (
	"context"
	"errors"
	"fmt"
	"io"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/oci"
)

// PushBlob implements oci.Writer.
func (r *Registry) PushBlob(ctx context.Context, repo string, desc oci.Descriptor, content io.Reader) (oci.Descriptor, error) {
	if err := check(ctx, repo, desc.Digest); err != nil {
		return oci.Descriptor{}, err
	}
	if err := r.admit(ctx, repo, desc.Digest, desc.Size); err != nil {
		return oci.Descriptor{}, err
	}
	u, err := r.store.StartUpload(ctx)
	if err != nil {
		return oci.Descriptor{}, err
	}
	_, err = copyContext(ctx, u, oci.VerifyReader(content, desc))
	if err == nil {
		err = r.commitBlob(ctx, u, repo, desc.Digest, desc.Size)
	}
	u.Close()
	if err != nil {
		_ = r.store.CancelUpload(context.WithoutCancel(ctx), u.ID()) // or it is swept
		return oci.Descriptor{}, fmt.Errorf("push blob %s to %s: %w", desc.Digest, repo, err)
	}
	return blobDescriptor(desc.Digest, desc.Size), nil
}

// admit returns an error early for a blob that will not be accepted. digest is
// empty when it isn't known yet.
func (r *Registry) admit(ctx context.Context, repo string, digest oci.Digest, size int64) error {
	if err := r.checkSize(repo, size); err != nil {
		return err
	}
	row, err := r.db.Repository(ctx, repo)
	if err == nil {
		err = writable(row.Attributes, "repository", repositoryTarget(repo))
	} else if errors.Is(err, index.ErrNotFound) {
		err = nil
	}
	if err != nil {
		return err
	}
	return r.checkRoom(ctx, repo, digest, size)
}

// checkRoom is checkQuota for a blob, which takes nothing if it is there.
func (r *Registry) checkRoom(ctx context.Context, repo string, digest oci.Digest, size int64) error {
	err := r.checkQuota(ctx, repo, size)
	if errors.Is(err, oci.ErrDenied) && digest != "" {
		if _, serr := r.store.Stat(ctx, layerKey(repo, digest)); serr == nil {
			return nil
		}
	}
	return err
}

// commitBlob makes an upload a blob. Its content has been verified, so an object
// that exists has the same.
func (r *Registry) commitBlob(ctx context.Context, u storage.Upload, repo string, digest oci.Digest, size int64) error {
	return r.putBlob(ctx, repo, digest, size, func() error { return u.Commit(ctx, layerKey(repo, digest)) })
}

// putBlob makes a blob's row, and then its object with put.
func (r *Registry) putBlob(ctx context.Context, repo string, digest oci.Digest, size int64, put func() error) error {
	unlock, err := r.write(ctx, repo)
	if err != nil {
		return err
	}
	defer unlock()
	if err := r.checkRoom(ctx, repo, digest, size); err != nil {
		return err
	}
	err = r.db.Update(ctx, func(tx *index.Tx) error {
		tx.PutBlob(index.Blob{Repo: repo, Digest: digest, Size: size, Touched: now()})
		return nil
	})
	if err != nil {
		return err
	}
	if err := put(); !errors.Is(err, storage.ErrExists) {
		return err
	}
	return nil
}

// MountBlob implements oci.Writer.
func (r *Registry) MountBlob(ctx context.Context, from, to string, digest oci.Digest) (oci.Descriptor, error) {
	if err := check(ctx, from, digest); err != nil {
		return oci.Descriptor{}, err
	}
	if err := oci.CheckRepository(to); err != nil {
		return oci.Descriptor{}, err
	}
	if from == to {
		return r.ResolveBlob(ctx, to, digest)
	}
	if err := r.checkReadable(ctx, from); err != nil {
		return oci.Descriptor{}, err
	}
	size, err := r.store.Stat(ctx, layerKey(from, digest))
	if err == nil {
		err = r.putBlob(ctx, to, digest, size, func() error {
			return r.store.Link(ctx, layerKey(from, digest), layerKey(to, digest))
		})
	}
	if err != nil {
		return oci.Descriptor{}, r.missing(ctx, from, err, blobUnknown(from, digest))
	}
	return blobDescriptor(digest, size), nil
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
