package main

import (
	"context"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
)

// newTraces returns what sends spans to an OTLP endpoint, which needn't be there
// yet. A request whose caller is traced is traced; of the others all are.
func newTraces(ctx context.Context, endpoint string) (*trace.TracerProvider, error) {
	if !strings.Contains(strings.TrimPrefix(strings.TrimPrefix(endpoint, "https://"), "http://"), "/") {
		endpoint += "/v1/traces" // the protocol's own path
	}
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(endpoint))
	if err != nil {
		return nil, err
	}
	service := resource.NewSchemaless(attribute.String("service.name", "sluice-registry"), attribute.String("service.version", version()))
	return trace.NewTracerProvider(trace.WithBatcher(exporter), trace.WithResource(service)), nil
}
