package blob

import (
	"context"
	"io"

	"golang.org/x/time/rate"
)

// Bandwidth returns a limiter of bytesPerSecond for Limit. Up to a tenth of a
// second's worth, and at least 32 KiB, may pass at once. Zero or less is no
// limit.
func Bandwidth(bytesPerSecond int64) *rate.Limiter {
	if bytesPerSecond <= 0 {
		return rate.NewLimiter(rate.Inf, 0)
	}
	const least, most = 32 << 10, 4 << 20
	return rate.NewLimiter(rate.Limit(bytesPerSecond), int(min(max(bytesPerSecond/10, least), most)))
}

// Limit returns src, with every byte read from it paid for with one token of
// l; nil is no limit. Sources that share a limiter share its bandwidth. A
// wait for tokens ends when the context of the ReadRange does, and one that
// can't end before the context's deadline fails at once.
//
// Put Limit outside of Retry, so that waiting for bandwidth isn't taken for a
// stalled source.
func Limit(src Source, l *rate.Limiter) Source {
	if l == nil {
		return src
	}
	return &limitSource{Source: src, limiter: l}
}

type limitSource struct {
	Source
	limiter *rate.Limiter
}

func (s *limitSource) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	r, err := s.Source.ReadRange(ctx, off, n)
	if err != nil {
		return nil, err
	}
	wait := func(n int) error { return s.limiter.WaitN(ctx, n) }
	return &limitReader{ReadCloser: r, limiter: s.limiter, wait: wait, off: off, n: n}, nil
}

type limitReader struct {
	io.ReadCloser
	limiter *rate.Limiter
	wait    func(n int) error
	off, n  int64
	got     int64
}

func (r *limitReader) Read(p []byte) (int, error) {
	if r.limiter.Limit() == rate.Inf {
		return r.ReadCloser.Read(p)
	}
	// More than a burst can never be paid for.
	if burst := max(r.limiter.Burst(), 1); len(p) > burst {
		p = p[:burst]
	}
	n, err := r.ReadCloser.Read(p)
	r.got += int64(n)
	if n > 0 {
		if werr := r.wait(n); werr != nil {
			return n, &RangeError{Offset: r.off, Length: r.n, Got: r.got, Err: werr}
		}
	}
	return n, err
}
