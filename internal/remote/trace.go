package remote

import (
	"io"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// tracedTransport gives each request of a caller who is traced a span: also
// those for tokens, and those to where a registry redirects. The span ends with
// the answer's body. It costs others nothing.
type tracedTransport struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (t *tracedTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	caller := trace.SpanFromContext(req.Context())
	if !caller.SpanContext().IsSampled() {
		return t.RoundTripper.RoundTrip(req)
	}
	tracer := caller.TracerProvider().Tracer("sluice/internal/remote")
	// Without the query, which is where signed URLs have their secrets.
	ctx, span := tracer.Start(req.Context(), req.Method+" "+kindOf(req.URL.Path), trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(
		attribute.String("http.request.method", req.Method),
		attribute.String("server.address", req.URL.Host),
		attribute.String("url.path", req.URL.Path),
	))
	if r := req.Header.Get("Range"); r != "" {
		span.SetAttributes(attribute.String("http.request.header.range", r))
	}
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(c httptrace.GotConnInfo) {
			span.SetAttributes(attribute.Bool("sluice.connection.new", !c.Reused))
		},
		GotFirstResponseByte: func() { span.AddEvent("first byte") },
	})
	resp, err := t.RoundTripper.RoundTrip(req.WithContext(ctx))
	if err != nil {
		span.SetStatus(codes.Error, redact(err).Error())
		span.End()
		return nil, err
	}
	span.SetAttributes(attribute.Int("http.response.status_code", resp.StatusCode))
	if resp.StatusCode >= http.StatusBadRequest {
		span.SetStatus(codes.Error, resp.Status)
	}
	resp.Body = &tracedBody{ReadCloser: resp.Body, span: span}
	return resp, nil
}

// kindOf says in a word what a request is for.
func kindOf(path string) string {
	for _, kind := range []string{"referrers", "manifests", "blobs", "tags", "token"} {
		if strings.Contains(path, "/"+kind+"/") || strings.HasSuffix(path, "/"+kind) {
			return kind
		}
	}
	return "other"
}

// tracedBody ends its request's span when it ends.
type tracedBody struct {
	io.ReadCloser
	span  trace.Span
	bytes atomic.Int64
	once  sync.Once
}

func (b *tracedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.bytes.Add(int64(n))
	if err != nil {
		if err != io.EOF {
			b.span.SetStatus(codes.Error, err.Error())
		}
		b.end()
	}
	return n, err
}

func (b *tracedBody) Close() error {
	err := b.ReadCloser.Close()
	b.end()
	return err
}

func (b *tracedBody) end() {
	b.once.Do(func() {
		b.span.SetAttributes(attribute.Int64("http.response.body.size", b.bytes.Load()))
		b.span.End()
	})
}
