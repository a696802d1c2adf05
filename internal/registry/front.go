package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"go.opentelemetry.io/otel/trace"

	"sluice/internal/auth"
	"sluice/oci"
)

// FrontOptions says how everything that is served is received. The zero value
// is useful: everybody may come, as often as they like, and nothing is written.
type FrontOptions struct {
	// Log gets one line for each request, and everything that goes wrong
	// inside. Nil: no log.
	Log *slog.Logger

	// IdleTimeout ends a request whose client neither sends nor takes a byte
	// for so long. Zero: one minute. It doesn't bound how long a blob takes
	// that keeps flowing.
	IdleTimeout time.Duration

	// Ready tells whether requests can be served now; /readyz asks it. What
	// isn't ready is for the log. Nil: always.
	Ready func(ctx context.Context) error

	// Authorizer tells who calls, once for each request. Nil: nobody is asked.
	Authorizer Authorizer

	// Limits bounds how often one caller may ask.
	Limits Limits

	// ClientAddress returns the IP address that a request comes from. Nil:
	// that of the connection, which is the proxy's if there is one; see
	// ForwardedAddress.
	ClientAddress func(*http.Request) string

	// Metrics counts what happens. Nil: nothing is counted.
	Metrics *Metrics

	// Traces gets a span for each request. Nil: none.
	Traces trace.TracerProvider
}

// Wrap puts the front that all of a server's requests go through before next,
// the handlers of its paths. It answers /healthz and /readyz by itself, to
// everybody; for every other request it
//
//   - ends it when it stands still, and answers 500 when a handler panics,
//   - gives it an ID, which it answers as X-Request-Id and
//     X-Ms-Correlation-Request-Id: the one that the client sent, its trace's,
//     or a new one,
//   - authenticates the caller (CallerOf, oci.ActorOf), unless it goes to
//     /oauth2/, where that is the question itself. Credentials that are wrong
//     are not refused here but by Authorize, which knows what to ask for,
//   - refuses a caller who asks too often,
//   - writes a line of the access log, counts it, and records a span. Handlers
//     say what it was about by Report, and what went wrong by WriteError.
//
// The ResponseWriter that handlers get can be unwrapped by
// http.ResponseController, and sends files by sendfile(2).
func Wrap(next http.Handler, opts FrontOptions) http.Handler {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.IdleTimeout == 0 {
		opts.IdleTimeout = time.Minute
	}
	proxied := opts.ClientAddress != nil
	if !proxied {
		opts.ClientAddress = connectionAddress
	}
	f := &front{next: next, opts: opts, proxied: proxied, limits: newLimiters(opts.Limits, opts.ClientAddress)}
	if opts.Traces != nil {
		f.tracer = opts.Traces.Tracer("sluice/internal/registry")
	}
	return f
}

// kindOAuth2 is the kind of requests to the token server, which answers wrong
// passwords by itself.
const kindOAuth2 = "oauth2"

type front struct {
	next    http.Handler
	opts    FrontOptions
	proxied bool // ClientAddress knows more than the connection
	limits  limiters
	tracer  trace.Tracer // nil: none
}

// ServeHTTP implements http.Handler.
func (f *front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := newConversation(w, r, f.opts.IdleTimeout)
	probe := r.URL.Path == "/healthz" || r.URL.Path == "/readyz"
	signIn := strings.HasPrefix(r.URL.Path, "/oauth2/")
	switch { // what answers these doesn't Report
	case probe:
		c.kind = "probe"
	case signIn:
		c.kind = kindOAuth2
	}
	ctx := f.identify(c, r)
	ctx, span := f.startSpan(ctx, c, r)
	if !probe && !signIn && f.opts.Authorizer != nil {
		c.caller, c.authErr = f.opts.Authorizer.Authenticate(r)
		if c.authErr != nil {
			f.opts.Metrics.authFailed()
		}
	}
	ctx = context.WithValue(ctx, conversationKey{}, c)
	r = r.WithContext(oci.WithActor(ctx, oci.Actor{
		Name: c.caller.Name, Remote: f.remote(r), Agent: clip(r.UserAgent()), RequestID: c.id,
	}))
	c.request = r
	f.opts.Metrics.begin()
	defer func() {
		if p := recover(); p != nil {
			f.panicked(c, p)
		}
		c.writing() // what is still buffered
		took := time.Since(c.began)
		f.opts.Metrics.end(c, took)
		endSpan(span, c)
		f.log(c, took, probe)
		if c.broken {
			panic(http.ErrAbortHandler) // the server's way to break a response off
		}
	}()
	if probe {
		f.probe(c, r)
	} else if err := f.admit(c); err != nil {
		c.fail(err)
	} else {
		f.next.ServeHTTP(c, r)
	}
}

// panicked records what a handler panicked with.
func (f *front) panicked(c *conversation, p any) {
	if p == http.ErrAbortHandler {
		c.err, c.broken = errors.New("the handler broke the response off"), true
		return
	}
	f.opts.Log.Error("panic", "method", c.request.Method, "path", clip(c.request.URL.Path), "id", c.id,
		"panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	c.fail(fmt.Errorf("panic: %v", p))
}

// admit refuses callers who ask too often.
func (f *front) admit(c *conversation) error {
	var attempts *auth.LimitError
	if errors.As(c.authErr, &attempts) {
		f.opts.Metrics.limitedBy("authentication")
		return tooManyRequests("attempts to sign in", attempts.RetryAfter)
	}
	limit, wait := f.limits.take(c.request, c.caller, time.Now())
	if wait <= 0 {
		return nil
	}
	f.opts.Metrics.limitedBy(limit)
	return tooManyRequests(limit, wait)
}

// probe answers those who ask every few seconds whether the process lives, and
// whether it can serve.
func (f *front) probe(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/healthz" {
		writeBody(w, r, http.StatusOK, "text/plain; charset=utf-8", []byte("ok\n"))
		return
	}
	if f.opts.Ready != nil {
		if err := f.opts.Ready(r.Context()); err != nil {
			f.opts.Log.Error("not ready", "error", err)
			writeBody(w, r, http.StatusServiceUnavailable, "text/plain; charset=utf-8", []byte("not ready: see the registry's log\n"))
			return
		}
	}
	writeBody(w, r, http.StatusOK, "text/plain; charset=utf-8", []byte("ready\n"))
}

// log writes the access log's line. Queries and headers stay out of it, there
// may be secrets in them.
func (f *front) log(c *conversation, took time.Duration, probe bool) {
	r := c.request
	level := slog.LevelInfo
	if c.err == nil && probe {
		level = slog.LevelDebug // somebody asks every few seconds
	}
	var known *oci.Error
	if c.err != nil && !errors.As(c.err, &known) && c.status != statusClientGone {
		level = slog.LevelError
	}
	if !f.opts.Log.Enabled(r.Context(), level) {
		return
	}
	all := [16]slog.Attr{
		slog.String("method", r.Method),
		slog.String("path", clip(r.URL.Path)),
		slog.Int("status", c.status),
		slog.Int64("in", c.received),
		slog.Int64("out", c.sent),
		slog.Duration("took", took),
		slog.String("remote", f.remote(r)),
		slog.String("agent", clip(r.UserAgent())),
		slog.String("id", c.id),
	}
	attrs := all[:9]
	for _, a := range []slog.Attr{
		slog.String("identity", c.caller.Name), slog.String("repository", c.repository), slog.String("trace", c.trace),
	} {
		if a.Value.String() != "" {
			attrs = append(attrs, a)
		}
	}
	if c.err != nil {
		attrs = append(attrs, slog.String("error", c.err.Error()))
	}
	f.opts.Log.LogAttrs(r.Context(), level, "request", attrs...)
}

// remote returns where a request comes from, for records.
func (f *front) remote(r *http.Request) string {
	if f.proxied {
		return f.opts.ClientAddress(r)
	}
	return r.RemoteAddr
}

// clip bounds what a client can make us log.
func clip(s string) string { return s[:min(len(s), 500)] }

func connectionAddress(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// ForwardedAddress returns the address that the proxy in front of the registry
// says a request comes from: the last of X-Forwarded-For, which the proxy added
// itself. It is for servers that only the proxy can reach.
func ForwardedAddress(r *http.Request) string {
	all := r.Header.Values("X-Forwarded-For")
	if len(all) == 0 {
		return connectionAddress(r)
	}
	last := all[len(all)-1]
	last = strings.TrimSpace(last[strings.LastIndexByte(last, ',')+1:])
	if net.ParseIP(last) == nil {
		return connectionAddress(r)
	}
	return last
}
