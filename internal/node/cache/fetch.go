package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"go.opentelemetry.io/otel/trace"

	"sluice/internal/artifact"
	"sluice/internal/blob"
)

const (
	// maxWindow is how many bytes of one ReadAt are looked after at a time.
	maxWindow = 4 << 20

	// maxRounds is how often a ReadAt looks again when content that others
	// were fetching didn't come, or vanished from the disk.
	maxRounds = 4
)

// want is a chunk that somebody needs.
type want struct {
	chunk   int
	origin  Origin // why it's fetched, if it is
	ch      artifact.Chunk
	flight  *flight // nil: present
	started bool    // the flight is ours to end
	late    bool    // no Delivery is waited for any more
}

// fault is ReadAt when something is missing, or might be.
func (l *Layer) fault(ctx context.Context, p []byte, off int64) (int, error) {
	patience := l.cache.opts.FaultTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%w (%v)", ErrTimeout, patience))
	defer cancel()
	began, waited := time.Now(), false
	n := 0
	var err error
	for n < len(p) && err == nil {
		var m int
		m, err = l.window(ctx, p[n:], off+int64(n), &waited)
		n += m
	}
	if waited {
		l.cache.stats.faults.Add(1)
		l.meter.waited(time.Since(began))
	}
	if err != nil {
		l.meter.failures.Add(1)
		return n, fmt.Errorf("layer %s: reading %d bytes at %d: %w", l.dev.Key, len(p), off, err)
	}
	return n, nil
}

// window reads some bytes that p begins with, at least one. waited is set if
// that takes waiting.
func (l *Layer) window(ctx context.Context, p []byte, off int64, waited *bool) (int, error) {
	c := l.content
	if bad := c.bad.Load(); bad != nil {
		return 0, bad
	}
	if off >= c.length {
		clear(p)
		return len(p), nil
	}
	p = p[:min(int64(len(p)), maxWindow, c.length-off)]
	wants, err := l.cover(ctx, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	for range maxRounds {
		var again bool
		if again, err = l.gather(ctx, wants, p, off, waited); !again {
			break
		}
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// cover returns the chunks that have the n bytes at off.
func (l *Layer) cover(ctx context.Context, off, n int64) ([]want, error) {
	first, err := l.dev.Find(ctx, off)
	if err != nil {
		return nil, err
	}
	var wants []want
	for i := first; ; i++ {
		ch, err := l.dev.Chunk(ctx, i)
		if err != nil {
			return nil, err
		}
		wants = append(wants, want{chunk: i, ch: ch})
		if ch.Offset+int64(ch.Length) >= off+n {
			return wants, nil
		}
	}
}

// gather fills p with the wanted chunks, starting fetches for what is
// missing. again asks the caller to try once more, should it have a turn left:
// what failed wasn't this call's doing.
func (l *Layer) gather(ctx context.Context, wants []want, p []byte, off int64, waited *bool) (again bool, _ error) {
	c := l.content
	for _, w := range wants {
		c.check(w.chunk, w.ch)
	}
	if l.enlist(ctx, wants) {
		*waited = true
	}
	var failed error
	for k := range wants {
		w := &wants[k]
		piece, from := overlap(p, off, w.ch)
		switch {
		case w.flight == nil:
			err := c.read(piece, w.ch.Offset+from)
			if err == nil {
				continue
			}
			if bad := c.bad.Load(); bad != nil {
				again, failed = false, bad
				continue
			}
			c.distrust(w.chunk, err) // each at once: there may be more than rounds
			if failed == nil {
				again, failed = true, err
			}
		case failed != nil:
			c.leave(w.flight)
		default:
			buf, err := c.wait(ctx, w.flight)
			switch {
			case buf != nil:
				copy(piece, buf.b[from:])
				buf.release()
			case err != nil:
				// Another call's fetch went through another source, or for
				// another context: this one may have more luck.
				if errors.Is(err, errUndelivered) {
					late(wants) // all: what lets down again and again would use up the rounds
				}
				again, failed = !w.started && ctx.Err() == nil, err
			default: // it is in the data file now
				again, failed = true, fmt.Errorf("chunk %d went away before it could be read", w.chunk)
			}
		}
	}
	return again, failed
}

// late has the wanted chunks fetched, whoever may be about to deliver them.
func late(wants []want) {
	for k := range wants {
		wants[k].late = true
	}
}

// overlap returns the part of p, which is to be read from off on, that chunk
// ch has, and where in the chunk it begins.
func overlap(p []byte, off int64, ch artifact.Chunk) (piece []byte, from int64) {
	begin := max(off, ch.Offset)
	end := min(off+int64(len(p)), ch.Offset+int64(ch.Length))
	return p[begin-off : end-off], begin - ch.Offset
}

// enlist gives each want that isn't present a flight, and starts fetches for
// those that had none and that no Delivery will bring: one for each run of
// adjacent chunks, and for what will probably be wanted behind it. It reports
// whether anything has to be waited for.
func (l *Layer) enlist(ctx context.Context, wants []want) bool {
	c := l.content
	waiting := false
	var runs [][]want
	c.mu.Lock()
	for k := range wants {
		w := &wants[k]
		l.board(w)
		waiting = waiting || w.flight != nil && !w.flight.landed
		if !w.started {
			continue
		}
		if n := len(runs); n > 0 && l.fits(runs[n-1], *w) {
			runs[n-1] = append(runs[n-1], *w)
		} else {
			runs = append(runs, []want{*w})
		}
	}
	for k := range runs {
		runs[k] = l.extend(runs[k])
	}
	c.mu.Unlock()
	for _, run := range runs {
		l.startFetch(ctx, run, func(bool) {})
	}
	for k := range wants {
		if c.chunks[wants[k].chunk].Load()&mark != 0 {
			l.noteRead(ctx, wants[k].chunk)
		}
	}
	if len(runs) > 0 {
		l.lookAhead(ctx)
	}
	return waiting
}

// board gives a want its flight. started says that it's for the caller to
// fetch. content.mu is held.
func (l *Layer) board(w *want) {
	c := l.content
	w.flight, w.started = c.join(w.chunk)
	f := w.flight
	if w.started {
		c.ahead.read(c, w.chunk, w.ch)
	}
	switch {
	case w.started && !w.late && c.awaited(w.chunk):
		f.awaited, w.started = true, false
	case f != nil && !f.landed && f.awaited && (w.late || !c.awaited(w.chunk)):
		f.awaited, w.started = false, true // the delivery's no more
	}
}

// fits reports whether w continues run within the bound of one request.
func (l *Layer) fits(run []want, w want) bool {
	first, last := run[0].ch, run[len(run)-1]
	return w.chunk == last.chunk+1 &&
		w.ch.BlobOffset+int64(w.ch.BlobLength)-first.BlobOffset <= l.cache.opts.MaxRequest
}

// startFetch fetches a run of chunks in a goroutine of the layer's, which
// calls done at its end, with whether all came. It returns false if the layer
// has been released. The context's end doesn't end it; FaultTimeout,
// Release and Close do.
func (l *Layer) startFetch(ctx context.Context, run []want, done func(ok bool)) bool {
	patience := l.cache.opts.FaultTimeout
	// The reader's context may not be used after the read, by no look at its
	// values either. All that is the fetch's of it is the trace.
	ctx = trace.ContextWithSpan(context.Background(), trace.SpanFromContext(ctx))
	ctx, end, err := l.begin(ctx)
	if err != nil {
		l.abort(run, err)
		done(false)
		return false
	}
	l.cache.traffic.enter()
	go func() {
		defer end()
		ok := false
		defer func() { done(ok) }()
		defer l.cache.traffic.leave()
		ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%w (%v)", ErrTimeout, patience))
		defer cancel()
		ok = l.fetch(ctx, run)
	}()
	return true
}

func (l *Layer) abort(run []want, err error) {
	c := l.content
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, w := range run {
		if w.flight.landed {
			continue
		}
		if w.origin == ReadAhead && c.unmark(w.chunk)&guessed != 0 {
			c.ahead.unused -= int64(w.ch.BlobLength)
		}
		c.end(w.flight, nil, err)
		c.forget(w.flight)
	}
}

// fetch gets a run of chunks, each of which has a flight, and ends all of the
// flights. It reports whether all came.
func (l *Layer) fetch(ctx context.Context, run []want) bool {
	bad, err := l.stream(ctx, l.src, run, func() error { return nil })
	for _, w := range bad {
		l.abort([]want{w}, l.damaged(w))
	}
	if err != nil {
		l.abort(run, err)
		l.cache.log.Debug("fetch failed", "layer", l.dev.Key, "chunk", run[0].chunk, "chunks", len(run), "error", err)
	}
	return err == nil && len(bad) == 0
}

// damaged is the error of a chunk that arrived damaged twice.
func (l *Layer) damaged(w want) error {
	err := &IntegrityError{Key: l.dev.Key, Chunk: w.chunk, Err: fmt.Errorf(
		"the %d bytes at %d of blob %s don't have the chunk table's SHA-256, also when asked for again", w.ch.BlobLength, w.ch.BlobOffset, l.dev.Blob.Digest)}
	l.content.damage.Do(func() { l.cache.log.Error("the source sends wrong content", "error", err) })
	return err
}

// frames is the part of a Source that stream needs.
type frames interface {
	ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error)
}

// stream gets a run's frames from src and puts each as it arrives. before is
// called before each frame is read, and may end it. What arrived damaged is
// asked for once more, elsewhere if src knows of elsewhere; bad is what then
// still is.
func (l *Layer) stream(ctx context.Context, src frames, run []want, before func() error) (bad []want, err error) {
	suspect, err := l.streamOnce(ctx, src, run, before)
	for err == nil && len(suspect) > 0 {
		n := 1
		for n < len(suspect) && suspect[n].chunk == suspect[0].chunk+n {
			n++
		}
		var still []want
		still, err = l.streamOnce(blob.Doubt(ctx), src, suspect[:n], before)
		bad = append(bad, still...)
		suspect = suspect[n:]
	}
	return bad, err
}

// streamOnce is stream without insisting: bad is what arrived damaged.
func (l *Layer) streamOnce(ctx context.Context, src frames, run []want, before func() error) (bad []want, err error) {
	first, last := run[0].ch, run[len(run)-1].ch
	l.cache.stats.requests.Add(1)
	began := time.Now()
	body, err := src.ReadRange(ctx, first.BlobOffset, last.BlobOffset+int64(last.BlobLength)-first.BlobOffset)
	if err != nil {
		return nil, canceled(ctx, err)
	}
	defer body.Close()
	l.cache.traffic.pace.answered(time.Since(began))
	buf := l.cache.buffers.get()
	defer buf.release()
	var got int64
	var reading time.Duration
	defer func() { l.cache.traffic.pace.arrived(got, reading) }()
	for _, w := range run {
		if err := before(); err != nil {
			return bad, err
		}
		frame := buf.mem[:w.ch.BlobLength]
		began := time.Now()
		if _, err := io.ReadFull(body, frame); err != nil {
			return bad, canceled(ctx, err)
		}
		reading += time.Since(began)
		got += int64(len(frame))
		l.meter.arrived(w.origin, len(frame))
		err := l.content.put(w.chunk, w.ch, frame)
		var ie *IntegrityError
		switch {
		case err == nil:
		case errors.As(err, &ie) && ie.Chunk >= 0:
			l.noteCorrupt(err)
			bad = append(bad, w)
		default: // not stored: whoever waited has it, and the disk's state is logged
		}
	}
	// All has been verified. The end is read so that the connection can be
	// used again.
	var one [1]byte
	_, _ = body.Read(one[:])
	return bad, nil
}

// noteCorrupt counts what arrived damaged.
func (l *Layer) noteCorrupt(err error) {
	var ie *IntegrityError
	if errors.As(err, &ie) {
		l.cache.stats.corrupt.Add(1)
		l.content.damage.Do(func() { l.cache.log.Warn("content arrived damaged", "error", err) })
	}
}

// canceled adds why the context ended, if it did: "context canceled" tells
// nobody anything.
func canceled(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil && !errors.Is(err, c) {
		return fmt.Errorf("%w: %w", c, err)
	}
	return err
}
