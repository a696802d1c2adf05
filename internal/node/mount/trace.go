package mount

import (
	"context"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"sluice/internal/node/plane"
	"sluice/internal/node/timeline"
)

// step begins a step of a start that is traced, which end ends; of one that
// isn't, nothing.
func (m *Manager) step(ctx context.Context, name string) (context.Context, trace.Span) {
	if !sampled(ctx) {
		return ctx, trace.SpanFromContext(context.Background()) // that does nothing
	}
	return m.opts.Tracer.Start(ctx, name)
}

func end(span trace.Span, err error) {
	if err != nil {
		span.SetStatus(codes.Error, err.Error())
	}
	span.End()
}

// try is again, as a step.
func try[T any](ctx context.Context, m *Manager, name string, get func(context.Context) (T, error)) (T, error) {
	ctx, span := m.step(ctx, name)
	v, err := again(ctx, get)
	end(span, err)
	return v, err
}

// follow returns background, a context of this Manager's, with the trace to
// which ctx belongs.
func follow(background, ctx context.Context) context.Context {
	return trace.ContextWithSpan(background, trace.SpanFromContext(ctx))
}

// How long and how many reads of an image's content are part of the trace of
// its start, and from what on a read has waited.
const (
	watchTime  = 15 * time.Second
	watchReads = 64
	watchWait  = time.Millisecond
)

// watch lets reads of an image's content be part of a trace for a while: the
// first one, and those that wait.
type watch struct {
	tracer trace.Tracer
	span   trace.Span // whose part they are
	reads  atomic.Int32
	last   atomic.Int64 // when the last of them ended, as Unix time in nanoseconds
}

// watchReads makes the reads that follow part of the trace to which ctx belongs,
// the start of an image by the name ref.
func (m *Manager) watchReads(ctx context.Context, img *image, ref string) {
	if !sampled(ctx) {
		return
	}
	_, span := m.opts.Tracer.Start(ctx, "reads", imageAttribute(ref))
	w := &watch{tracer: m.opts.Tracer, span: span}
	w.last.Store(time.Now().UnixNano())
	img.watch.Store(w)
	time.AfterFunc(watchTime, func() {
		img.watch.CompareAndSwap(w, nil)
		span.End(trace.WithTimestamp(time.Unix(0, w.last.Load())))
	})
}

func sampled(ctx context.Context) bool { return trace.SpanContextFromContext(ctx).IsSampled() }

// content is a layer's, for the plane. While nobody watches, it costs one
// atomic load more than the layer itself.
type content struct {
	plane.Content
	img *image
}

// ReadAt implements plane.Content.
func (c content) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if w := c.img.watch.Load(); w != nil && w.reads.Load() < watchReads {
		return w.readAt(ctx, c.Content, p, off)
	}
	return c.Content.ReadAt(ctx, p, off)
}

// readAt is a read that may become part of the trace.
func (w *watch) readAt(ctx context.Context, c plane.Content, p []byte, off int64) (int, error) {
	began := time.Now()
	ctx = trace.ContextWithSpan(ctx, w.span)
	n, err := c.ReadAt(ctx, p, off)
	now := time.Now()
	w.last.Store(now.UnixNano())
	name := "read that waits"
	if w.reads.CompareAndSwap(0, 1) {
		name = "first byte"
	} else if err == nil && now.Sub(began) < watchWait {
		return n, err
	} else {
		w.reads.Add(1)
	}
	_, span := w.tracer.Start(ctx, name, trace.WithTimestamp(began), trace.WithAttributes(
		attribute.Int64("sluice.offset", off), attribute.Int("sluice.length", len(p))))
	end(span, err)
	return n, err
}

// imageAttribute is what a trace is found by.
func imageAttribute(ref string) trace.SpanStartEventOption {
	return trace.WithAttributes(attribute.String(timeline.Image, ref))
}
