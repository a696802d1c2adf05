package main

import (
	"context"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"

	"sluice/cmd/internal/program"
)

// newTraces returns what makes a service's spans. They go to an OTLP endpoint,
// which needn't be there yet, or nowhere if that's empty, and to also. What a
// caller does who is traced is traced; of the rest all is.
func newTraces(ctx context.Context, service, endpoint string, also ...trace.SpanProcessor) (*trace.TracerProvider, error) {
	opts := []trace.TracerProviderOption{trace.WithResource(resource.NewSchemaless(
		attribute.String("service.name", service), attribute.String("service.version", program.Version())))}
	for _, p := range also {
		opts = append(opts, trace.WithSpanProcessor(p))
	}
	if endpoint == "" {
		return trace.NewTracerProvider(opts...), nil
	}
	if !strings.Contains(strings.TrimPrefix(strings.TrimPrefix(endpoint, "https://"), "http://"), "/") {
		endpoint += "/v1/traces" // the protocol's own path
	}
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(endpoint))
	if err != nil {
		return nil, err
	}
	return trace.NewTracerProvider(append(opts, trace.WithBatcher(exporter))...), nil
}
