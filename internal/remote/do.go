package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"

	"sluice/oci"
)

const (
	minBackoff = 200 * time.Millisecond // doubled at each retry, and jittered

	// maxRetryAfter is the longest that a server can make a request wait.
	// Who asks for longer gets no second attempt.
	maxRetryAfter = 30 * time.Second

	// maxDrain is how much of an unwanted body is read to keep its connection.
	maxDrain = 4 << 10
)

// call is one request, to be repeated if need be.
type call struct {
	what   string // for messages: "reading blob sha256:… of library/debian"
	method string
	url    *url.URL
	header http.Header
	scopes []string

	// body returns the request's body from its beginning; nil for none. If
	// once is set, it can be called only once.
	body func() (io.ReadCloser, error)
	size int64
	once bool

	// again says that repeating the request does no harm.
	again bool

	// place names what is read if the registry may send us elsewhere for it,
	// and the place is worth remembering; "" if not.
	place string
}

// do sends a request and returns the answer, whatever its status. Its body ends
// with an error when ctx does or nothing comes for too long, and must be closed.
func (r *Registry) do(ctx context.Context, c call) (*http.Response, error) {
	refusals := 0
	for attempt := 0; ; attempt++ {
		l := new(login)
		resp, err := r.attempt(context.WithValue(ctx, loginKey{}, l), c)
		if code, reason := r.refused(c, resp, err); code != nil && !c.once && refusals < maxRefusals {
			again, cerr := r.another(ctx, l, reason)
			if (again || cerr != nil) && resp != nil {
				drain(resp)
			}
			if cerr != nil {
				return nil, r.ociErrorf(code, c, "%s (%v)", reason, redact(cerr))
			}
			if again {
				refusals++
				attempt--
				continue
			}
		}
		if !c.again || c.once || attempt >= r.opts.Retries || !canRetry(resp, err) {
			return resp, err
		}
		wait := minBackoff << min(attempt, 16)
		wait = wait/2 + rand.N(wait)
		if resp != nil {
			after, ok := retryAfter(resp.Header.Get("Retry-After"), time.Now())
			if ok && after > maxRetryAfter {
				return resp, nil
			}
			wait = max(wait, after)
			drain(resp)
			err = errors.New(resp.Status)
		}
		r.opts.Log.Debug("registry request is repeated", "what", c.what, "host", r.host, "after", wait, "error", err)
		select {
		case <-ctx.Done():
			return nil, r.errorf(c, "%w", ctx.Err())
		case <-time.After(wait):
		}
	}
}

// attempt is do without repetition.
func (r *Registry) attempt(ctx context.Context, c call) (*http.Response, error) {
	if resp := r.atKnownPlace(ctx, c); resp != nil {
		return resp, nil
	}
	u := c.url
	if r.opts.Namespace != "" && (c.method == http.MethodGet || c.method == http.MethodHead) && u.Host == r.base.Host {
		named := *u
		query := named.Query()
		query.Set("ns", r.opts.Namespace)
		named.RawQuery = query.Encode()
		u = &named
	}
	resp, err := r.request(auth.WithScopesForHost(ctx, r.base.Host, r.scopes(c)...), c, u, r.client.Do)
	if err == nil && c.again && !c.once && elsewhere(c, resp) && expired(resp.StatusCode) {
		// What we were sent to us with ran out on the way, or somebody has kept
		// an old redirect: a fresh one is asked for, once.
		drain(resp)
		resp, err = r.request(auth.WithScopesForHost(ctx, r.base.Host, r.scopes(c)...), c, u, r.client.Do)
	}
	if err == nil {
		r.rememberPlace(c, resp)
	}
	return resp, err
}

// scopes returns a call's scopes. Where an endpoint's path goes on after the
// API's, that is part of the repositories' names in tokens.
func (r *Registry) scopes(c call) []string {
	_, prefix, ok := strings.Cut(r.api, "/v2/")
	if !ok {
		return c.scopes
	}
	var all []string
	for _, s := range c.scopes {
		if rest, ok := strings.CutPrefix(s, "repository:"); ok {
			s = "repository:" + prefix + "/" + rest
		}
		all = append(all, s)
	}
	return all
}

// request sends a call's request to u.
func (r *Registry) request(ctx context.Context, c call, u *url.URL, send func(*http.Request) (*http.Response, error)) (*http.Response, error) {
	if err := ctx.Err(); err != nil {
		return nil, r.errorf(c, "%w", err)
	}
	patience := r.opts.WriteTimeout
	if c.method == http.MethodGet || c.method == http.MethodHead {
		patience = r.opts.ReadTimeout
	}
	inner, dog := watch(ctx, patience)
	req, err := http.NewRequestWithContext(inner, c.method, u.String(), nil)
	if err != nil {
		dog.stop()
		return nil, r.errorf(c, "%w", redact(err))
	}
	for name, values := range c.header {
		req.Header[name] = values
	}
	// Ranges and lengths are of the blob itself, so nothing may compress it.
	req.Header.Set("Accept-Encoding", "identity")
	if c.body != nil {
		next := func() (io.ReadCloser, error) {
			body, err := c.body()
			if err != nil {
				return nil, err
			}
			return &sentBody{body, dog}, nil
		}
		if req.Body, err = next(); err != nil {
			dog.stop()
			return nil, r.errorf(c, "%w", err)
		}
		req.ContentLength = c.size
		if !c.once {
			req.GetBody = next
		}
	}
	resp, err := send(req)
	if err != nil {
		defer dog.stop()
		return nil, r.transportError(c, dog.explain(err))
	}
	dog.rest()
	resp.Body = &receivedBody{resp.Body, dog}
	return resp, nil
}

// canRetry reports whether an answer is one that may be better next time.
func canRetry(resp *http.Response, err error) bool {
	if err == nil {
		return retryStatus(resp.StatusCode)
	}
	var slow interface{ Timeout() bool }
	var token *errcode.ErrorResponse
	var name *net.DNSError
	var op *net.OpError
	switch {
	case errors.Is(err, context.Canceled), errors.As(err, &slow) && slow.Timeout(), errors.As(err, &name) && name.IsNotFound:
		return false
	case errors.As(err, &token): // the answer of a token server
		return retryStatus(token.StatusCode)
	case errors.Is(err, oci.ErrTooManyRequests): // and of a busy one: see transportError
		return true
	}
	return errors.As(err, &op) && !strings.HasSuffix(op.Op, " error") || // "remote error" and "local error" are TLS alerts
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || lostHTTP2(err)
}

// lostHTTP2 reports whether an HTTP/2 connection, or a request's stream of one,
// was cut. Package net/http has no types for that.
func lostHTTP2(err error) bool {
	text := err.Error()
	return strings.Contains(text, "http2: client connection lost") ||
		strings.Contains(text, "http2: server sent GOAWAY") ||
		strings.Contains(text, "stream error: stream ID")
}

func retryStatus(status int) bool {
	switch status {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// retryAfter parses a Retry-After header (RFC 9110, section 10.2.3).
func retryAfter(header string, now time.Time) (time.Duration, bool) {
	if seconds, err := strconv.ParseUint(header, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second, true
	}
	if at, err := http.ParseTime(header); err == nil {
		return max(at.Sub(now), 0), true
	}
	return 0, false
}

// drain closes an answer that isn't wanted, after reading a small body, so that
// the connection can be used again.
func drain(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, maxDrain) // whatever happens, it is closed
	resp.Body.Close()
}

// watchdog cancels a request that makes no progress. Time that the caller takes,
// to supply a body or to read one, doesn't count.
type watchdog struct {
	patience time.Duration
	cancel   context.CancelCauseFunc
	cause    func() error // why the request's context is done, or nil

	mu    sync.Mutex // guards timer against a Reset after stop
	timer *time.Timer
	over  bool
}

// slowError says that nothing came for too long.
type slowError struct{ patience time.Duration }

func (e *slowError) Error() string { return fmt.Sprintf("no progress for %v", e.patience) }

// Timeout makes it a timeout as package net has them.
func (e *slowError) Timeout() bool { return true }

// watch returns a context for one request, and the watchdog that ends it. The
// caller makes sure that stop is called.
func watch(ctx context.Context, patience time.Duration) (context.Context, *watchdog) {
	inner, cancel := context.WithCancelCause(ctx)
	d := &watchdog{patience: patience, cancel: cancel}
	d.cause = func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return context.Cause(inner)
	}
	d.timer = time.AfterFunc(patience, func() { cancel(&slowError{patience}) })
	return inner, d
}

// wait begins a wait for the server.
func (d *watchdog) wait() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.over {
		d.timer.Reset(d.patience)
	}
}

// rest ends it: now it is the caller's turn.
func (d *watchdog) rest() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.timer.Stop()
}

// stop ends the request. It may be called again.
func (d *watchdog) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.over = true
	d.timer.Stop()
	d.cancel(nil)
}

// explain returns the reason that the request's context ended, if it did, in
// place of what came of that.
func (d *watchdog) explain(err error) error {
	if cause := d.cause(); cause != nil && err != nil {
		return cause
	}
	return err
}

// sentBody is a request's body. Between its reads the server takes what was read.
type sentBody struct {
	io.ReadCloser
	dog *watchdog
}

func (b *sentBody) Read(p []byte) (int, error) {
	b.dog.rest()
	defer b.dog.wait()
	return b.ReadCloser.Read(p)
}

// receivedBody is an answer's body; closing it ends the request.
type receivedBody struct {
	io.ReadCloser
	dog *watchdog
}

func (b *receivedBody) Read(p []byte) (int, error) {
	if cause := b.dog.cause(); cause != nil {
		return 0, cause
	}
	b.dog.wait()
	defer b.dog.rest()
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = b.dog.explain(err)
	}
	return n, err
}

func (b *receivedBody) Close() error {
	err := b.ReadCloser.Close()
	b.dog.stop()
	return err
}
