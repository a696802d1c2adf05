package mount

import (
	"context"
	"testing"

	sdk "go.opentelemetry.io/otel/sdk/trace"

	"sluice/internal/node/timeline"
)

// zeros is content that is all there.
type zeros struct{}

func (zeros) ReadAt(_ context.Context, p []byte, _ int64) (int, error) { return len(p), nil }

// Traces cost reads nothing once the start is over, whether it was traced or not.
func TestReadsAreTracedAtNoCost(t *testing.T) {
	var r timeline.Recorder
	m := &Manager{opts: Options{Tracer: sdk.NewTracerProvider(sdk.WithSpanProcessor(&r)).Tracer("test")}}
	img := &image{}
	c := content{zeros{}, img}
	p := make([]byte, 4096)
	read := func() {
		if _, err := c.ReadAt(t.Context(), p, 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := testing.AllocsPerRun(100, read); n != 0 {
		t.Errorf("nobody watches, and a read allocates %v times", n)
	}
	ctx, span := m.opts.Tracer.Start(t.Context(), "pull", imageAttribute("host/app:1"))
	m.watchReads(ctx, img, "host/app:1")
	read()
	read()
	span.End()
	spans := r.Last("host/app:1")
	if len(spans) != 3 || spans[1].Name != "reads" || spans[2].Name != "first byte" || spans[2].Parent != spans[1].ID {
		t.Errorf("spans are %+v", spans)
	}
	w := img.watch.Load()
	w.reads.Store(watchReads)
	if n := testing.AllocsPerRun(100, read); n != 0 {
		t.Errorf("the trace has enough, and a read allocates %v times", n)
	}
}

func BenchmarkUnwatchedRead(b *testing.B) {
	c := content{zeros{}, &image{}}
	p := make([]byte, 4096)
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		_, _ = c.ReadAt(ctx, p, 0)
	}
}
