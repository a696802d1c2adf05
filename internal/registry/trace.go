package registry

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// identify gives a request its ID and returns its context, with the client's
// span if the request has a traceparent (W3C Trace Context).
func (f *front) identify(c *conversation, r *http.Request) context.Context {
	ctx := r.Context()
	if r.Header.Get("Traceparent") != "" {
		ctx = propagation.TraceContext{}.Extract(ctx, propagation.HeaderCarrier(r.Header))
		if sc := trace.SpanContextFromContext(ctx); sc.IsValid() {
			c.trace = sc.TraceID().String()
		}
	}
	switch id := r.Header.Get("X-Request-Id"); {
	case isRequestID(id):
		c.id = id
	case c.trace != "":
		c.id = c.trace
	default:
		c.id = fmt.Sprintf("%016x%016x", rand.Uint64(), rand.Uint64()) // unique, not secret
	}
	value := []string{c.id}
	c.Header()["X-Request-Id"] = value
	c.Header()["X-Ms-Correlation-Request-Id"] = value
	return ctx
}

// isRequestID reports whether what a client sent can stand in logs and headers.
func isRequestID(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return false
		}
	}
	return s != "" && len(s) <= 128
}

// startSpan begins the request's span. Without traces it is nil.
func (f *front) startSpan(ctx context.Context, c *conversation, r *http.Request) (context.Context, trace.Span) {
	if f.tracer == nil {
		return ctx, nil
	}
	ctx, span := f.tracer.Start(ctx, r.Method, trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(
		attribute.String("http.request.method", r.Method),
		attribute.String("url.path", clip(r.URL.Path)),
		attribute.String("http.request.id", c.id),
	))
	if sc := span.SpanContext(); sc.IsValid() {
		c.trace = sc.TraceID().String()
	}
	return ctx, span
}

func endSpan(span trace.Span, c *conversation) {
	if span == nil {
		return
	}
	if c.kind != "" {
		span.SetName(c.kind)
	}
	span.SetAttributes(
		attribute.String("sluice.kind", c.kind),
		attribute.String("sluice.repository", c.repository),
		attribute.Int("http.response.status_code", c.status),
		attribute.Int64("http.request.body.size", c.received),
		attribute.Int64("http.response.body.size", c.sent),
	)
	if c.status >= http.StatusInternalServerError || c.broken {
		span.SetStatus(codes.Error, http.StatusText(c.status))
	}
	span.End()
}
