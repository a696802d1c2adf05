package control

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"

	"sluice/internal/node/happening"
	"sluice/internal/node/happening/feed"
	"sluice/internal/node/mount"
)

// Happening is one line of GET /v1/events.
type Happening = feed.Line

// maxSwitch bounds the body of PUT /v1/streaming, in bytes.
const maxSwitch = 64 << 10

// streamingRequest is the body of PUT /v1/streaming.
type streamingRequest struct {
	Enabled *bool  `json:"enabled"`
	Why     string `json:"why"`
}

// handleEvents answers what reporters ask: events, if there are any to tell, and
// the switch.
func handleEvents(mux *http.ServeMux, m *mount.Manager, events *happening.Log, log *slog.Logger) {
	mux.Handle("GET /v1/events", feed.Handler(events, log))
	mux.HandleFunc("PUT /v1/streaming", func(w http.ResponseWriter, r *http.Request) {
		var req streamingRequest
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxSwitch))
		d.DisallowUnknownFields()
		err := d.Decode(&req)
		if err == nil && req.Enabled == nil {
			err = errors.New("enabled is missing: say true or false")
		}
		if err != nil {
			reply(w, http.StatusBadRequest, Error{Message: "request: " + err.Error()}, log)
			return
		}
		m.SetSwitch(mount.Switch{Off: !*req.Enabled, Why: req.Why})
		w.WriteHeader(http.StatusNoContent)
	})
}

// Events calls fn for each event after a cursor, as feed.Follow does.
func (c *Client) Events(ctx context.Context, after string, follow bool, fn func(Happening) error) error {
	return feed.Follow(ctx, c.get, after, follow, fn)
}

// get sends a request without a body. An answer other than 2xx is an error.
func (c *Client) get(ctx context.Context, path string) (*http.Response, error) {
	resp, err := c.send(ctx, http.MethodGet, path, nil)
	if err != nil || resp.StatusCode/100 == 2 {
		return resp, err
	}
	defer resp.Body.Close()
	_, err = readBody(resp)
	return nil, err
}

// SetStreaming switches streaming of new images off, and says why, or on again.
// It's so until the daemon ends.
func (c *Client) SetStreaming(ctx context.Context, enabled bool, why string) error {
	return c.do(ctx, http.MethodPut, "/v1/streaming", streamingRequest{&enabled, why}, nil)
}
