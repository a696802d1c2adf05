package registry

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"sluice/oci"
)

// cacheForever is for content under its digest, which can't change.
const cacheForever = "max-age=31536000, immutable"

// headBlob is end-2 with HEAD.
func (h *Handler) headBlob(w http.ResponseWriter, r *http.Request, req Request) error {
	desc, err := h.registry.ResolveBlob(r.Context(), req.Repository, req.Digest)
	if err != nil {
		return err
	}
	describeBlob(w.Header(), desc)
	w.Header().Set("Content-Length", strconv.FormatInt(desc.Size, 10))
	w.WriteHeader(http.StatusOK)
	return nil
}

// getBlob is end-2 with GET: a whole blob or one range of it.
func (h *Handler) getBlob(w http.ResponseWriter, r *http.Request, req Request) error {
	ctx := r.Context()
	if matches(r.Header.Get("If-None-Match"), req.Digest) {
		desc, err := h.registry.ResolveBlob(ctx, req.Repository, req.Digest)
		if err != nil {
			return err
		}
		describeBlob(w.Header(), desc)
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	if done, err := h.redirectBlob(w, r, req); done || err != nil {
		return err
	}
	rng, ranged := parseRange(r.Header.Get("Range"))
	if ir := r.Header.Get("If-Range"); ir != "" && ir != etag(req.Digest) {
		ranged = false // RFC 9110, 13.1.5: of something else, so send it all
	}
	if ranged {
		return h.getBlobRange(w, r, req, rng)
	}
	blob, err := h.registry.GetBlob(ctx, req.Repository, req.Digest)
	if err != nil {
		return err
	}
	defer blob.Close()
	size := blob.Descriptor().Size
	describeBlob(w.Header(), blob.Descriptor())
	return sendBlob(w, http.StatusOK, blob, size)
}

// redirectBlob sends the client to the object store and reports whether it did.
// The client asks there for the same range, and without its credentials.
func (h *Handler) redirectBlob(w http.ResponseWriter, r *http.Request, req Request) (bool, error) {
	if h.redirector == nil {
		return false, nil
	}
	url, err := h.redirector.BlobURL(r.Context(), req.Repository, req.Digest, h.opts.Redirect)
	if err != nil || url == "" {
		return false, err
	}
	if c := conversationOf(r.Context()); c != nil {
		c.redirected = true
	}
	header := w.Header()
	header.Set("Location", url)
	header.Set("Docker-Content-Digest", req.Digest.String())
	header.Set("Cache-Control", "no-store") // the URL runs out
	header.Set("Content-Length", "0")
	w.WriteHeader(http.StatusTemporaryRedirect)
	return true, nil
}

// getBlobRange answers with one range. The registry is asked for it at once,
// since the open blob tells its size; only a range that counts from the end, or
// lies beyond it, needs the size first.
func (h *Handler) getBlobRange(w http.ResponseWriter, r *http.Request, req Request, rng byteRange) error {
	ctx := r.Context()
	offset, length, ok := rng.absolute()
	if !ok {
		desc, err := h.registry.ResolveBlob(ctx, req.Repository, req.Digest)
		if err != nil {
			return err
		}
		if offset, length, ok = rng.within(desc.Size); !ok {
			return unsatisfiable(req, desc.Size)
		}
	}
	blob, err := h.registry.GetBlobRange(ctx, req.Repository, req.Digest, offset, length)
	if errors.Is(err, oci.ErrRangeInvalid) {
		desc, err := h.registry.ResolveBlob(ctx, req.Repository, req.Digest)
		if err != nil {
			return err
		}
		return unsatisfiable(req, desc.Size)
	}
	if err != nil {
		return err
	}
	defer blob.Close()
	size := blob.Descriptor().Size
	if left := size - offset; length < 0 || length > left {
		length = left
	}
	describeBlob(w.Header(), blob.Descriptor())
	value := make([]byte, 0, 64)
	value = append(value, "bytes "...)
	value = strconv.AppendInt(value, offset, 10)
	value = append(value, '-')
	value = strconv.AppendInt(value, offset+length-1, 10)
	value = append(value, '/')
	value = strconv.AppendInt(value, size, 10)
	w.Header()["Content-Range"] = []string{string(value)}
	return sendBlob(w, http.StatusPartialContent, blob, length)
}

func unsatisfiable(req Request, size int64) error {
	return &StatusError{
		Status: http.StatusRequestedRangeNotSatisfiable,
		Header: http.Header{"Content-Range": {fmt.Sprintf("bytes */%d", size)}},
		Err:    oci.ErrRangeInvalid.Withf("blob %s of %s has %d bytes, and the range begins beyond", req.Digest, req.Repository, size),
	}
}

// sendBlob sends the length bytes that blob yields.
func sendBlob(w http.ResponseWriter, status int, blob oci.BlobReader, length int64) error {
	w.Header().Set("Content-Length", strconv.FormatInt(length, 10))
	w.WriteHeader(status)
	if length == 0 {
		return nil
	}
	n, err := io.Copy(w, blob)
	if err == nil && n != length {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", n, length, err)
	}
	return nil
}

// deleteBlob is end-10.
func (h *Handler) deleteBlob(w http.ResponseWriter, r *http.Request, req Request) error {
	if err := h.registry.DeleteBlob(r.Context(), req.Repository, req.Digest); err != nil {
		return err
	}
	accepted(w)
	return nil
}

func accepted(w http.ResponseWriter) {
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusAccepted)
}

// describeBlob sets the headers that every answer about a blob has. Their names
// are canonical, so they needn't be looked at again.
func describeBlob(header http.Header, desc oci.Descriptor) {
	values := [...]string{oci.MediaTypeOctetStream, desc.Digest.String(), etag(desc.Digest), "bytes", cacheForever}
	header["Content-Type"] = values[0:1:1]
	header["Docker-Content-Digest"] = values[1:2:2]
	header["Etag"] = values[2:3:3]
	header["Accept-Ranges"] = values[3:4:4]
	header["Cache-Control"] = values[4:5:5]
}

func etag(digest oci.Digest) string { return `"` + digest.String() + `"` }

// matches reports whether an If-None-Match header names the digest.
func matches(header string, digest oci.Digest) bool {
	for tag := range strings.SplitSeq(header, ",") {
		tag = strings.TrimPrefix(strings.TrimSpace(tag), "W/")
		if tag == "*" || tag == etag(digest) {
			return true
		}
	}
	return false
}

// byteRange is what a Range header asks for: "first-last", "first-" with a last
// of -1, or "-suffix" with a first of -1.
type byteRange struct {
	first, last int64
}

// parseRange parses a Range header (RFC 9110, 14.2). Without a single range of
// bytes in it, false: the header is then to be ignored and all be sent, which
// is allowed for several ranges too.
func parseRange(header string) (byteRange, bool) {
	spec, ok := strings.CutPrefix(header, "bytes=")
	if !ok || strings.Contains(spec, ",") {
		return byteRange{}, false
	}
	from, to, ok := strings.Cut(strings.TrimSpace(spec), "-")
	if !ok || from == "" && to == "" {
		return byteRange{}, false
	}
	rng := byteRange{-1, -1}
	if from != "" {
		if rng.first, ok = parseCount(from); !ok {
			return byteRange{}, false
		}
	}
	if to != "" {
		if rng.last, ok = parseCount(to); !ok {
			return byteRange{}, false
		}
	}
	return rng, true
}

// parseCount parses decimal digits and nothing else. What is larger than any
// blob is as large as possible.
func parseCount(s string) (int64, bool) {
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return 0, false
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 1<<63 - 1, s != ""
	}
	return n, true
}

// absolute returns the offset and length that the range means whatever the
// blob's size, with a negative length for all that follows. It reports false if
// that depends on the size or is nothing.
func (b byteRange) absolute() (offset, length int64, ok bool) {
	switch {
	case b.first < 0 || b.last >= 0 && b.last < b.first:
		return 0, 0, false
	case b.last < 0 || b.last == 1<<63-1:
		return b.first, -1, true
	}
	return b.first, b.last - b.first + 1, true
}

// within returns the part of a blob that the range means; false if that is
// nothing. A last before the first is answered like a range beyond the end.
func (b byteRange) within(size int64) (offset, length int64, ok bool) {
	switch {
	case b.first < 0:
		length = min(b.last, size)
		return size - length, length, length > 0
	case b.first >= size || b.last >= 0 && b.last < b.first:
		return 0, 0, false
	case b.last < 0 || b.last >= size:
		return b.first, size - b.first, true
	}
	return b.first, b.last - b.first + 1, true
}
