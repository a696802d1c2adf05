package endpoint

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
)

// ErrNobody: no daemon answers on the socket.
var ErrNobody = errors.New("nobody answers")

// Client asks the daemon at a unix socket, by HTTP. It may be used concurrently.
type Client struct {
	socket string
	http   http.Client
}

// NewClient returns a client of the daemon at socket. It connects with the first
// request.
func NewClient(socket string) *Client {
	var d net.Dialer
	return &Client{
		socket: socket,
		http: http.Client{Transport: &http.Transport{
			// A connection that is kept may be one that the daemon has just closed,
			// and then it isn't known whether there's another daemon by now.
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return d.DialContext(ctx, "unix", socket)
			},
		}},
	}
}

// Socket returns the socket's name.
func (c *Client) Socket() string { return c.socket }

// NewRequest returns a request with a body, in JSON, unless that is nil.
func NewRequest(ctx context.Context, method, path string, body any) (*http.Request, error) {
	var content bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&content).Encode(body); err != nil {
			return nil, err
		}
	}
	return http.NewRequestWithContext(ctx, method, "http://daemon"+path, &content)
}

// Do sends a request and returns the answer, whatever its status. The error is
// ErrNobody also for a daemon that was killed while it was asked.
func (c *Client) Do(req *http.Request) (*http.Response, error) {
	resp, err := c.http.Do(req)
	for _, gone := range []error{syscall.ENOENT, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE, io.EOF} {
		if errors.Is(err, gone) { // the last three: it was killed with the connection in its queue
			return nil, fmt.Errorf("%w: %w", ErrNobody, err)
		}
	}
	return resp, err
}
