// Package timeline keeps what the last starts of images consisted of, and draws
// it: which step took how long, what ran side by side, which request a step
// waited for.
//
// The steps are OpenTelemetry spans. Who starts an image (package mount, a
// registry's client, `sluice node trace`) makes them through that API and knows
// nothing of this package; Recorder is a span processor of the SDK, beside one
// that exports them, if there is one. It has the last traces in memory, a bounded
// number of spans of each, and answers by image or by trace. Draw makes a
// picture of a trace for a terminal.
package timeline

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/codes"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// Names of attributes that mean something here. The last two are
// OpenTelemetry's.
const (
	// Image is an image's reference, in the span that a trace is found by.
	Image = "sluice.image"
	// Request marks the span of one HTTP request.
	Request = "http.request.method"
	// Bytes is how many bytes of body came in it.
	Bytes = "http.response.body.size"
)

// Span is one step.
type Span struct {
	Trace      string         `json:"trace"`
	ID         string         `json:"id"`
	Parent     string         `json:"parent,omitempty"`
	Name       string         `json:"name"`
	Start      time.Time      `json:"start"`
	End        time.Time      `json:"end,omitzero"` // zero: it hasn't ended
	Attributes map[string]any `json:"attributes,omitempty"`
	Error      string         `json:"error,omitempty"`
}

// Bounds of what is remembered: some 2 MB at most.
const (
	maxTraces = 24
	maxSpans  = 200 // of a trace
	maxError  = 500 // bytes of what an error says
)

// Recorder remembers the spans of the last traces. Its zero value is ready; it
// may be used concurrently.
type Recorder struct {
	mu     sync.Mutex
	traces []*record // oldest first
}

// record is a trace.
type record struct {
	id    trace.TraceID
	spans []Span // in the order of their start
}

var _ sdk.SpanProcessor = (*Recorder)(nil)

// OnStart implements sdk.SpanProcessor.
func (r *Recorder) OnStart(_ context.Context, s sdk.ReadWriteSpan) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := s.SpanContext().TraceID()
	t := r.find(id)
	if t == nil {
		t = &record{id: id}
		if r.traces = append(r.traces, t); len(r.traces) > maxTraces {
			r.traces = slices.Delete(r.traces, 0, 1)
		}
	}
	if len(t.spans) < maxSpans {
		t.spans = append(t.spans, spanOf(s))
	}
}

// OnEnd implements sdk.SpanProcessor.
func (r *Recorder) OnEnd(s sdk.ReadOnlySpan) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.find(s.SpanContext().TraceID())
	if t == nil {
		return // so many others began meanwhile
	}
	ended := spanOf(s)
	if i := slices.IndexFunc(t.spans, func(o Span) bool { return o.ID == ended.ID }); i >= 0 {
		t.spans[i] = ended
	}
}

// Shutdown implements sdk.SpanProcessor.
func (*Recorder) Shutdown(context.Context) error { return nil }

// ForceFlush implements sdk.SpanProcessor.
func (*Recorder) ForceFlush(context.Context) error { return nil }

// find returns a trace that is remembered, or nil. mu is held.
func (r *Recorder) find(id trace.TraceID) *record {
	for _, t := range slices.Backward(r.traces) {
		if t.id == id {
			return t
		}
	}
	return nil
}

// Trace returns the spans of a trace, named by its ID in hexadecimal, in the
// order of their start: none if it isn't remembered.
func (r *Recorder) Trace(id string) []Span {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.traces {
		if t.id.String() == id {
			return slices.Clone(t.spans)
		}
	}
	return nil
}

// Last returns the spans of an image's last trace, likewise.
func (r *Recorder) Last(image string) []Span {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range slices.Backward(r.traces) {
		if slices.ContainsFunc(t.spans, func(s Span) bool { return s.Attributes[Image] == image }) {
			return slices.Clone(t.spans)
		}
	}
	return nil
}

func spanOf(s sdk.ReadOnlySpan) Span {
	span := Span{
		Trace: s.SpanContext().TraceID().String(), ID: s.SpanContext().SpanID().String(),
		Name: s.Name(), Start: s.StartTime(), End: s.EndTime(),
	}
	if p := s.Parent(); p.HasSpanID() {
		span.Parent = p.SpanID().String()
	}
	if status := s.Status(); status.Code == codes.Error {
		span.Error = strings.ToValidUTF8(status.Description[:min(len(status.Description), maxError)], "")
	}
	if attributes := s.Attributes(); len(attributes) > 0 {
		span.Attributes = make(map[string]any, len(attributes))
		for _, a := range attributes {
			span.Attributes[string(a.Key)] = a.Value.AsInterface()
		}
	}
	return span
}
