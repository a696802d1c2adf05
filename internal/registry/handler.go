package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"sluice/oci"
)

// Options says how a Handler works. The zero value is useful.
type Options struct {
	// Log gets one line for each request, and everything that goes wrong
	// inside. Nil: no log.
	Log *slog.Logger

	// Ready tells whether requests can be served now; /readyz asks it. Nil:
	// always.
	Ready func(ctx context.Context) error

	// IdleTimeout ends a request whose client neither sends nor takes a byte
	// for so long. Zero: one minute. It doesn't bound how long a blob takes
	// that keeps flowing.
	IdleTimeout time.Duration

	// PageSize bounds, and is by default, the number of entries in one
	// answer of a list. Zero: 10,000.
	PageSize int
}

// Handler serves an oci.Registry over HTTP: /v2/…, /healthz and /readyz.
type Handler struct {
	registry oci.Registry
	opts     Options
}

// NewHandler returns a handler that serves reg.
func NewHandler(reg oci.Registry, opts Options) *Handler {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.IdleTimeout == 0 {
		opts.IdleTimeout = time.Minute
	}
	if opts.PageSize == 0 {
		opts.PageSize = 10_000
	}
	return &Handler{registry: reg, opts: opts}
}

// handle answers a request, or returns an error before it has written anything.
type handle func(h *Handler, w http.ResponseWriter, r *http.Request, req Request) error

// handles returns the method for a kind of request.
func handles(k Kind) handle {
	return [...]handle{
		kindPing:           (*Handler).ping,
		kindBlobGet:        (*Handler).getBlob,
		kindBlobHead:       (*Handler).headBlob,
		kindBlobDelete:     (*Handler).deleteBlob,
		kindUploadStart:    (*Handler).startUpload,
		kindUploadAppend:   (*Handler).appendUpload,
		kindUploadCommit:   (*Handler).commitUpload,
		kindUploadStatus:   (*Handler).uploadStatus,
		kindUploadCancel:   (*Handler).cancelUpload,
		kindManifestGet:    (*Handler).getManifest,
		kindManifestHead:   (*Handler).getManifest,
		kindManifestPut:    (*Handler).putManifest,
		kindManifestDelete: (*Handler).deleteManifest,
		kindTags:           (*Handler).listTags,
		kindCatalog:        (*Handler).listRepositories,
		kindReferrers:      (*Handler).listReferrers,
	}[k]
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := newConversation(w, r, h.opts.IdleTimeout)
	defer func() {
		if p := recover(); p != nil {
			h.opts.Log.Error("panic", "method", r.Method, "path", r.URL.Path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			c.fail(fmt.Errorf("panic: %v", p))
		}
		h.log(r, c)
	}()
	if err := h.serve(c, r); err != nil {
		c.fail(err)
	}
}

func (h *Handler) serve(w http.ResponseWriter, r *http.Request) error {
	switch {
	case r.URL.Path == "/healthz":
		writeBody(w, r, http.StatusOK, "text/plain; charset=utf-8", []byte("ok\n"))
		return nil
	case r.URL.Path == "/readyz":
		return h.ready(w, r)
	case r.URL.Path != "/v2" && !strings.HasPrefix(r.URL.Path, "/v2/"):
		return notFound(r.URL.Path)
	}
	w.Header().Set("Docker-Distribution-API-Version", "registry/2.0")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	req, err := parseRequest(r.Method, r.URL.Path, r.URL.RawQuery)
	if err != nil {
		return err
	}
	return handles(req.Kind)(h, w, r, req)
}

func (h *Handler) ready(w http.ResponseWriter, r *http.Request) error {
	if h.opts.Ready != nil {
		if err := h.opts.Ready(r.Context()); err != nil {
			h.opts.Log.Error("not ready", "error", err)
			writeBody(w, r, http.StatusServiceUnavailable, "text/plain; charset=utf-8", []byte("not ready: see the registry's log\n"))
			return nil
		}
	}
	writeBody(w, r, http.StatusOK, "text/plain; charset=utf-8", []byte("ready\n"))
	return nil
}

// ping is end-1: the protocol is spoken here.
func (h *Handler) ping(w http.ResponseWriter, r *http.Request, _ Request) error {
	writeBody(w, r, http.StatusOK, "application/json", []byte("{}"))
	return nil
}

// log writes the access log's line. Queries and headers stay out of it, there
// may be secrets in them.
func (h *Handler) log(r *http.Request, c *conversation) {
	level := slog.LevelInfo
	if c.err == nil && (r.URL.Path == "/healthz" || r.URL.Path == "/readyz") {
		level = slog.LevelDebug // somebody asks every few seconds
	}
	attrs := []slog.Attr{
		slog.String("method", r.Method),
		slog.String("path", clip(r.URL.Path)),
		slog.Int("status", c.status),
		slog.Int64("in", c.received),
		slog.Int64("out", c.sent),
		slog.Duration("took", time.Since(c.began)),
		slog.String("remote", r.RemoteAddr),
		slog.String("agent", clip(r.UserAgent())),
	}
	if c.err != nil {
		attrs = append(attrs, slog.String("error", c.err.Error()))
		var known *oci.Error
		if !errors.As(c.err, &known) && c.status != statusClientGone {
			level = slog.LevelError
		}
	}
	h.opts.Log.LogAttrs(r.Context(), level, "request", attrs...)
}

// clip bounds what a client can make us log.
func clip(s string) string { return s[:min(len(s), 500)] }
