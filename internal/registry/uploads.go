package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"sluice/oci"
)

// startUpload is end-4a and 4c (begin), end-4b (the whole blob at once) and
// end-11 (mount a blob of another repository).
func (h *Handler) startUpload(w http.ResponseWriter, r *http.Request, req Request) error {
	q := req.Query
	if a := q.Get("digest-algorithm"); a != "" && a != string(oci.SHA256) && a != string(oci.SHA512) {
		return oci.ErrDigestInvalid.Withf("digest algorithm %.40q: only sha256 and sha512 are supported", a)
	}
	if q.Has("mount") {
		digest, err := oci.ParseDigest(q.Get("mount"))
		if err != nil {
			return err
		}
		desc, ok, err := h.mount(r.Context(), q.Get("from"), req.Repository, digest)
		if err != nil {
			return err
		}
		if ok {
			blobCreated(w, req.Repository, desc)
			return nil
		}
		return h.beginUpload(w, r, req) // the client will send the blob
	}
	if !q.Has("digest") {
		return h.beginUpload(w, r, req)
	}
	digest, err := oci.ParseDigest(q.Get("digest"))
	if err != nil {
		return err
	}
	if r.ContentLength == 0 && digest.Algorithm().FromBytes(nil) != digest {
		return h.beginUpload(w, r, req) // a client that says early what it will send
	}
	desc, err := h.pushBlob(r, req.Repository, digest)
	if err != nil {
		return err
	}
	blobCreated(w, req.Repository, desc)
	return nil
}

// pushBlob stores a request's body as a blob.
func (h *Handler) pushBlob(r *http.Request, repo string, digest oci.Digest) (oci.Descriptor, error) {
	ctx := r.Context()
	if r.ContentLength >= 0 {
		return h.registry.PushBlob(ctx, repo, oci.Descriptor{Digest: digest, Size: r.ContentLength}, r.Body)
	}
	u, err := h.registry.StartUpload(ctx, repo)
	if err != nil {
		return oci.Descriptor{}, err
	}
	err = u.Append(ctx, 0, r.Body)
	if err == nil {
		return u.Commit(ctx, digest)
	}
	return oci.Descriptor{}, errors.Join(err, u.Cancel(context.WithoutCancel(ctx)))
}

func (h *Handler) beginUpload(w http.ResponseWriter, r *http.Request, req Request) error {
	u, err := h.registry.StartUpload(r.Context(), req.Repository)
	if err != nil {
		return err
	}
	describeUpload(w.Header(), req.Repository, u)
	accepted(w)
	return nil
}

// Limits of the search for a blob that is to be mounted from anywhere. It is a
// favour to clients: not finding the blob only means that it will be sent.
const (
	mountSearchTime         = time.Second
	mountSearchRepositories = 10_000
)

// mount mounts a blob from a repository, or from any if that is "". It reports
// false if there is none, or none that the caller may read: the two must look
// alike.
func (h *Handler) mount(ctx context.Context, from, to string, digest oci.Digest) (oci.Descriptor, bool, error) {
	if from == "" {
		if from = h.findBlob(ctx, digest); from == "" {
			return oci.Descriptor{}, false, nil
		}
	} else if !h.mayPull(ctx, from) {
		return oci.Descriptor{}, false, nil
	}
	desc, err := h.registry.MountBlob(ctx, from, to, digest)
	switch {
	case err == nil:
		return desc, true, nil
	case errors.Is(err, oci.ErrBlobUnknown), errors.Is(err, oci.ErrNameUnknown), errors.Is(err, oci.ErrNameInvalid),
		errors.Is(err, oci.ErrUnsupported), errors.Is(err, oci.ErrDenied):
		return oci.Descriptor{}, false, nil
	}
	return oci.Descriptor{}, false, err
}

// blobFinder is an oci.Registry that knows where its blobs are. FindBlob returns
// "" if there is no repository that has it.
type blobFinder interface {
	FindBlob(ctx context.Context, digest oci.Digest) (repo string, err error)
}

// findBlob returns a repository that has a blob and that the caller may read,
// or "".
func (h *Handler) findBlob(ctx context.Context, digest oci.Digest) string {
	ctx, cancel := context.WithTimeout(ctx, mountSearchTime)
	defer cancel()
	if f, ok := h.registry.(blobFinder); ok {
		repo, err := f.FindBlob(ctx, digest)
		if err != nil || repo == "" || h.mayPull(ctx, repo) {
			return repo
		}
	}
	left := mountSearchRepositories
	for repo, err := range h.registry.Repositories(ctx, "") {
		if left--; err != nil || left < 0 {
			return ""
		}
		if !h.mayPull(ctx, repo) {
			continue
		}
		if _, err := h.registry.ResolveBlob(ctx, repo, digest); err == nil {
			return repo
		}
	}
	return ""
}

// appendUpload is end-5.
func (h *Handler) appendUpload(w http.ResponseWriter, r *http.Request, req Request) error {
	u, err := h.resume(r.Context(), req)
	if err != nil {
		return err
	}
	err = h.sendBody(r, req, u, func(offset int64, body io.Reader) error { return u.Append(r.Context(), offset, body) })
	if err != nil {
		return err
	}
	describeUpload(w.Header(), req.Repository, u)
	accepted(w)
	return nil
}

// Finisher is an oci.Upload that can take its last bytes and end in one go,
// which spares it to keep those bytes for a next request that won't come.
type Finisher interface {
	// Finish is Append and then Commit. When Append would fail, it fails
	// with the same and keeps the same.
	Finish(ctx context.Context, offset int64, r io.Reader, digest oci.Digest) (oci.Descriptor, error)
}

// commitUpload is end-6. Its body, if any, is the last chunk.
func (h *Handler) commitUpload(w http.ResponseWriter, r *http.Request, req Request) error {
	digest, err := oci.ParseDigest(req.Query.Get("digest"))
	if err != nil {
		return err
	}
	u, err := h.resume(r.Context(), req)
	if err != nil {
		return err
	}
	desc, err := h.finishUpload(r, req, u, digest)
	if err != nil {
		return err
	}
	blobCreated(w, req.Repository, desc)
	return nil
}

func (h *Handler) finishUpload(r *http.Request, req Request, u oci.Upload, digest oci.Digest) (desc oci.Descriptor, err error) {
	if r.ContentLength == 0 && r.Header.Get("Content-Range") == "" {
		return u.Commit(r.Context(), digest)
	}
	finish := func(offset int64, body io.Reader) error {
		if err := u.Append(r.Context(), offset, body); err != nil {
			return err
		}
		desc, err = u.Commit(r.Context(), digest)
		return err
	}
	if f, ok := u.(Finisher); ok {
		finish = func(offset int64, body io.Reader) error {
			desc, err = f.Finish(r.Context(), offset, body, digest)
			return err
		}
	}
	err = h.sendBody(r, req, u, finish)
	return desc, err
}

// uploadStatus is end-13.
func (h *Handler) uploadStatus(w http.ResponseWriter, r *http.Request, req Request) error {
	u, err := h.resume(r.Context(), req)
	if err != nil {
		return err
	}
	describeUpload(w.Header(), req.Repository, u)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// cancelUpload is end-14.
func (h *Handler) cancelUpload(w http.ResponseWriter, r *http.Request, req Request) error {
	u, err := h.resume(r.Context(), req)
	if err != nil {
		return err
	}
	if err := u.Cancel(r.Context()); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (h *Handler) resume(ctx context.Context, req Request) (oci.Upload, error) {
	return h.registry.ResumeUpload(ctx, req.Repository, req.UploadID)
}

// sendBody has to append a request's body, at its Content-Range if it has one and
// otherwise at the end. An offset that isn't the end is answered with where the
// end is.
func (h *Handler) sendBody(r *http.Request, req Request, u oci.Upload, to func(offset int64, body io.Reader) error) error {
	offset, length := u.Size(), r.ContentLength
	if header := r.Header.Get("Content-Range"); header != "" {
		first, last, err := parseContentRange(header)
		if err != nil {
			return err
		}
		if length >= 0 && length != last-first+1 {
			return oci.ErrSizeInvalid.Withf("Content-Range %s has %d bytes, and Content-Length says %d", header, last-first+1, length)
		}
		offset, length = first, last-first+1
	}
	body := io.Reader(r.Body)
	if length >= 0 {
		body = &exactReader{r: r.Body, left: length}
	}
	err := to(offset, body)
	if errors.Is(err, oci.ErrRangeInvalid) {
		// The handle may be older than what another request has appended.
		if again, rerr := h.resume(r.Context(), req); rerr == nil {
			u = again
		}
		e := &StatusError{
			Status: http.StatusRequestedRangeNotSatisfiable,
			Header: http.Header{},
			Err:    oci.ErrRangeInvalid.Withf("upload to %s has %d bytes: send what begins there", req.Repository, u.Size()),
		}
		describeUpload(e.Header, req.Repository, u)
		return e
	}
	return err
}

// exactReader yields the bytes that were promised, or an error.
type exactReader struct {
	r    io.Reader
	left int64
}

func (e *exactReader) Read(p []byte) (int, error) {
	if e.left == 0 {
		var one [1]byte
		n, err := e.r.Read(one[:])
		if n > 0 {
			return 0, oci.ErrSizeInvalid.Withf("more bytes came than Content-Range says")
		}
		return 0, err
	}
	n, err := e.r.Read(p[:min(int64(len(p)), e.left)])
	e.left -= int64(n)
	if err == io.EOF && e.left > 0 {
		err = oci.ErrSizeInvalid.Withf("%d bytes fewer came than Content-Range says", e.left)
	}
	return n, err
}

// parseContentRange parses "first-last", which the specification wants, and
// "bytes first-last/size" of RFC 9110, which some clients send.
func parseContentRange(header string) (first, last int64, err error) {
	spec, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(header, "bytes "), "bytes="), "/")
	from, to, ok := strings.Cut(spec, "-")
	if ok {
		if first, ok = parseCount(from); ok {
			last, ok = parseCount(to)
		}
	}
	if !ok || from == "" || to == "" || last < first || last == 1<<63-1 {
		return 0, 0, oci.ErrBlobUploadInvalid.Withf("Content-Range %.100q is not of the form FIRST-LAST", header)
	}
	return first, last, nil
}

// describeUpload tells where an upload goes on. The Range header can't express
// that nothing has come yet; like Docker's registry we say 0-0 then. Upload-Offset
// (of the IETF's resumable uploads) leaves no doubt.
func describeUpload(header http.Header, repo string, u oci.Upload) {
	header.Set("Location", uploadPath(repo, u.ID()))
	header.Set("Range", fmt.Sprintf("0-%d", max(u.Size()-1, 0)))
	header.Set("Upload-Offset", strconv.FormatInt(u.Size(), 10))
	header.Set("Docker-Upload-UUID", u.ID())
}

// blobCreated answers a push or mount that succeeded.
func blobCreated(w http.ResponseWriter, repo string, desc oci.Descriptor) {
	w.Header().Set("Location", blobPath(repo, desc.Digest))
	w.Header().Set("Docker-Content-Digest", desc.Digest.String())
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusCreated)
}
