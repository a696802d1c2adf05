package ocimem

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"sync"

	"sluice/oci"
)

// upload is a blob on its way. Two callers may hold the same one, because
// ResumeUpload returns it again; mu keeps that safe.
type upload struct {
	registry *Registry
	repo, id string

	mu      sync.Mutex // taken before Registry.mu; held while reading from the caller
	content []byte
	over    bool
}

// StartUpload implements oci.Writer.
func (r *Registry) StartUpload(ctx context.Context, repo string) (oci.Upload, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := oci.CheckRepository(repo); err != nil {
		return nil, err
	}
	u := &upload{registry: r, repo: repo, id: rand.Text()}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.uploads[u.id] = u
	return u, nil
}

// ResumeUpload implements oci.Writer.
func (r *Registry) ResumeUpload(ctx context.Context, repo, id string) (oci.Upload, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := oci.CheckRepository(repo); err != nil {
		return nil, err
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	u, ok := r.uploads[id]
	if !ok || u.repo != repo {
		return nil, oci.ErrBlobUploadUnknown.Withf("upload %.100q to %s is unknown", id, repo)
	}
	return u, nil
}

func (u *upload) ID() string { return u.id }

func (u *upload) Size() int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return int64(len(u.content))
}

func (u *upload) Append(ctx context.Context, offset int64, r io.Reader) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.check(); err != nil {
		return err
	}
	if size := int64(len(u.content)); offset != size {
		return oci.ErrRangeInvalid.Withf("upload to %s: append at %d, and it has %d bytes", u.repo, offset, size)
	}
	if _, err := io.Copy(appender{u}, withContext(ctx, r)); err != nil {
		return fmt.Errorf("upload to %s: %w", u.repo, err)
	}
	return nil
}

// appender writes to the end of an upload whose mu is held.
type appender struct{ u *upload }

func (a appender) Write(p []byte) (int, error) {
	a.u.content = append(a.u.content, p...)
	return len(p), nil
}

func (u *upload) Commit(ctx context.Context, digest oci.Digest) (oci.Descriptor, error) {
	if err := ctx.Err(); err != nil {
		return oci.Descriptor{}, err
	}
	if _, err := oci.ParseDigest(digest.String()); err != nil {
		return oci.Descriptor{}, err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.check(); err != nil {
		return oci.Descriptor{}, err
	}
	content := u.end()
	if actual := digest.Algorithm().FromBytes(content); actual != digest {
		return oci.Descriptor{}, oci.ErrDigestInvalid.Withf("upload to %s of %d bytes has the digest %s, not %s", u.repo, len(content), actual, digest)
	}
	return u.registry.putBlob(u.repo, digest, content), nil
}

func (u *upload) Cancel(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.check(); err != nil {
		return err
	}
	u.end()
	return nil
}

// check returns ErrBlobUploadUnknown if the upload is over. The caller holds mu.
func (u *upload) check() error {
	if u.over {
		return oci.ErrBlobUploadUnknown.Withf("upload to %s is over", u.repo)
	}
	return nil
}

// end makes the upload over and returns what was uploaded. The caller holds mu.
func (u *upload) end() []byte {
	u.registry.mu.Lock()
	defer u.registry.mu.Unlock()
	delete(u.registry.uploads, u.id)
	content := u.content
	u.over, u.content = true, nil
	return content
}
