package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"syscall"

	"go.opentelemetry.io/otel/propagation"
	"golang.org/x/sys/unix"

	"sluice/internal/node/endpoint"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/node/timeline"
)

// ErrNoDaemon: nobody answers on the socket.
var ErrNoDaemon = errors.New("no node daemon answers")

// Client talks to the daemon at a socket. It may be used concurrently.
type Client struct{ daemon *endpoint.Client }

// NewClient returns a client of the daemon at socket. It connects with the
// first call.
func NewClient(socket string) *Client { return &Client{endpoint.NewClient(socket)} }

// Status asks how the daemon is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	return s, c.do(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Mount asks for an image's mount. The error of an image that doesn't stream
// is a *mount.NotStreaming.
func (c *Client) Mount(ctx context.Context, req Mount) (Mounted, error) {
	var m Mounted
	return m, c.do(ctx, http.MethodPost, "/v1/mounts", req, &m)
}

// Unmount ends a claim, by its ID or directory. Errors: mount.ErrUnknownClaim,
// plane.ErrBusy.
func (c *Client) Unmount(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, "/v1/mounts?name="+url.QueryEscape(name), nil, nil)
}

// LastTrace asks what the last start of an image consisted of: nothing if the
// daemon doesn't remember one.
func (c *Client) LastTrace(ctx context.Context, image string) ([]timeline.Span, error) {
	var spans []timeline.Span
	return spans, c.do(ctx, http.MethodGet, "/v1/traces?image="+url.QueryEscape(image), nil, &spans)
}

// Trace asks for the daemon's part of a trace.
func (c *Client) Trace(ctx context.Context, id string) ([]timeline.Span, error) {
	var spans []timeline.Span
	return spans, c.do(ctx, http.MethodGet, "/v1/traces?id="+url.QueryEscape(id), nil, &spans)
}

func (c *Client) do(ctx context.Context, method, path string, body, answer any) error {
	resp, err := c.send(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := readBody(resp)
	if err != nil || answer == nil {
		return err
	}
	if err := json.Unmarshal(b, answer); err != nil {
		return fmt.Errorf("node daemon's answer: %w", err)
	}
	return nil
}

// send sends a request, with a body unless that is nil.
func (c *Client) send(ctx context.Context, method, path string, body any) (*http.Response, error) {
	req, err := endpoint.NewRequest(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	propagation.TraceContext{}.Inject(ctx, propagation.HeaderCarrier(req.Header))
	resp, err := c.daemon.Do(req)
	if errors.Is(err, endpoint.ErrNobody) {
		return nil, fmt.Errorf("%w on %s", ErrNoDaemon, c.daemon.Socket())
	}
	if err != nil {
		return nil, fmt.Errorf("node daemon: %w", err)
	}
	return resp, nil
}

// readBody returns an answer's body, or the error that it is.
func readBody(resp *http.Response) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return nil, fmt.Errorf("node daemon's answer: %w", err)
	}
	if resp.StatusCode/100 != 2 {
		return nil, decodeError(resp.StatusCode, b)
	}
	return b, nil
}

// decodeError makes the daemon's error one of this process.
func decodeError(code int, body []byte) error {
	var e Error
	if err := json.Unmarshal(body, &e); err != nil || e.Message == "" {
		return fmt.Errorf("node daemon answers %d: %.200q", code, body)
	}
	err := errors.New(e.Message)
	switch {
	case e.Reason != "":
		return &mount.NotStreaming{Reason: e.Reason, Err: err}
	case code == http.StatusNotFound:
		return mount.ErrUnknownClaim
	case code == http.StatusConflict:
		return plane.ErrBusy
	}
	return err
}

// Process returns the process that listens on the daemon's socket, as this
// process sees it: 0 if it is in another PID namespace. It's another than the
// PID in Info for a daemon in a container.
func (c *Client) Process(ctx context.Context) (int, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.daemon.Socket())
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		return 0, fmt.Errorf("%w on %s", ErrNoDaemon, c.daemon.Socket())
	}
	if err != nil {
		return 0, fmt.Errorf("node daemon: %w", err)
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("node daemon: %w", err)
	}
	var cred *unix.Ucred
	var cerr error
	err = raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, cerr); err != nil {
		return 0, fmt.Errorf("node daemon's process: %w", err)
	}
	return int(cred.Pid), nil
}
