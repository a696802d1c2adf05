// Package control is how programs on the same machine talk to a node daemon:
// HTTP with JSON on a unix socket that only root can open. Handler is the
// daemon's end, Client the other; `sluice node status`, `mount`, `umount` and
// `run` are clients.
//
//	GET    /v1/status            -> Status
//	POST   /v1/mounts            Mount -> Mounted
//	DELETE /v1/mounts?name=NAME  name is a claim's ID or directory
//	GET    /v1/traces?image=REF  -> []timeline.Span, of the last start
//	GET    /v1/traces?id=TRACE   likewise
//	GET    /v1/disk              -> mount.DiskUsage
//	POST   /v1/prune             mount.PruneOptions -> mount.Pruned
//	PUT    /v1/pins?image=NAME   name is a reference or an artifact's digest
//	DELETE /v1/pins?image=NAME
//	GET    /v1/events?after=CURSOR&follow=BOOL  -> Happening, one a line
//	PUT    /v1/streaming         {"enabled": BOOL, "why": TEXT}
//
// Events come as they are in happening.Log, after one that was seen; while they
// are followed, an empty line says every 15 seconds that the daemon lives.
//
// An answer other than 2xx has an Error as its body. A request with a traceparent
// header (W3C Trace Context) is part of that trace.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"os"

	"go.opentelemetry.io/otel/propagation"

	"sluice/internal/node/cache"
	"sluice/internal/node/credentials"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/node/timeline"
)

// maxBody bounds requests and answers, in bytes.
const maxBody = 64 << 20

// Info is what a daemon says of itself.
type Info struct {
	PID  int    `json:"pid"`
	Root string `json:"root"`
	// Standalone: started by `sluice mount` or `sluice run`, ends by itself.
	Standalone bool `json:"standalone,omitempty"`
	// Snapshotter is the socket that containerd uses, if there's one.
	Snapshotter string `json:"snapshotter,omitempty"`
	// Metrics is the URL of the metrics, if they are anywhere but here.
	Metrics string `json:"metrics,omitempty"`
	// Plane is how images get to the kernel.
	Plane Plane `json:"plane"`
	// Resumed: the mounts of an earlier daemon go on. Otherwise Reason says
	// why not, if there were any.
	Resumed bool   `json:"resumed"`
	Reason  string `json:"reason,omitempty"`
	// Credentials returns who the node is to registries. Nil: it isn't told.
	Credentials func() []credentials.Status `json:"-"`
	// Events is what GET /v1/events tells. Nil: nothing is told.
	Events *happening.Log `json:"-"`
	// Registries returns what is wrong with registries. Nil: it isn't told.
	Registries func() []RegistryProblem `json:"-"`
}

// Plane says how images get to the kernel.
type Plane struct {
	// Name is what `sluice node --plane` calls it; empty if images can't be
	// streamed, and are pulled the ordinary way.
	Name   string `json:"name,omitempty"`
	Kernel string `json:"kernel"` // release, as uname -r prints it
	// How it works, in words.
	How string `json:"how"`
	// Reasons why it isn't a better one, and what it can't do.
	Reasons []string `json:"reasons,omitempty"`
}

// Status is the answer to GET /v1/status.
type Status struct {
	Daemon Info `json:"daemon"`
	mount.Status
	Credentials []credentials.Status `json:"credentials,omitempty"`
	Registries  []RegistryProblem    `json:"registries,omitempty"`
}

// RegistryProblem is a problem of package hosts, which clients needn't depend on.
type RegistryProblem struct {
	Registry string `json:"registry"`       // as in references
	Host     string `json:"host,omitempty"` // the URL of one that fails; "": the registry's files are wrong
	Error    string `json:"error"`
}

// Mount is the body of POST /v1/mounts.
type Mount struct {
	Reference string `json:"reference"`
	Dir       string `json:"dir,omitempty"`
	Writable  bool   `json:"writable,omitempty"`
	PID       int    `json:"pid,omitempty"`
}

// Mounted is the answer to POST /v1/mounts.
type Mounted struct {
	Claim  mount.Claim     `json:"claim"`
	Config json.RawMessage `json:"config"` // the image's config, verified
}

// Error is the answer to what failed.
type Error struct {
	Reason  mount.Reason `json:"reason,omitempty"`
	Message string       `json:"message"`
}

// Handler answers the control API for m, whose traces are in traces.
func Handler(m *mount.Manager, traces *timeline.Recorder, info Info, log *slog.Logger) http.Handler {
	info.PID = os.Getpid()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		s := Status{Daemon: info, Status: m.Status(r.Context())}
		if info.Credentials != nil {
			s.Credentials = info.Credentials()
		}
		if info.Registries != nil {
			s.Registries = info.Registries()
		}
		reply(w, http.StatusOK, s, log)
	})
	mux.HandleFunc("POST /v1/mounts", func(w http.ResponseWriter, r *http.Request) {
		var req Mount
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&req); err != nil {
			reply(w, http.StatusBadRequest, Error{Message: "request: " + err.Error()}, log)
			return
		}
		claim, config, err := m.Mount(r.Context(), mount.Request{Reference: req.Reference, Dir: req.Dir, Writable: req.Writable, PID: req.PID})
		if err != nil {
			fail(w, err, log)
			return
		}
		reply(w, http.StatusCreated, Mounted{Claim: claim, Config: config}, log)
	})
	mux.HandleFunc("DELETE /v1/mounts", func(w http.ResponseWriter, r *http.Request) {
		if err := m.Unmount(r.Context(), r.URL.Query().Get("name")); err != nil {
			fail(w, err, log)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET /v1/traces", func(w http.ResponseWriter, r *http.Request) {
		spans := traces.Trace(r.URL.Query().Get("id"))
		if image := r.URL.Query().Get("image"); image != "" {
			spans = traces.Last(image)
		}
		reply(w, http.StatusOK, append([]timeline.Span{}, spans...), log)
	})
	handleDisk(mux, m, log)
	handleEvents(mux, m, info.Events, log)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := propagation.TraceContext{}.Extract(r.Context(), propagation.HeaderCarrier(r.Header))
		mux.ServeHTTP(w, r.WithContext(ctx))
	})
}

// fail answers with an error.
func fail(w http.ResponseWriter, err error, log *slog.Logger) {
	code := http.StatusInternalServerError
	switch {
	case errors.Is(err, mount.ErrUnknownClaim):
		code = http.StatusNotFound
	case errors.Is(err, plane.ErrBusy):
		code = http.StatusConflict
	case errors.Is(err, cache.ErrUnsettled):
		code = http.StatusServiceUnavailable
	case errors.Is(err, context.Canceled):
		code = 499 // nobody reads it
	case mount.ReasonOf(err) != "":
		code = http.StatusUnprocessableEntity
	}
	reply(w, code, Error{Reason: mount.ReasonOf(err), Message: message(err)}, log)
}

// message is err's text without the reason, which is said apart.
func message(err error) string {
	var n *mount.NotStreaming
	if errors.As(err, &n) {
		return n.Err.Error()
	}
	return err.Error()
}

func reply(w http.ResponseWriter, code int, body any, log *slog.Logger) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(body); err != nil {
		log.Debug("a control client went away", "error", err)
	}
}
