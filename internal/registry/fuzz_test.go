package registry

import (
	"strings"
	"testing"

	"sluice/oci"
)

// Whatever comes as a URL, a request that parses has names that are safe to
// build keys and paths from, and its own path leads to the same request.
func FuzzParseRequest(f *testing.F) {
	for _, path := range []string{
		"/v2/", "/v2", "/v2/_catalog", "/v2/a/tags/list", "/v2/a/b/c/manifests/v1", "/v2/a/blobs/uploads/", "/v2/a/blobs/uploads/x",
		"/v2/blobs/uploads/manifests/tags/list", "/v2/a/../b/tags/list", "/v2//tags/list", "/v2/a/blobs/uploads", "/v2/a/referrers/x",
		"/v2/a/blobs/" + oci.DigestOf(nil).String(), "/v2/a/manifests/" + oci.DigestOf(nil).String(),
	} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} {
			f.Add(method, path, "n=1&last=x")
		}
	}
	f.Fuzz(func(t *testing.T, method, path, query string) {
		r, err := parseRequest(method, path, query)
		if err != nil {
			return
		}
		if endpointOf(r.Kind).handle == nil {
			t.Fatalf("%s %s: kind %d has no method", method, path, r.Kind)
		}
		if r.Kind == kindPing || r.Kind == kindCatalog {
			return
		}
		if err := oci.CheckRepository(r.Repository); err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
		var back string
		switch {
		case r.UploadID != "":
			back = uploadPath(r.Repository, r.UploadID)
		case r.Reference != "":
			back = manifestPath(r.Repository, r.Reference)
		case r.Digest != "" && r.Kind != kindReferrers:
			back = blobPath(r.Repository, r.Digest)
		default:
			return
		}
		if back != path || strings.Contains(path, "..") && r.UploadID == "" && r.Reference == "" {
			t.Fatalf("%s %s was understood as %s", method, path, back)
		}
	})
}

// A range always lies within its blob, and means what RFC 9110 says.
func FuzzRange(f *testing.F) {
	for _, header := range []string{"", "bytes=0-0", "bytes=5-", "bytes=-5", "bytes=9-3", "bytes=0-99999999999999999999", "bytes=-", "bytes=1-2,3-4", "bytes= 1-2"} {
		f.Add(header, int64(10))
	}
	f.Fuzz(func(t *testing.T, header string, size int64) {
		if size < 0 {
			return
		}
		rng, ok := parseRange(header)
		if !ok {
			return
		}
		offset, length, ok := rng.within(size)
		if ok && (offset < 0 || length <= 0 || offset >= size || length > size-offset) {
			t.Fatalf("%q of %d bytes: %d bytes at %d", header, size, length, offset)
		}
		// What doesn't ask for the size comes to the same.
		first, n, known := rng.absolute()
		if n < 0 || n > size-first {
			n = size - first
		}
		if known && (ok != (first < size) || ok && (first != offset || n != length)) {
			t.Fatalf("%q of %d bytes: %d bytes at %d, and absolutely %d at %d", header, size, length, offset, n, first)
		}
	})
}

func FuzzContentRange(f *testing.F) {
	for _, header := range []string{"0-0", "0-99", "bytes 5-7/*", "bytes=1-2", "3-1", "-", "0-9223372036854775807", "-1-2"} {
		f.Add(header)
	}
	f.Fuzz(func(t *testing.T, header string) {
		first, last, err := parseContentRange(header)
		if err == nil && (first < 0 || last < first || last-first+1 <= 0) {
			t.Fatalf("%q is %d-%d", header, first, last)
		}
	})
}
