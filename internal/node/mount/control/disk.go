package control

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/url"

	"sluice/internal/node/mount"
)

// handleDisk answers what concerns the disk.
func handleDisk(mux *http.ServeMux, m *mount.Manager, log *slog.Logger) {
	mux.HandleFunc("GET /v1/disk", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusOK, m.DiskUsage(r.Context()), log)
	})
	mux.HandleFunc("POST /v1/prune", func(w http.ResponseWriter, r *http.Request) {
		var opts mount.PruneOptions
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
		d.DisallowUnknownFields() // rather than to remove what a newer client would keep
		if err := d.Decode(&opts); err != nil {
			reply(w, http.StatusBadRequest, Error{Message: "request: " + err.Error()}, log)
			return
		}
		pruned, err := m.Prune(r.Context(), opts)
		if err != nil {
			fail(w, err, log)
			return
		}
		reply(w, http.StatusOK, pruned, log)
	})
	pin := func(do func(ctx context.Context, name string) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			err := do(r.Context(), r.URL.Query().Get("image"))
			switch {
			case errors.Is(err, mount.ErrUnknownImage):
				reply(w, http.StatusBadRequest, Error{Message: err.Error()}, log)
			case err != nil:
				fail(w, err, log)
			default:
				w.WriteHeader(http.StatusNoContent)
			}
		}
	}
	mux.HandleFunc("PUT /v1/pins", pin(m.Pin))
	mux.HandleFunc("DELETE /v1/pins", pin(m.Unpin))
}

// DiskUsage asks what images have on the disk.
func (c *Client) DiskUsage(ctx context.Context) (mount.DiskUsage, error) {
	var u mount.DiskUsage
	return u, c.do(ctx, http.MethodGet, "/v1/disk", nil, &u)
}

// Prune asks for content that nobody uses to be removed.
func (c *Client) Prune(ctx context.Context, opts mount.PruneOptions) (mount.Pruned, error) {
	var p mount.Pruned
	return p, c.do(ctx, http.MethodPost, "/v1/prune", opts, &p)
}

// Pin asks for an image's content to stay on the disk, or not any more.
func (c *Client) Pin(ctx context.Context, image string, pinned bool) error {
	method := http.MethodPut
	if !pinned {
		method = http.MethodDelete
	}
	return c.do(ctx, method, "/v1/pins?image="+url.QueryEscape(image), nil, nil)
}
