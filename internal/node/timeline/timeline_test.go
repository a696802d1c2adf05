package timeline_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"sluice/internal/node/timeline"
)

func TestRecorder(t *testing.T) {
	var r timeline.Recorder
	tracer := sdk.NewTracerProvider(sdk.WithSpanProcessor(&r)).Tracer("test")
	begin := func(image string) (id string, end func()) {
		ctx, span := tracer.Start(t.Context(), "pull", trace.WithAttributes(attribute.String(timeline.Image, image)))
		_, step := tracer.Start(ctx, "step")
		step.SetStatus(codes.Error, strings.Repeat("why ", 1000))
		step.End()
		return span.SpanContext().TraceID().String(), func() { span.End() }
	}
	old, end := begin("host/app:1")
	end()
	id, end := begin("host/app:1")
	spans := r.Last("host/app:1")
	if len(spans) != 2 || spans[0].Trace != id || !spans[0].End.IsZero() || spans[1].End.IsZero() || spans[1].Parent != spans[0].ID {
		t.Errorf("while it runs: %+v", spans)
	}
	if n := len(spans[1].Error); n == 0 || n > 500 {
		t.Errorf("an error of %d bytes", n)
	}
	end()
	if spans = r.Trace(id); len(spans) != 2 || spans[0].End.IsZero() || spans[0].Attributes[timeline.Image] != "host/app:1" {
		t.Errorf("when it's over: %+v", spans)
	}
	if r.Last("host/other:1") != nil || r.Trace("") != nil {
		t.Error("what was never there is found")
	}
	for i := range 100 {
		_, end := begin(fmt.Sprintf("host/many:%d", i))
		end()
	}
	if r.Trace(old) != nil || r.Last("host/app:1") != nil || len(r.Last("host/many:99")) != 2 {
		t.Error("old ones aren't forgotten, or new ones are")
	}
	ctx, root := tracer.Start(t.Context(), "big", trace.WithAttributes(attribute.String(timeline.Image, "big")))
	for range 1000 {
		_, s := tracer.Start(ctx, "read")
		s.End()
	}
	root.End()
	if n := len(r.Last("big")); n == 0 || n > 200 {
		t.Errorf("a trace of %d spans", n)
	}
}

func TestDraw(t *testing.T) {
	at := func(ms int) time.Time { return time.Unix(1000, 0).Add(time.Duration(ms) * time.Millisecond) }
	get := map[string]any{timeline.Request: "GET", timeline.Bytes: int64(2_000_000)}
	spans := []timeline.Span{
		{ID: "3", Parent: "2", Name: "metadata", Start: at(25), End: at(50)},
		{ID: "1", Name: "start", Start: at(0), End: at(100)},
		{ID: "2", Parent: "1", Name: "pull", Start: at(10), End: at(75), Error: "the registry\nsays no"},
		{ID: "4", Parent: "3", Name: "GET blobs", Start: at(25), End: at(50), Attributes: get},
		{ID: "5", Parent: "1", Name: "first output", Start: at(80)},
		{ID: "6", Parent: "unknown", Name: "blink", Start: at(99), End: at(99)},
	}
	var b strings.Builder
	if err := timeline.Draw(&b, spans, timeline.DrawOptions{Width: 94}); err != nil {
		t.Fatal(err)
	}
	want := `
STEP            START ms  TOOK ms  REQ     BYTES  |0         |25        |50        |75
start                0.0    100.0    1    2.0 MB  ████████████████████████████████████████████
  pull              10.0     65.0    1    2.0 MB      █████████████████████████████
    ! the registry
    metadata        25.0     25.0    1    2.0 MB             ███████████
  first output      80.0      ...                                                    █████████
blink               99.0      0.0                                                            ▏
`
	if got := "\n" + b.String(); got != want {
		t.Errorf("got%s\nwant%s", got, want)
	}
	b.Reset()
	if err := timeline.Draw(&b, spans, timeline.DrawOptions{Requests: true}); err != nil || !strings.Contains(b.String(), "      GET blobs") {
		t.Errorf("with requests, %v:\n%s", err, b.String())
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("full") }

// What a daemon answers may be anything.
func TestDrawStrangeTraces(t *testing.T) {
	now := time.Now()
	for name, spans := range map[string][]timeline.Span{
		"none":     nil,
		"circle":   {{ID: "1", Parent: "2", Name: "a", Start: now}, {ID: "2", Parent: "1", Name: "b", Start: now}, {ID: "3", Name: "c"}},
		"itself":   {{ID: "1", Parent: "1", Name: "a"}},
		"same":     {{ID: "1", Name: "a"}, {ID: "1", Parent: "1", Name: "b"}},
		"no names": {{}, {}},
		"backward": {{ID: "1", Name: "a", Start: now, End: now.Add(-time.Hour)}},
		"deep":     {{ID: "1", Name: strings.Repeat("長", 100), Start: now, End: now.AddDate(100, 0, 0)}},
	} {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			if err := timeline.Draw(&b, spans, timeline.DrawOptions{Width: 1}); err != nil {
				t.Error(err)
			}
			if err := timeline.Draw(full{}, spans, timeline.DrawOptions{}); len(spans) > 0 && err == nil {
				t.Error("nobody is told that it couldn't be written")
			}
		})
	}
}
