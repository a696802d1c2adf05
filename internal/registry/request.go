package registry

import (
	"net/http"
	"net/url"
	"strings"

	"sluice/oci"
)

// Kind is what a request asks for.
type Kind int

// The kinds of requests, with the specification's names of the endpoints.
const (
	kindPing           Kind = iota // end-1
	kindBlobGet                    // end-2
	kindBlobHead                   // end-2
	kindManifestGet                // end-3
	kindManifestHead               // end-3
	kindUploadStart                // end-4a, 4b, 4c, 11
	kindUploadAppend               // end-5
	kindUploadCommit               // end-6
	kindManifestPut                // end-7
	kindTags                       // end-8a, 8b
	kindManifestDelete             // end-9
	kindBlobDelete                 // end-10
	kindReferrers                  // end-12a, 12b
	kindUploadStatus               // end-13
	kindUploadCancel               // end-14
	kindCatalog                    // of Docker's registry
)

// Request is a request of the distribution protocol, by its method and path.
// Names in it have been checked for their form.
type Request struct {
	Kind Kind

	// Repository is empty for kindPing and kindCatalog.
	Repository string

	// Digest is that of kindBlob… and kindReferrers.
	Digest oci.Digest

	// Reference is the tag or digest of kindManifest….
	Reference string

	// UploadID is that of kindUpload…, except kindUploadStart.
	UploadID string

	// Query has the parameters that depend on the kind.
	Query url.Values
}

// methods tells the kind of a request to an endpoint by the HTTP method.
type methods map[string]Kind

// parseRequest parses a path below /v2/. Errors are of package oci, or an
// StatusError for a path or method that doesn't exist.
func parseRequest(method, path, rawQuery string) (Request, error) {
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		return Request{}, badRequest("query of the URL: %v", err)
	}
	r := Request{Query: query}
	rest, ok := strings.CutPrefix(path, "/v2")
	if !ok || rest != "" && rest[0] != '/' {
		return Request{}, notFound(path)
	}
	switch rest {
	case "", "/":
		return r, r.setKind(method, methods{"GET": kindPing, "HEAD": kindPing})
	case "/_catalog":
		return r, r.setKind(method, methods{"GET": kindCatalog})
	}
	// A repository may have components like "blobs", so what follows it is
	// recognised from the end.
	segments := strings.Split(rest[1:], "/")
	kinds, n := r.parseEnd(segments)
	if kinds == nil {
		return Request{}, notFound(path)
	}
	r.Repository = strings.Join(segments[:len(segments)-n], "/")
	if err := r.setKind(method, kinds); err != nil {
		return Request{}, err
	}
	return r, r.check()
}

// parseEnd recognises the end of a path and returns which kinds it can be, and
// how many segments it has.
func (r *Request) parseEnd(segments []string) (methods, int) {
	n := len(segments)
	if n < 3 {
		return nil, 0
	}
	last, second, third := segments[n-1], segments[n-2], segments[n-3]
	switch {
	case second == "tags" && last == "list":
		return methods{"GET": kindTags}, 2
	case second == "manifests":
		r.Reference = last
		return methods{"GET": kindManifestGet, "HEAD": kindManifestHead, "PUT": kindManifestPut, "DELETE": kindManifestDelete}, 2
	case second == "referrers":
		r.Digest = oci.Digest(last)
		return methods{"GET": kindReferrers}, 2
	case n > 3 && third == "blobs" && second == "uploads" && last != "":
		r.UploadID = last
		return methods{"GET": kindUploadStatus, "PATCH": kindUploadAppend, "PUT": kindUploadCommit, "DELETE": kindUploadCancel}, 3
	case n > 3 && third == "blobs" && second == "uploads":
		return methods{"POST": kindUploadStart}, 3
	case second == "blobs" && last == "uploads":
		return methods{"POST": kindUploadStart}, 2
	case second == "blobs":
		r.Digest = oci.Digest(last)
		return methods{"GET": kindBlobGet, "HEAD": kindBlobHead, "DELETE": kindBlobDelete}, 2
	}
	return nil, 0
}

func (r *Request) setKind(method string, kinds methods) error {
	kind, ok := kinds[method]
	if !ok {
		return methodNotAllowed(method, kinds)
	}
	r.Kind = kind
	return nil
}

// check checks the form of the names, so that methods needn't.
func (r *Request) check() error {
	if err := oci.CheckRepository(r.Repository); err != nil {
		return err
	}
	switch r.Kind {
	case kindBlobGet, kindBlobHead, kindBlobDelete, kindReferrers:
		if _, err := oci.ParseDigest(r.Digest.String()); err != nil {
			return err
		}
	case kindManifestGet, kindManifestHead, kindManifestPut, kindManifestDelete:
		if isDigest(r.Reference) {
			_, err := oci.ParseDigest(r.Reference)
			return err
		}
		return oci.CheckTag(r.Reference)
	}
	return nil
}

// isDigest tells a digest from a tag, which has no colon.
func isDigest(reference string) bool { return strings.Contains(reference, ":") }

func blobPath(repo string, digest oci.Digest) string {
	return "/v2/" + repo + "/blobs/" + digest.String()
}

func uploadPath(repo, id string) string {
	return "/v2/" + repo + "/blobs/uploads/" + id
}

func manifestPath(repo, reference string) string {
	return "/v2/" + repo + "/manifests/" + reference
}

// mediaType returns a Content-Type header's value without its parameters.
func mediaType(h http.Header) string {
	t, _, _ := strings.Cut(h.Get("Content-Type"), ";")
	return strings.ToLower(strings.TrimSpace(t))
}
