package registry

import (
	"context"
	"net/http"
	"strings"
	"time"

	"sluice/internal/auth"
	"sluice/oci"
)

// Options says how a Handler works. The zero value is useful.
type Options struct {
	// Authorizer decides who may do what. Nil: everybody may do everything.
	Authorizer Authorizer

	// PageSize bounds, and is by default, the number of entries in one
	// answer of a list. Zero: 10,000.
	PageSize int

	// MaxManifest bounds the size of a manifest that is pushed, in bytes. Zero
	// and anything larger: oci.MaxManifestSize.
	MaxManifest int64

	// Redirect sends clients to the object store for blobs, where the registry
	// is a Redirector, by a URL that is good for so long. Zero: never.
	Redirect time.Duration
}

// Redirector is an oci.Registry whose blobs clients can read elsewhere.
type Redirector interface {
	// BlobURL returns a URL of a blob that needs no credentials and is good
	// for ttl, or "" if the blob can only be read here.
	//
	// Errors: as GetBlob.
	BlobURL(ctx context.Context, repo string, digest oci.Digest, ttl time.Duration) (string, error)
}

// Handler serves /v2/… of an oci.Registry over HTTP. It belongs behind Wrap,
// which authenticates; on its own it has a front with default options.
type Handler struct {
	registry   oci.Registry
	redirector Redirector // nil: all blobs are read here
	opts       Options
	front      http.Handler // when it is on its own
}

// NewHandler returns a handler that serves reg.
func NewHandler(reg oci.Registry, opts Options) *Handler {
	if opts.PageSize == 0 {
		opts.PageSize = 10_000
	}
	if opts.MaxManifest <= 0 || opts.MaxManifest > oci.MaxManifestSize {
		opts.MaxManifest = oci.MaxManifestSize
	}
	h := &Handler{registry: reg, opts: opts}
	if opts.Redirect > 0 {
		h.redirector, _ = reg.(Redirector)
	}
	h.front = Wrap(http.HandlerFunc(h.ServeHTTP), FrontOptions{Authorizer: opts.Authorizer})
	return h
}

// handle answers a request, or returns an error before it has written anything.
type handle func(h *Handler, w http.ResponseWriter, r *http.Request, req Request) error

// endpoint is how requests of one kind are served.
type endpoint struct {
	name   string // in metrics and traces
	action string // that the caller must be allowed in the repository
	handle handle
}

// endpointOf returns the endpoint of a kind of request.
func endpointOf(k Kind) endpoint {
	return [...]endpoint{
		kindPing:           {"ping", "", (*Handler).ping},
		kindBlobGet:        {"blob_get", auth.ActionPull, (*Handler).getBlob},
		kindBlobHead:       {"blob_head", auth.ActionPull, (*Handler).headBlob},
		kindBlobDelete:     {"blob_delete", auth.ActionDelete, (*Handler).deleteBlob},
		kindUploadStart:    {"upload_start", auth.ActionPush, (*Handler).startUpload},
		kindUploadAppend:   {"upload_append", auth.ActionPush, (*Handler).appendUpload},
		kindUploadCommit:   {"upload_commit", auth.ActionPush, (*Handler).commitUpload},
		kindUploadStatus:   {"upload_status", auth.ActionPush, (*Handler).uploadStatus},
		kindUploadCancel:   {"upload_cancel", auth.ActionPush, (*Handler).cancelUpload},
		kindManifestGet:    {"manifest_get", auth.ActionPull, (*Handler).getManifest},
		kindManifestHead:   {"manifest_head", auth.ActionPull, (*Handler).getManifest},
		kindManifestPut:    {"manifest_put", auth.ActionPush, (*Handler).putManifest},
		kindManifestDelete: {"manifest_delete", auth.ActionDelete, (*Handler).deleteManifest},
		kindTags:           {"tags", auth.ActionPull, (*Handler).listTags},
		kindCatalog:        {"catalog", "", (*Handler).listRepositories},
		kindReferrers:      {"referrers", auth.ActionPull, (*Handler).listReferrers},
	}[k]
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if conversationOf(r.Context()) == nil {
		h.front.ServeHTTP(w, r)
		return
	}
	if err := h.serve(w, r); err != nil {
		WriteError(w, r, err)
	}
}

func (h *Handler) serve(w http.ResponseWriter, r *http.Request) error {
	if r.URL.Path != "/v2" && !strings.HasPrefix(r.URL.Path, "/v2/") {
		return notFound(r.URL.Path)
	}
	w.Header().Set("Docker-Distribution-API-Version", "registry/2.0")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	req, err := parseRequest(r.Method, r.URL.Path, r.URL.RawQuery)
	if err != nil {
		return err
	}
	e := endpointOf(req.Kind)
	Report(r, e.name, req.Repository)
	if err := h.authorize(r, req, e.action); err != nil {
		return err
	}
	return e.handle(h, w, r, req)
}

// ping is end-1: the protocol is spoken here.
func (h *Handler) ping(w http.ResponseWriter, r *http.Request, _ Request) error {
	writeBody(w, r, http.StatusOK, "application/json", []byte("{}"))
	return nil
}
