package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"sync"
	"time"

	"sluice/oci"
)

// cleanupTimeout bounds the request that removes what a failed one left.
const cleanupTimeout = 10 * time.Second

// PushBlob implements oci.Writer. It sends the blob in one request, and again
// after a lost connection if r is an io.Seeker.
func (r *Registry) PushBlob(ctx context.Context, repo string, desc oci.Descriptor, src io.Reader) (oci.Descriptor, error) {
	if err := checkBlob(repo, desc.Digest); err != nil {
		return oci.Descriptor{}, err
	}
	if desc.Size < 0 {
		return oci.Descriptor{}, oci.ErrSizeInvalid.Withf("pushing blob %s to %s: %d is not a size", desc.Digest, repo, desc.Size)
	}
	source := newSource(src, desc, ctx.Err)
	defer source.detach()
	for attempt := 0; ; attempt++ {
		err := r.pushBlob(ctx, repo, desc, source)
		if err == nil {
			return oci.Descriptor{MediaType: oci.MediaTypeOctetStream, Digest: desc.Digest, Size: desc.Size}, nil
		}
		// What the source did explains whatever the transport made of it.
		if cause := source.failed(); cause != nil {
			return oci.Descriptor{}, fmt.Errorf("pushing blob %s to %s: %w", desc.Digest, repo, cause)
		}
		var lost *lostError
		if !errors.As(err, &lost) || !source.rewinds() || attempt >= r.opts.Retries {
			return oci.Descriptor{}, err
		}
		r.opts.Log.Debug("blob is pushed again", "digest", desc.Digest, "host", r.host, "error", err)
		select {
		case <-ctx.Done():
			return oci.Descriptor{}, fmt.Errorf("pushing blob %s to %s: %w", desc.Digest, repo, ctx.Err())
		case <-time.After(minBackoff << min(attempt, 16)):
		}
	}
}

// lostError marks a failure that another attempt may not have.
type lostError struct{ error }

func (e *lostError) Unwrap() error { return e.error }

// pushBlob is one attempt of PushBlob.
func (r *Registry) pushBlob(ctx context.Context, repo string, desc oci.Descriptor, source *source) error {
	location, err := r.startUpload(ctx, repo, nil)
	if err != nil {
		return err
	}
	c := call{
		what:   "pushing blob " + desc.Digest.String() + " to " + repo,
		method: http.MethodPut,
		url:    withDigest(location, desc.Digest),
		header: http.Header{"Content-Type": {oci.MediaTypeOctetStream}},
		scopes: push(repo),
		body:   source.open,
		size:   desc.Size,
		once:   !source.rewinds(),
	}
	if desc.Size == 0 {
		// No body is sent, so nothing else would find out that there is one.
		body, err := source.open()
		if err == nil {
			_, err = io.Copy(io.Discard, body)
		}
		if err != nil {
			r.abandon(ctx, repo, location)
			return err
		}
		c.body = nil
	}
	resp, err := r.do(ctx, c)
	if err != nil {
		r.abandon(ctx, repo, location)
		if canRetry(nil, err) {
			return &lostError{err}
		}
		return err
	}
	if resp.StatusCode != http.StatusCreated {
		again := canRetry(resp, nil)
		err := r.failure(c, resp, oci.ErrBlobUploadUnknown)
		r.abandon(ctx, repo, location)
		if again {
			return &lostError{err}
		}
		return err
	}
	defer drain(resp)
	return r.checkBlobAnswer(c, resp, desc.Digest)
}

// abandon removes an upload that failed. If that fails too, the server will
// forget the upload by itself.
func (r *Registry) abandon(ctx context.Context, repo string, location *url.URL) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	resp, err := r.do(ctx, call{
		what: "canceling an upload to " + repo, method: http.MethodDelete, url: location, scopes: push(repo),
	})
	if err == nil {
		drain(resp)
	}
}

// source is the reader of a PushBlob as one or more request bodies. Only the
// body opened last reads it, and none once it is detached.
type source struct {
	desc   oci.Descriptor
	src    io.Reader
	seeker io.Seeker    // nil if src can't be read again
	start  int64        // where src was when it came to us
	done   func() error // why the push must not be completed, or nil

	mu      sync.Mutex // guards what follows and the reading of src
	current *sourceBody
	err     error // the first that src, or its verification, had
}

func newSource(src io.Reader, desc oci.Descriptor, done func() error) *source {
	s := &source{src: src, desc: desc, done: done}
	if seeker, ok := src.(io.Seeker); ok {
		if start, err := seeker.Seek(0, io.SeekCurrent); err == nil {
			s.seeker, s.start = seeker, start
		}
	}
	return s
}

func (s *source) rewinds() bool { return s.seeker != nil }

// open returns the source from its beginning.
func (s *source) open() (io.ReadCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seeker != nil {
		if _, err := s.seeker.Seek(s.start, io.SeekStart); err != nil {
			s.err = err
			return nil, err
		}
	}
	s.current = &sourceBody{source: s, verified: oci.VerifyReader(s.src, s.desc)}
	return s.current, nil
}

// detach makes sure that nobody reads the source any more: the transport may go
// on with a body after its request has ended.
func (s *source) detach() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = nil
}

func (s *source) failed() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// sourceBody verifies while it is read, and withholds the end of what is wrong.
type sourceBody struct {
	source   *source
	verified io.Reader
}

var errDetached = errors.New("the request is over")

func (b *sourceBody) Read(p []byte) (int, error) {
	s := b.source
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current != b {
		return 0, errDetached
	}
	n, err := b.verified.Read(p)
	if done := s.done(); done != nil {
		n, err = 0, done // or the server might have all of it by now
	}
	if err != nil && err != io.EOF && s.err == nil {
		s.err = err
	}
	return n, err
}

func (b *sourceBody) Close() error { return nil }

// MountBlob implements oci.Writer. A registry that won't mount makes it
// ErrUnsupported.
func (r *Registry) MountBlob(ctx context.Context, from, to string, digest oci.Digest) (oci.Descriptor, error) {
	if err := oci.CheckRepository(from); err != nil {
		return oci.Descriptor{}, err
	}
	if err := checkBlob(to, digest); err != nil {
		return oci.Descriptor{}, err
	}
	// Servers answer a mount of what isn't there like one that they won't do.
	desc, err := r.ResolveBlob(ctx, from, digest)
	if err != nil {
		return oci.Descriptor{}, err
	}
	c := call{
		what:   "mounting blob " + digest.String() + " of " + from + " in " + to,
		method: http.MethodPost,
		url:    r.endpoint(to+"/blobs/uploads/", url.Values{"mount": {digest.String()}, "from": {from}}),
		scopes: append(push(to), pull(from)...),
		again:  true,
	}
	resp, err := r.do(ctx, c)
	if err != nil {
		return oci.Descriptor{}, err
	}
	switch resp.StatusCode {
	case http.StatusCreated:
		defer drain(resp)
		return desc, r.checkBlobAnswer(c, resp, digest)
	case http.StatusAccepted:
		if location, err := r.location(c, resp); err == nil {
			r.abandon(ctx, to, location)
		}
		drain(resp)
		return oci.Descriptor{}, r.ociErrorf(oci.ErrUnsupported, c, "the registry won't; push the blob instead")
	}
	return oci.Descriptor{}, r.failure(c, resp, oci.ErrBlobUnknown)
}

// PushManifest implements oci.Writer. Where the registry has no referrers API, a
// manifest with a subject is entered in the subject's tag of the referrers tag
// schema as well.
func (r *Registry) PushManifest(ctx context.Context, repo, reference, mediaType string, content []byte) (oci.Descriptor, error) {
	digest, err := checkTarget(repo, reference)
	if err != nil {
		return oci.Descriptor{}, err
	}
	info, err := oci.ParseManifestInfo(content, mediaType)
	if err != nil {
		return oci.Descriptor{}, fmt.Errorf("pushing manifest %s to %s: %w", reference, repo, err)
	}
	actual := oci.DigestOf(content)
	if digest != "" {
		actual = digest.Algorithm().FromBytes(content)
	}
	if digest != "" && actual != digest {
		return oci.Descriptor{}, oci.ErrDigestInvalid.Withf("pushing manifest to %s as %s: its digest is %s", repo, digest, actual)
	}
	desc := oci.Descriptor{MediaType: mediaType, Digest: actual, Size: int64(len(content))}
	resp, err := r.putManifest(ctx, repo, reference, desc, content)
	if err != nil {
		return oci.Descriptor{}, err
	}
	if info.Subject != nil && resp.Header.Get("OCI-Subject") == "" {
		if err := r.addToTagIndex(ctx, repo, info.Subject.Digest, info.Referrer(desc)); err != nil {
			return oci.Descriptor{}, err
		}
	}
	return desc, nil
}

// putManifest pushes a manifest that has been checked. The answer's body is
// closed.
func (r *Registry) putManifest(ctx context.Context, repo, reference string, desc oci.Descriptor, content []byte) (*http.Response, error) {
	c := call{
		what:   "pushing manifest " + reference + " to " + repo,
		method: http.MethodPut,
		url:    r.endpoint(repo+"/manifests/"+reference, nil),
		header: http.Header{"Content-Type": {desc.MediaType}},
		scopes: push(repo),
		body: func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(content)), nil
		},
		size:  desc.Size,
		again: true,
	}
	resp, err := r.do(ctx, c)
	if err != nil {
		return nil, err
	}
	switch resp.StatusCode {
	case http.StatusCreated, http.StatusAccepted, http.StatusOK: // the latter two from some older registries
	default:
		return nil, r.failure(c, resp, oci.ErrManifestBlobUnknown)
	}
	defer drain(resp)
	told, err := r.toldDigest(c, resp)
	if err != nil {
		return nil, err
	}
	if told != "" && told.Algorithm().FromBytes(content) != told {
		return nil, r.ociErrorf(oci.ErrDigestInvalid, c, "the registry stored it as %s", told)
	}
	return resp, nil
}
