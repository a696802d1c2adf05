package acr

import (
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"sluice/internal/auth"
	"sluice/internal/index"
	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/internal/streaming"
	"sluice/internal/teleport"
)

// Options says how a Handler works. The zero value serves everybody.
type Options struct {
	// Authorizer tells who asks and what they may. Nil: everybody may do
	// everything.
	Authorizer registry.Authorizer

	// Authority has the tokens and scope maps. Nil: there are none, and their
	// endpoints answer UNSUPPORTED.
	Authority *auth.Authority

	// Service is the registry's name in answers. Empty: the host that the
	// client asked for.
	Service string

	// SoftDelete is how long deleted manifests are kept, to tell when they
	// will be purged; as in stored.Options. Zero: not at all.
	SoftDelete time.Duration

	// CollectGrace is how long a blob that nothing needs must not have been
	// touched before POST /acr/v1/_gc removes it. Zero: a day.
	CollectGrace time.Duration

	// Streaming converts images. Nil: conversion's endpoints answer UNSUPPORTED.
	Streaming *streaming.Service

	// Teleport expands images. Nil: it can't be enabled for repositories.
	Teleport *teleport.Service

	// ImportTransport carries the requests to registries that are imported
	// from. Nil: one of the Handler's own.
	ImportTransport http.RoundTripper

	// Log gets what goes wrong in the background. Nil: no log.
	Log *slog.Logger
}

// Handler serves the management API, and does the imports that it is asked
// for (RunImports). Use New. It belongs behind registry.Wrap, which logs,
// limits, and tells who asks.
type Handler struct {
	registry *stored.Registry
	index    *index.DB
	store    storage.Store
	opts     Options

	// wake tells RunImports of this process that there is a new import. It
	// holds one element at most.
	wake chan struct{}
}

// New returns the management of reg, which stands on db and store.
func New(reg *stored.Registry, db *index.DB, store storage.Store, opts Options) *Handler {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.CollectGrace == 0 {
		opts.CollectGrace = 24 * time.Hour
	}
	if opts.ImportTransport == nil {
		opts.ImportTransport = remote.NewTransport()
	}
	return &Handler{registry: reg, index: db, store: store, opts: opts, wake: make(chan struct{}, 1)}
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := h.serve(w, r); err != nil {
		writeError(w, r, err)
	}
}

func (h *Handler) serve(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	req, err := parseRequest(r.URL.Path, r.URL.RawQuery)
	if err != nil {
		return err
	}
	registry.Report(r, req.kind, req.Repository)
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	e, ok := req.endpoints[method]
	if !ok {
		return methodNotAllowed(r.Method, req.endpoints)
	}
	// Before anything is looked up, so that nobody learns what exists.
	if err := registry.Authorize(r, h.opts.Authorizer, e.need(req)...); err != nil {
		if method != http.MethodPatch || req.lesser == nil || registry.Authorize(r, h.opts.Authorizer, req.lesser.need(req)...) != nil {
			return err
		}
		e = *req.lesser
	}
	return e.handle(h, w, r, req)
}

// image returns what ACR puts around the attributes of things in a repository.
func (h *Handler) image(r *http.Request, repo string) image {
	service := h.opts.Service
	if service == "" {
		service = r.Host
	}
	return image{Registry: service, Name: repo}
}

// Sizes of pages.
const (
	defaultPage = 100 // what ACR's clients ask for
	maxPage     = 1000
)

// page returns the last and n of a list's request.
func page(req Request) (last string, n int, err error) {
	last = req.Query.Get("last")
	if len(last) > 512 {
		return "", 0, badRequest("last has %d characters: give it as the link of the page before did", len(last))
	}
	s := req.Query.Get("n")
	if s == "" {
		return last, defaultPage, nil
	}
	n, err = strconv.Atoi(s)
	if err != nil || n < 1 {
		return "", 0, errPage.Withf("n=%.40q is not a number of entries, 1 to %d", s, maxPage)
	}
	return last, min(n, maxPage), nil
}

// next cuts a list of up to n+1 entries to n and links to the next page
// (RFC 8288) if one was cut off. The link keeps the other parameters.
func next[T any](w http.ResponseWriter, r *http.Request, req Request, list []T, n int, key func(T) string) []T {
	if len(list) <= n {
		if list == nil {
			return []T{} // in JSON not null
		}
		return list
	}
	list = list[:n]
	query := req.Query
	query.Set("last", key(list[n-1]))
	query.Set("n", strconv.Itoa(n))
	u := *r.URL
	u.Scheme, u.Host, u.RawQuery = "", "", query.Encode()
	w.Header().Set("Link", "<"+u.RequestURI()+`>; rel="next"`)
	return list
}

// order returns the order that orderby asks for.
func order(req Request) (index.Order, error) {
	switch s := req.Query.Get("orderby"); s {
	case "", "none", "name":
		return index.ByName, nil
	case "timeasc":
		return index.TimeAscending, nil
	case "timedesc":
		return index.TimeDescending, nil
	default:
		return 0, badRequest("orderby=%.40q: use timeasc, timedesc, or name", s)
	}
}
