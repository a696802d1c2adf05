package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"sluice/oci"
)

const (
	// wholeSize is up to which size blobs are sent in one request: to send them
	// again costs less than the requests of an upload.
	wholeSize = 8 << 20

	// uploadStep is how many bytes are appended to an upload in one call, after
	// which its ID is remembered anew: with some registries it changes. It is
	// the largest chunk that the client of package remote sends.
	uploadStep = 64 << 20

	// cancelTime bounds giving up an upload.
	cancelTime = 10 * time.Second
)

// uploading is a blob on its way through an oci.Upload.
type uploading struct {
	*copier
	s       *stream
	up      oci.Upload
	earlier bool // the upload's beginning is of an earlier run
}

// upload sends a blob piece by piece: what the target has acknowledged is not
// sent again.
func (c *copier) upload(ctx context.Context, s *stream) error {
	u := &uploading{copier: c, s: s}
	err := u.begin(ctx)
	for failed := 0; ; {
		var before, after int64
		if err == nil {
			before = u.up.Size()
			if err = u.step(ctx); err == nil && before == s.desc.Size {
				c.state.forget(s.desc.Digest)
				return nil
			}
			after = u.up.Size()
			c.state.remember(s.desc.Digest, u.up.ID())
		}
		if after > before {
			failed = 0
		}
		if err == nil {
			continue
		}
		if u.refused(err) && after == 0 {
			u.giveUp(ctx, err)
			return c.push(ctx, s) // the target takes no blobs in pieces
		}
		failed++
		if failed >= c.opts.Attempts || final(ctx, err) {
			u.giveUp(ctx, err)
			return err
		}
		c.pause(ctx, s.desc.Digest, failed, err)
		err = u.again(ctx)
	}
}

// begin continues the upload of an earlier run, or starts one.
func (u *uploading) begin(ctx context.Context) error {
	if id := u.state.recall(u.s.desc.Digest); id != "" {
		up, err := u.dst.Registry.ResumeUpload(ctx, u.dst.Repo, id)
		if err == nil && up.Size() <= u.s.desc.Size {
			u.up, u.earlier = up, up.Size() > 0
			u.opts.Log.InfoContext(ctx, "upload is continued", "digest", u.s.desc.Digest, "offset", up.Size())
			return nil
		}
		u.state.forget(u.s.desc.Digest)
	}
	return u.start(ctx)
}

func (u *uploading) start(ctx context.Context) error {
	up, err := u.dst.Registry.StartUpload(ctx, u.dst.Repo)
	if err != nil {
		return fmt.Errorf("starting an upload to the target: %w", err)
	}
	u.up, u.earlier = up, false
	u.state.remember(u.s.desc.Digest, up.ID())
	return nil
}

// step appends the next piece or, after the last, commits.
func (u *uploading) step(ctx context.Context) error {
	offset, size := u.up.Size(), u.s.desc.Size
	if offset > size {
		return u.s.explain(oci.ErrBlobUploadInvalid.Withf("the target says that it has %d bytes of it", offset))
	}
	if offset == size {
		return u.commit(ctx)
	}
	u.s.seek(offset)
	err := u.up.Append(ctx, offset, io.LimitReader(u.s, min(uploadStep, size-offset)))
	if err == nil && u.up.Size() <= offset {
		err = oci.ErrBlobUploadInvalid.Withf("the target took nothing and said nothing")
	}
	if err != nil {
		return u.s.explain(err)
	}
	return nil
}

func (u *uploading) commit(ctx context.Context) error {
	if err := u.s.check(); err != nil {
		return err
	}
	_, err := u.up.Commit(ctx, u.s.desc.Digest)
	if err == nil {
		return nil
	}
	if u.earlier && errors.Is(err, oci.ErrDigestInvalid) {
		// What came before wasn't this blob. Only this once it begins anew.
		u.opts.Log.WarnContext(ctx, "a continued upload had the wrong content and begins anew", "digest", u.s.desc.Digest)
		u.giveUp(ctx, err)
		u.s.close()
		return errors.Join(errStale, u.start(ctx))
	}
	// The answer of a commit that succeeded may have been lost.
	if there, rerr := u.dst.Registry.ResolveBlob(ctx, u.dst.Repo, u.s.desc.Digest); rerr == nil && there.Size == u.s.desc.Size {
		return nil
	}
	return u.s.explain(err)
}

// errStale is of an upload that has been replaced by a new one.
var errStale = errors.New("the upload of an earlier run was not this blob")

// refused reports whether the target won't have uploads in pieces.
func (u *uploading) refused(err error) bool {
	return u.s.err == nil && (errors.Is(err, oci.ErrUnsupported) || errors.Is(err, oci.ErrBlobUploadInvalid) || errors.Is(err, oci.ErrSizeInvalid))
}

// again finds out where the upload goes on after a failure.
func (u *uploading) again(ctx context.Context) error {
	if u.up == nil {
		return u.start(ctx)
	}
	up, err := u.dst.Registry.ResumeUpload(ctx, u.dst.Repo, u.up.ID())
	switch {
	case err == nil && up.Size() <= u.s.desc.Size:
		u.up = up
	case err == nil, errors.Is(err, oci.ErrBlobUploadUnknown):
		return u.start(ctx)
	default:
		return fmt.Errorf("continuing the upload to the target: %w", err)
	}
	return nil
}

// giveUp leaves an upload that failed with err to the next run, if that will
// know of it and can go on with it, and discards it otherwise. That it can't be
// canceled is no news: registries drop uploads that nobody continues.
func (u *uploading) giveUp(ctx context.Context, err error) {
	if u.up == nil {
		return
	}
	useless := errors.Is(err, oci.ErrDigestInvalid) || u.refused(err)
	if u.state != nil && !useless {
		return
	}
	u.state.forget(u.s.desc.Digest)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cancelTime)
	defer cancel()
	_ = u.up.Cancel(ctx)
}
