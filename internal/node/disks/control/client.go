package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"sluice/internal/node/endpoint"
	"sluice/internal/node/happening/feed"
)

// ErrNoDaemon: nobody answers on the socket.
var ErrNoDaemon = errors.New("teleportd doesn't answer")

// maxAnswer bounds an answer, or a line of one, in bytes.
const maxAnswer = 64 << 20

// Client talks to the daemon at a socket. It may be used concurrently.
type Client struct{ daemon *endpoint.Client }

// NewClient returns a client of the daemon at socket. It connects with the first
// call.
func NewClient(socket string) *Client { return &Client{endpoint.NewClient(socket)} }

// Mount has an image mounted, or pulled, and calls on for each stage. The error of
// an image that can't be is an *Error.
func (c *Client) Mount(ctx context.Context, req Mount, on func(Line)) (Mounted, error) {
	resp, err := c.send(ctx, http.MethodPost, "/v1/mounts", req)
	if err != nil {
		return Mounted{}, err
	}
	defer resp.Body.Close()
	d := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer))
	for {
		var line Line
		if err := d.Decode(&line); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return Mounted{}, fmt.Errorf("teleportd's answer ends early, is it still there? %w", err)
		}
		switch {
		case line.Error != nil:
			return Mounted{}, line.Error
		case line.Mounted != nil:
			return *line.Mounted, nil
		case line.Stage != "":
			on(line)
		}
	}
}

// Unmount ends a claim. Errors: ErrUnknown.
func (c *Client) Unmount(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodDelete, "/v1/mounts?id="+url.QueryEscape(id), nil)
}

// Images lists the images that were pulled.
func (c *Client) Images(ctx context.Context) ([]Kept, error) {
	var list []Kept
	return list, c.do(ctx, http.MethodGet, "/v1/images", &list)
}

// Remove removes an image. Errors: ErrUnknown, ErrInUse.
func (c *Client) Remove(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, "/v1/images?name="+url.QueryEscape(name), nil)
}

// Status asks how the daemon is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	return s, c.do(ctx, http.MethodGet, "/v1/status", &s)
}

// Events calls fn for each event after a cursor, as feed.Follow does.
func (c *Client) Events(ctx context.Context, after string, follow bool, fn func(feed.Line) error) error {
	get := func(ctx context.Context, path string) (*http.Response, error) {
		return c.send(ctx, http.MethodGet, path, nil)
	}
	return feed.Follow(ctx, get, after, follow, fn)
}

func (c *Client) do(ctx context.Context, method, path string, answer any) error {
	resp, err := c.send(ctx, method, path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if answer == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(answer); err != nil {
		return fmt.Errorf("teleportd's answer: %w", err)
	}
	return nil
}

// send sends a request, with a body unless that is nil, and returns an answer of
// 2xx.
func (c *Client) send(ctx context.Context, method, path string, body any) (*http.Response, error) {
	req, err := endpoint.NewRequest(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.daemon.Do(req)
	if errors.Is(err, endpoint.ErrNobody) {
		return nil, fmt.Errorf("%w on %s", ErrNoDaemon, c.daemon.Socket())
	}
	if err != nil {
		return nil, fmt.Errorf("teleportd: %w", err)
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxRequest))
	if err != nil {
		return nil, fmt.Errorf("teleportd's answer: %w", err)
	}
	e := new(Error)
	if err := json.Unmarshal(answer, e); err != nil || e.Message == "" {
		return nil, fmt.Errorf("teleportd answers %d: %.200q", resp.StatusCode, answer)
	}
	e.code = resp.StatusCode
	return nil, e
}
