package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"sluice/internal/node/happening/feed"
	"sluice/internal/node/mount"
	"sluice/oci"
)

const (
	// maxRequest bounds a request's body, in bytes.
	maxRequest = 64 << 10

	// writeTimeout is how long a client may not read a line of its answer.
	writeTimeout = 10 * time.Second

	// progressEvery is how often progress of a layer is told at most.
	progressEvery = 100 * time.Millisecond
)

// Handler answers clients.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/mounts", s.serveMount)
	mux.HandleFunc("DELETE /v1/mounts", func(w http.ResponseWriter, r *http.Request) {
		s.answer(w, s.Unmount(r.Context(), r.URL.Query().Get("id")))
	})
	mux.HandleFunc("GET /v1/images", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusOK, s.Images(r.Context()), s.log)
	})
	mux.HandleFunc("DELETE /v1/images", func(w http.ResponseWriter, r *http.Request) {
		s.answer(w, s.Remove(r.Context(), r.URL.Query().Get("name")))
	})
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		st := Status{Daemon: s.opts.Info, Claims: s.Claims(), Images: s.Images(r.Context())}
		if s.opts.Node != nil {
			node, err := json.Marshal(s.opts.Node(r.Context()))
			if err != nil {
				s.answer(w, err)
				return
			}
			st.Node = node
		}
		reply(w, http.StatusOK, st, s.log)
	})
	mux.Handle("GET /v1/events", feed.Handler(s.opts.Events, s.log))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.count(1)
		defer s.count(-1)
		mux.ServeHTTP(w, r)
	})
}

// count counts requests under way.
func (s *Server) count(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy += n
}

// serveMount answers POST /v1/mounts.
func (s *Server) serveMount(w http.ResponseWriter, r *http.Request) {
	var req Mount
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest))
	d.DisallowUnknownFields()
	err := d.Decode(&req)
	if err == nil && !req.PullOnly && req.PID <= 0 {
		err = errors.New("pid is missing: whose mount is it?")
	}
	if err != nil {
		reply(w, http.StatusBadRequest, Error{Message: "request: " + err.Error()}, s.log)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	lines := &lines{w: w, control: http.NewResponseController(w), gone: cancel, told: make(map[int]time.Time)}
	done, err := s.Mount(ctx, req, lines.write)
	if err != nil {
		s.log.InfoContext(ctx, "an image wasn't mounted", "image", req.Reference, "pid", req.PID, "error", err)
		lines.write(Line{Error: &Error{Reason: reasonOf(err), Message: whyNot(err)}})
		return
	}
	s.log.InfoContext(ctx, "mounted", "image", done.Reference, "manifest", done.Manifest, "pid", req.PID, "claim", done.ID, "teleported", done.Teleported, "why", done.Why)
	lines.write(Line{Mounted: &done})
}

// reasonOf is the word for why an image can't be had, as far as there is one.
func reasonOf(err error) mount.Reason {
	if errors.Is(err, oci.ErrUnauthorized) || errors.Is(err, oci.ErrDenied) {
		return mount.Unauthorized
	}
	return mount.ReasonOf(err)
}

// lines writes an answer's lines. write is called by one at a time.
type lines struct {
	w       http.ResponseWriter
	control *http.ResponseController
	gone    context.CancelFunc // nobody reads any more
	told    map[int]time.Time  // when a layer's progress was told

	once sync.Once
}

func (l *lines) write(line Line) {
	if p := line.Progress; p != nil && !p.Finished && p.Layer >= 0 {
		if time.Since(l.told[p.Layer]) < progressEvery {
			return
		}
		l.told[p.Layer] = time.Now()
	}
	// Not every ResponseWriter has deadlines; those of a server do.
	_ = l.control.SetWriteDeadline(time.Now().Add(writeTimeout))
	err := json.NewEncoder(l.w).Encode(line)
	if err == nil {
		err = l.control.Flush()
	}
	if err != nil {
		l.once.Do(l.gone)
	}
}

// answer answers with an error or nothing.
func (s *Server) answer(w http.ResponseWriter, err error) {
	code := http.StatusInternalServerError
	switch {
	case err == nil:
		w.WriteHeader(http.StatusNoContent)
		return
	case errors.Is(err, ErrUnknown):
		code = http.StatusNotFound
	case errors.Is(err, ErrInUse):
		code = http.StatusConflict
	}
	reply(w, code, Error{Reason: mount.ReasonOf(err), Message: err.Error()}, s.log)
}

func reply(w http.ResponseWriter, code int, body any, log *slog.Logger) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(body); err != nil {
		log.Debug("a control client went away", "error", fmt.Sprint(err))
	}
}
