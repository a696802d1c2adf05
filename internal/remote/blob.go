package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"

	"sluice/oci"
)

// GetBlob implements oci.Reader.
func (r *Registry) GetBlob(ctx context.Context, repo string, digest oci.Digest) (oci.BlobReader, error) {
	if err := checkBlob(repo, digest); err != nil {
		return nil, err
	}
	c := r.blobCall(http.MethodGet, "reading", repo, digest)
	resp, err := r.do(ctx, c)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, r.failure(c, resp, oci.ErrBlobUnknown)
	}
	size, err := r.blobSize(ctx, c, resp, repo, digest)
	if err != nil {
		resp.Body.Close()
		return nil, err
	}
	return r.newBlobReader(c, resp, digest, size, size), nil
}

// GetBlobRange implements oci.Reader. With a server that ignores ranges it reads
// the blob from its beginning and skips.
func (r *Registry) GetBlobRange(ctx context.Context, repo string, digest oci.Digest, offset, length int64) (oci.BlobReader, error) {
	if err := checkBlob(repo, digest); err != nil {
		return nil, err
	}
	c := r.blobCall(http.MethodGet, "reading", repo, digest)
	c.what += fmt.Sprintf(" from offset %d", offset)
	if offset < 0 {
		return nil, r.ociErrorf(oci.ErrRangeInvalid, c, "the offset is negative")
	}
	if length == 0 { // HTTP has no such range
		return r.emptyRange(ctx, c, repo, digest, offset)
	}
	last := int64(math.MaxInt64) // the last byte wanted
	if length > 0 && length-1 <= last-offset {
		last = offset + length - 1
	}
	reader, err := r.getRange(ctx, c, repo, digest, offset, last)
	if !errors.Is(err, oci.ErrRangeInvalid) {
		return reader, err
	}
	// Some servers refuse ranges that aren't given to the byte.
	desc, resolveErr := r.ResolveBlob(ctx, repo, digest)
	if resolveErr != nil || offset >= desc.Size || last < desc.Size {
		return nil, err
	}
	return r.getRange(ctx, c, repo, digest, offset, desc.Size-1)
}

// getRange reads the bytes offset to last, or to the end if that comes first.
func (r *Registry) getRange(ctx context.Context, c call, repo string, digest oci.Digest, offset, last int64) (oci.BlobReader, error) {
	c.header = http.Header{"Range": {fmt.Sprintf("bytes=%d-%d", offset, last)}}
	if last == math.MaxInt64 {
		c.header = http.Header{"Range": {fmt.Sprintf("bytes=%d-", offset)}}
	}
	resp, err := r.do(ctx, c)
	if err != nil {
		return nil, err
	}
	var reader *blobReader
	switch resp.StatusCode {
	case http.StatusPartialContent:
		reader, err = r.partial(ctx, c, resp, repo, digest, offset, last)
	case http.StatusOK:
		reader, err = r.skip(ctx, c, resp, repo, digest, offset, last)
	default:
		return nil, r.failure(c, resp, oci.ErrBlobUnknown)
	}
	if err != nil {
		resp.Body.Close()
		return nil, err
	}
	return reader, nil
}

func (r *Registry) blobCall(method, doing, repo string, digest oci.Digest) call {
	c := call{
		what:   doing + " blob " + digest.String() + " of " + repo,
		method: method,
		url:    r.endpoint(repo+"/blobs/"+digest.String(), nil),
		scopes: pull(repo),
		again:  true,
	}
	if method == http.MethodGet { // signatures of places are for one method
		c.place = repo + "@" + digest.String()
	}
	return c
}

// emptyRange is the answer to a range of no bytes at offset.
func (r *Registry) emptyRange(ctx context.Context, c call, repo string, digest oci.Digest, offset int64) (oci.BlobReader, error) {
	desc, err := r.ResolveBlob(ctx, repo, digest)
	if err != nil {
		return nil, err
	}
	if offset >= desc.Size {
		return nil, r.ociErrorf(oci.ErrRangeInvalid, c, "the blob has %d bytes", desc.Size)
	}
	none := &http.Response{Body: http.NoBody}
	return r.newBlobReader(c, none, digest, desc.Size, 0), nil
}

// partial checks an answer of status 206 against what was asked for.
func (r *Registry) partial(ctx context.Context, c call, resp *http.Response, repo string, digest oci.Digest, offset, last int64) (*blobReader, error) {
	if err := r.checkBlobAnswer(c, resp, digest); err != nil {
		return nil, err
	}
	header := resp.Header.Get("Content-Range")
	got, err := parseContentRange(header)
	if err != nil {
		return nil, r.errorf(c, "the answer (%.100q) has the Content-Range %.100q: %w", resp.Header.Get("Content-Type"), header, err)
	}
	if got.size < 0 {
		desc, err := r.ResolveBlob(ctx, repo, digest)
		if err != nil {
			return nil, err
		}
		got.size = desc.Size
	}
	if got.first != offset || got.last != min(last, got.size-1) {
		return nil, r.errorf(c, "the answer has bytes %d to %d of %d (Content-Range %.100q) instead of those asked for", got.first, got.last, got.size, header)
	}
	length := got.last - got.first + 1
	if resp.ContentLength >= 0 && resp.ContentLength != length {
		return nil, r.errorf(c, "the answer has %d bytes and the Content-Range %.100q", resp.ContentLength, header)
	}
	return r.newBlobReader(c, resp, digest, got.size, length), nil
}

// skip makes the whole blob, which a server sent that ignores ranges, a range.
func (r *Registry) skip(ctx context.Context, c call, resp *http.Response, repo string, digest oci.Digest, offset, last int64) (*blobReader, error) {
	size, err := r.blobSize(ctx, c, resp, repo, digest)
	if err != nil {
		return nil, err
	}
	if offset >= size {
		return nil, r.ociErrorf(oci.ErrRangeInvalid, c, "the blob has %d bytes", size)
	}
	r.opts.Log.Debug("registry ignores ranges", "host", r.host, "digest", digest, "skipped", offset)
	if n, err := io.CopyN(io.Discard, resp.Body, offset); err != nil {
		return nil, r.errorf(c, "the whole blob came, and broke off after %d bytes: %w", n, redact(noEOF(err)))
	}
	return r.newBlobReader(c, resp, digest, size, min(last, size-1)-offset+1), nil
}

// ResolveBlob implements oci.Reader.
func (r *Registry) ResolveBlob(ctx context.Context, repo string, digest oci.Digest) (oci.Descriptor, error) {
	if err := checkBlob(repo, digest); err != nil {
		return oci.Descriptor{}, err
	}
	c := r.blobCall(http.MethodHead, "resolving", repo, digest)
	resp, err := r.do(ctx, c)
	if err != nil {
		return oci.Descriptor{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return oci.Descriptor{}, r.failure(c, resp, oci.ErrBlobUnknown)
	}
	if err := r.checkBlobAnswer(c, resp, digest); err != nil {
		return oci.Descriptor{}, err
	}
	if resp.ContentLength < 0 {
		return oci.Descriptor{}, r.errorf(c, "the answer doesn't tell the size")
	}
	return oci.Descriptor{MediaType: oci.MediaTypeOctetStream, Digest: digest, Size: resp.ContentLength}, nil
}

// blobSize returns the size of the blob that resp has the whole of.
func (r *Registry) blobSize(ctx context.Context, c call, resp *http.Response, repo string, digest oci.Digest) (int64, error) {
	if err := r.checkBlobAnswer(c, resp, digest); err != nil {
		return 0, err
	}
	if resp.ContentLength >= 0 {
		return resp.ContentLength, nil
	}
	desc, err := r.ResolveBlob(ctx, repo, digest)
	return desc.Size, err
}

// checkBlobAnswer rejects answers that can't be the blob, such as the page of a
// proxy that wants a login.
func (r *Registry) checkBlobAnswer(c call, resp *http.Response, digest oci.Digest) error {
	switch mediaType := contentType(resp); mediaType {
	case "text/html", "multipart/byteranges":
		head, _ := io.ReadAll(io.LimitReader(resp.Body, 4*maxErrorMessage)) // only to show it
		return r.errorf(c, "the answer (HTTP %d) is %s instead of the blob: %s", resp.StatusCode, mediaType, snippet(head))
	}
	if encoding := resp.Header.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return r.errorf(c, "the answer is encoded as %.40q, which was not asked for", encoding)
	}
	told, err := r.toldDigest(c, resp)
	if err != nil {
		return err
	}
	if told != "" && told.Algorithm() == digest.Algorithm() && told != digest {
		return r.ociErrorf(oci.ErrDigestInvalid, c, "the answer is about %s", told)
	}
	return nil
}

// contentRange is a parsed Content-Range header: bytes first to last, inclusive,
// of size, which is negative if it isn't told.
type contentRange struct{ first, last, size int64 }

// parseContentRange parses a Content-Range header of a 206 answer (RFC 9110,
// section 14.4): 0 <= first <= last < size.
func parseContentRange(header string) (contentRange, error) {
	bad := errors.New("not of the form \"bytes FIRST-LAST/SIZE\"")
	unit, rest, ok := strings.Cut(header, " ")
	if !ok || !strings.EqualFold(unit, "bytes") {
		return contentRange{}, bad
	}
	span, sizeText, ok1 := strings.Cut(strings.TrimSpace(rest), "/")
	firstText, lastText, ok2 := strings.Cut(span, "-")
	if !ok1 || !ok2 {
		return contentRange{}, bad
	}
	got := contentRange{size: -1}
	var err1, err2, err3 error
	got.first, err1 = parseOffset(firstText)
	got.last, err2 = parseOffset(lastText)
	if sizeText != "*" {
		got.size, err3 = parseOffset(sizeText)
	}
	if err1 != nil || err2 != nil || err3 != nil {
		return contentRange{}, bad
	}
	if got.first > got.last || got.size >= 0 && got.last >= got.size || got.last == math.MaxInt64 {
		return contentRange{}, errors.New("an impossible range")
	}
	return got, nil
}

// parseOffset parses a number of digits only.
func parseOffset(s string) (int64, error) {
	if s == "" || s[0] < '0' || s[0] > '9' {
		return 0, strconv.ErrSyntax
	}
	return strconv.ParseInt(s, 10, 64)
}

// blobReader is an answer's body of a known length.
type blobReader struct {
	registry *Registry
	call     call
	body     io.ReadCloser
	desc     oci.Descriptor
	length   int64 // of what is read
	left     int64
}

func (r *Registry) newBlobReader(c call, resp *http.Response, digest oci.Digest, size, length int64) *blobReader {
	return &blobReader{
		registry: r,
		call:     c,
		body:     resp.Body,
		desc:     oci.Descriptor{MediaType: oci.MediaTypeOctetStream, Digest: digest, Size: size},
		length:   length,
		left:     length,
	}
}

func (b *blobReader) Descriptor() oci.Descriptor { return b.desc }

func (b *blobReader) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.body.Read(p)
	b.left -= int64(n)
	if err == nil || err == io.EOF && b.left == 0 {
		return n, nil
	}
	return n, b.registry.errorf(b.call, "broke off after %d of %d bytes: %w", b.length-b.left, b.length, redact(noEOF(err)))
}

func (b *blobReader) Close() error { return b.body.Close() }

// noEOF returns err, or io.ErrUnexpectedEOF for an end that came too early.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
