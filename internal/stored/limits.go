package stored

import (
	"context"
	"io"

	"sluice/oci"
)

// checkSize returns an error for a blob that is larger than is allowed.
func (r *Registry) checkSize(repo string, size int64) error {
	if limit := r.opts.MaxBlob; limit > 0 && size > limit {
		return oci.ErrSizeInvalid.Withf("blob of %d bytes or more pushed to %s: this registry allows %d", size, repo, limit)
	}
	return nil
}

// checkQuota returns an error if a repository may not grow by so many bytes.
func (r *Registry) checkQuota(ctx context.Context, repo string, more int64) error {
	quota := r.opts.RepositoryQuota
	if quota <= 0 {
		return nil
	}
	usage, err := r.db.Usage(ctx, repo)
	if err != nil {
		return err
	}
	if usage.Size+more > quota {
		return oci.ErrDenied.Withf("repository %s takes %d bytes and its quota is %d: %d more don't fit; delete images, or have the quota raised", repo, usage.Size, quota, more)
	}
	return nil
}

// bounded returns a reader of what is appended to a blob that has size bytes. It
// fails, and yields nothing beyond, where the blob gets too large.
func (r *Registry) bounded(repo string, size int64, content io.Reader) io.Reader {
	if r.opts.MaxBlob <= 0 {
		return content
	}
	return &boundedReader{r: content, left: r.opts.MaxBlob - size, err: r.checkSize(repo, r.opts.MaxBlob+1)}
}

type boundedReader struct {
	r    io.Reader
	left int64
	err  error // once something comes after what is left
}

func (b *boundedReader) Read(p []byte) (int, error) {
	if b.left <= 0 {
		p = make([]byte, 1)
	} else if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.r.Read(p)
	if n > 0 && b.left <= 0 {
		return 0, b.err
	}
	b.left -= int64(n)
	return n, err
}
