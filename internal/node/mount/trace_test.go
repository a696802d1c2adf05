package mount_test

import (
	"testing"

	sdk "go.opentelemetry.io/otel/sdk/trace"

	"sluice/internal/node/mount"
	"sluice/internal/node/timeline"
)

// A pull's trace has every step of it, also those that go on when it's over.
func TestPullIsTraced(t *testing.T) {
	n, manifest := prepared(t)
	var r timeline.Recorder
	tracer := sdk.NewTracerProvider(sdk.WithSpanProcessor(&r)).Tracer("test")
	n.opts.Tracer = tracer
	n.start()
	_, dir := n.pulled(manifest, "")
	checkImage(t, dir)
	var byName map[string]timeline.Span
	eventually(t, "the boot pack is there", func() bool {
		byName = make(map[string]timeline.Span)
		for _, s := range r.Last(testRef) {
			byName[s.Name] = s
		}
		s, ok := byName["boot pack"]
		return ok && !s.End.IsZero()
	})
	for _, name := range []string{"pull", "find artifact", "metadata", "chunk table", "unpack metadata", "store", "mount", "boot pack", "reads", "first byte"} {
		s, ok := byName[name]
		if !ok || s.Error != "" || s.End.IsZero() && name != "reads" {
			t.Errorf("%s: %+v", name, s)
		}
	}

	// Somebody else's trace has the steps that are left.
	ctx, span := tracer.Start(t.Context(), "other")
	if _, _, err := n.m.PullChecked(ctx, testRef); err != nil {
		t.Fatal(err)
	}
	span.End()
	names := make(map[string]bool)
	for _, s := range r.Trace(span.SpanContext().TraceID().String()) {
		names[s.Name] = true
	}
	if !names["resolve"] || !names["config"] || !names["reads"] || names["metadata"] || names["pull"] {
		t.Errorf("steps of an image that is here: %v", names)
	}
}

func TestFailedPullIsTraced(t *testing.T) {
	n, manifest := prepared(t)
	var r timeline.Recorder
	n.opts.Tracer = sdk.NewTracerProvider(sdk.WithSpanProcessor(&r)).Tracer("test")
	n.start()
	n.reg.denied.Store(true)
	if _, err := n.m.Pull(t.Context(), testRef, manifest); mount.ReasonOf(err) != mount.Unauthorized {
		t.Fatal(err)
	}
	if s := r.Last(testRef); len(s) != 2 || s[0].Error == "" || s[1].Error == "" {
		t.Errorf("spans are %+v", s)
	}
}
