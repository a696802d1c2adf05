package blob

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
)

// Counter adds up what was asked of the sources that Count ties to it. All of
// it may be read at any time; it only grows.
type Counter struct {
	Requests atomic.Int64 // calls of ReadRange, also those that failed
	Failures atomic.Int64 // calls and streams that ended in an error, but for those the caller had given up
	Bytes    atomic.Int64 // that arrived
}

// Count returns src, adding every request and every byte to c. Several
// sources may share one Counter.
func Count(src Source, c *Counter) Source { return &countSource{Source: src, c: c} }

type countSource struct {
	Source
	c *Counter
}

func (s *countSource) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	s.c.Requests.Add(1)
	r, err := s.Source.ReadRange(ctx, off, n)
	if err != nil {
		if !givenUp(ctx) {
			s.c.Failures.Add(1)
		}
		return nil, err
	}
	return &countReader{ReadCloser: r, c: s.c, given: func() bool { return givenUp(ctx) }}, nil
}

// givenUp reports whether the caller has no use for an answer any more, other
// than that it took too long.
func givenUp(ctx context.Context) bool {
	return ctx.Err() != nil && !errors.Is(context.Cause(ctx), ErrStalled) && !errors.Is(context.Cause(ctx), context.DeadlineExceeded)
}

type countReader struct {
	io.ReadCloser
	c      *Counter
	given  func() bool // see givenUp
	failed bool
}

func (r *countReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.c.Bytes.Add(int64(n))
	if err != nil && err != io.EOF && !r.failed && !r.given() {
		r.failed = true
		r.c.Failures.Add(1)
	}
	return n, err
}
