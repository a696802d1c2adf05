package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"sluice/oci"
)

const (
	maxUploadID = 4096     // bytes
	maxMinChunk = 64 << 20 // of OCI-Chunk-Min-Length that is honoured
)

// upload is an oci.Upload. Between requests it is only a location, which is what
// its ID says too; the server may change it with each answer.
type upload struct {
	registry *Registry
	repo     string
	location *url.URL
	size     int64
	chunk    int64 // bytes sent per request
	over     bool
}

// StartUpload implements oci.Writer.
func (r *Registry) StartUpload(ctx context.Context, repo string) (oci.Upload, error) {
	if err := oci.CheckRepository(repo); err != nil {
		return nil, err
	}
	u := &upload{registry: r, repo: repo, chunk: r.opts.ChunkSize}
	location, err := r.startUpload(ctx, repo, func(answer http.Header) {
		if n, err := strconv.ParseInt(answer.Get("OCI-Chunk-Min-Length"), 10, 64); err == nil && n <= maxMinChunk {
			u.chunk = max(u.chunk, n)
		}
	})
	if err != nil {
		return nil, err
	}
	u.location = location
	return u, nil
}

// startUpload returns the location of a new upload. look, if not nil, sees the
// header of the answer.
func (r *Registry) startUpload(ctx context.Context, repo string, look func(http.Header)) (*url.URL, error) {
	c := call{
		what:   "starting an upload to " + repo,
		method: http.MethodPost,
		url:    r.endpoint(repo+"/blobs/uploads/", nil),
		scopes: push(repo),
		again:  true, // the server forgets the one whose answer was lost
	}
	resp, err := r.do(ctx, c)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusAccepted {
		return nil, r.failure(c, resp, oci.ErrNameUnknown)
	}
	defer drain(resp)
	if look != nil {
		look(resp.Header)
	}
	return r.location(c, resp)
}

// location returns where an answer says that an upload goes on.
func (r *Registry) location(c call, resp *http.Response) (*url.URL, error) {
	header := resp.Header.Get("Location")
	u, err := r.resolve(resp.Request.URL, header)
	if err != nil || header == "" {
		return nil, r.errorf(c, "the answer doesn't tell a usable location of the upload")
	}
	if u.Scheme != "https" && u.Scheme != r.base.Scheme {
		return nil, r.errorf(c, "the answer sends the upload to %.20q without TLS", u.Scheme)
	}
	return u, nil
}

// withDigest adds the query that ends an upload, and leaves what is there, which
// may be signed, as it is.
func withDigest(location *url.URL, digest oci.Digest) *url.URL {
	u := *location
	if u.RawQuery != "" {
		u.RawQuery += "&"
	}
	u.RawQuery += "digest=" + url.QueryEscape(digest.String())
	return &u
}

// ResumeUpload implements oci.Writer.
func (r *Registry) ResumeUpload(ctx context.Context, repo, id string) (oci.Upload, error) {
	if err := oci.CheckRepository(repo); err != nil {
		return nil, err
	}
	location, err := r.locationOf(repo, id)
	if err != nil {
		return nil, err
	}
	u := &upload{registry: r, repo: repo, location: location, chunk: r.opts.ChunkSize}
	if err := u.refresh(ctx); err != nil {
		return nil, err
	}
	return u, nil
}

var plainID = regexp.MustCompile(`^[A-Za-z0-9_=~-][A-Za-z0-9._=~-]*$`)

// locationOf returns the location that an upload's ID stands for: an absolute
// URL, a path on the registry, or an upload's name in the registry's own URLs.
func (r *Registry) locationOf(repo, id string) (*url.URL, error) {
	unknown := oci.ErrBlobUploadUnknown.Withf("resuming an upload to %s at %s: that is not the ID of one", repo, r.host)
	if len(id) > maxUploadID {
		return nil, unknown
	}
	if plainID.MatchString(id) {
		return r.endpoint(repo+"/blobs/uploads/"+id, nil), nil
	}
	if !strings.HasPrefix(id, "/") && !strings.HasPrefix(id, "https://") && !strings.HasPrefix(id, r.base.Scheme+"://") {
		return nil, unknown
	}
	u, err := url.ParseRequestURI(id)
	if err != nil || u.User != nil {
		return nil, unknown
	}
	u = r.base.ResolveReference(u)
	name, _, ok := strings.Cut(strings.TrimPrefix(u.Path, r.api+"/"), "/blobs/uploads/")
	if u.Host == "" || u.Host == r.base.Host && ok && name != repo {
		return nil, unknown
	}
	return u, nil
}

// ID is the location, without the host if that is the registry's.
func (u *upload) ID() string {
	if u.location.Scheme == u.registry.base.Scheme && u.location.Host == u.registry.base.Host {
		return u.location.RequestURI()
	}
	return u.location.String()
}

func (u *upload) Size() int64 { return u.size }

func (u *upload) call(doing, method string) call {
	return call{what: doing + " an upload to " + u.repo, method: method, url: u.location, scopes: push(u.repo)}
}

// check returns ErrBlobUploadUnknown if the upload is over.
func (u *upload) check(c call) error {
	if u.over {
		return u.registry.ociErrorf(oci.ErrBlobUploadUnknown, c, "it is over")
	}
	return nil
}

// failure is Registry.failure; it notes that the upload is over.
func (u *upload) failure(c call, resp *http.Response) error {
	err := u.registry.failure(c, resp, oci.ErrBlobUploadUnknown)
	if errors.Is(err, oci.ErrBlobUploadUnknown) {
		u.over = true
	}
	return err
}

// move follows the location of an answer, if it has one.
func (u *upload) move(c call, resp *http.Response) error {
	if resp.Header.Get("Location") == "" {
		return nil
	}
	location, err := u.registry.location(c, resp)
	if err == nil {
		u.location = location
	}
	return err
}

// refresh asks the server how much it has.
func (u *upload) refresh(ctx context.Context) error {
	c := u.call("resuming", http.MethodGet)
	c.again = true
	resp, err := u.registry.do(ctx, c)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusNoContent && resp.StatusCode != http.StatusOK {
		return u.failure(c, resp)
	}
	defer drain(resp)
	size, err := parseUploadRange(resp.Header.Get("Range"))
	if err != nil {
		return u.registry.errorf(c, "the answer's Range is %.100q: %w", resp.Header.Get("Range"), err)
	}
	u.size = size
	return u.move(c, resp)
}

// parseUploadRange parses the Range header of an upload's status and returns how
// many bytes the server has (distribution-spec 1.1, "Pushing a blob in chunks").
//
// The header has no form for none at all, and servers write "0-0" for it, which
// is also right for one byte. None is much likelier; where it is wrong, the next
// Append is refused and nothing is lost.
func parseUploadRange(header string) (int64, error) {
	if header == "" || header == "0-0" {
		return 0, nil
	}
	first, last, ok := strings.Cut(strings.TrimPrefix(header, "bytes="), "-")
	end, err := parseOffset(last)
	if !ok || err != nil || first != "0" || end+1 < 0 {
		return 0, errors.New("not of the form \"0-LAST\"")
	}
	return end + 1, nil
}

// Append implements oci.Upload. It sends a piece of Options.ChunkSize at a time,
// and a piece again, or what the server lacks of it, after a lost connection.
func (u *upload) Append(ctx context.Context, offset int64, r io.Reader) error {
	c := u.call("appending to", http.MethodPatch)
	if err := u.check(c); err != nil {
		return err
	}
	if offset != u.size {
		return u.registry.ociErrorf(oci.ErrRangeInvalid, c, "at %d, and it has %d bytes", offset, u.size)
	}
	var piece bytes.Buffer
	for {
		if err := ctx.Err(); err != nil {
			return u.registry.errorf(c, "%w", err)
		}
		piece.Reset()
		_, readErr := io.CopyN(&piece, r, u.chunk)
		if err := u.send(ctx, piece.Bytes()); err != nil {
			return err
		}
		if readErr == io.EOF {
			return nil
		}
		if readErr != nil {
			return u.registry.errorf(c, "its source: %w", readErr)
		}
	}
}

// send appends one piece.
func (u *upload) send(ctx context.Context, piece []byte) error {
	start := u.size
	for attempt := 0; len(piece) > 0; attempt++ {
		err := u.patch(ctx, piece)
		if err == nil {
			return nil
		}
		var lost *lostError
		if ctx.Err() != nil || !errors.As(err, &lost) && !errors.Is(err, oci.ErrRangeInvalid) {
			return err
		}
		// How much arrived only the server knows.
		if u.refresh(ctx) != nil || lost == nil || attempt >= u.registry.opts.Retries {
			return err
		}
		kept := u.size - start
		if kept < 0 || kept > int64(len(piece)) {
			return err // somebody else is writing, too
		}
		start, piece = u.size, piece[kept:]
	}
	return nil
}

// patch is one attempt of send.
func (u *upload) patch(ctx context.Context, piece []byte) error {
	c := u.call("appending to", http.MethodPatch)
	c.body = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(piece)), nil }
	c.size = int64(len(piece))
	end := u.size + c.size
	c.header = http.Header{
		"Content-Type":  {oci.MediaTypeOctetStream},
		"Content-Range": {fmt.Sprintf("%d-%d", u.size, end-1)},
	}
	resp, err := u.registry.do(ctx, c)
	if err != nil {
		if canRetry(nil, err) {
			return &lostError{err}
		}
		return err
	}
	if resp.StatusCode != http.StatusAccepted {
		again := canRetry(resp, nil)
		if err = u.failure(c, resp); again {
			return &lostError{err}
		}
		return err
	}
	defer drain(resp)
	if header := resp.Header.Get("Range"); header != "" {
		size, err := parseUploadRange(header)
		if err != nil || size != end && header != "0-0" {
			return u.registry.errorf(c, "after %d bytes the answer's Range is %.100q", end, header)
		}
	}
	u.size = end
	return u.move(c, resp)
}

// Commit implements oci.Upload.
func (u *upload) Commit(ctx context.Context, digest oci.Digest) (oci.Descriptor, error) {
	if _, err := oci.ParseDigest(digest.String()); err != nil {
		return oci.Descriptor{}, err
	}
	c := u.call("committing", http.MethodPut)
	c.what += " as " + digest.String()
	if err := u.check(c); err != nil {
		return oci.Descriptor{}, err
	}
	desc := oci.Descriptor{MediaType: oci.MediaTypeOctetStream, Digest: digest, Size: u.size}
	c.url = withDigest(u.location, digest)
	c.header = http.Header{"Content-Type": {oci.MediaTypeOctetStream}}
	resp, err := u.registry.do(ctx, c)
	if err != nil {
		return u.settle(ctx, desc, err)
	}
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusNoContent {
		err := u.failure(c, resp)
		if retryStatus(resp.StatusCode) {
			return u.settle(ctx, desc, err)
		}
		if errors.Is(err, oci.ErrDigestInvalid) {
			u.registry.abandon(ctx, u.repo, u.location)
			u.over = true
		}
		return oci.Descriptor{}, err
	}
	u.over = true
	defer drain(resp)
	return desc, u.registry.checkBlobAnswer(c, resp, digest)
}

// settle finds out whether a commit whose answer was lost was done.
func (u *upload) settle(ctx context.Context, desc oci.Descriptor, err error) (oci.Descriptor, error) {
	got, resolveErr := u.registry.ResolveBlob(ctx, u.repo, desc.Digest)
	if resolveErr != nil || got.Size != desc.Size {
		return oci.Descriptor{}, err
	}
	u.over = true
	return desc, nil
}

// Cancel implements oci.Upload.
func (u *upload) Cancel(ctx context.Context) error {
	c := u.call("canceling", http.MethodDelete)
	if err := u.check(c); err != nil {
		return err
	}
	resp, err := u.registry.do(ctx, c)
	if err != nil {
		return err
	}
	switch resp.StatusCode {
	case http.StatusNoContent, http.StatusAccepted, http.StatusOK:
		drain(resp)
		u.over = true
		return nil
	}
	return u.failure(c, resp)
}
