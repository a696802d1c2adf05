package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"sluice/oci"
)

// ErrStalled is what a source is found guilty of when nothing arrived in the time
// that RetryOptions allow, or so little that it might as well be nothing.
var ErrStalled = errors.New("the source sent nothing for too long")

// leastProgress is how many bytes have to arrive in RetryOptions.Idle.
const leastProgress = 1 << 10

// RetryOptions bound how patient Retry is. The zero value is a node's
// default.
type RetryOptions struct {
	// Attempts is how many in a row may fail without a single byte having
	// arrived before Retry gives up; default 5. An attempt that brought
	// something starts the count anew, so a long range survives any number
	// of cuts: Total bounds those.
	Attempts int

	// FirstByte is how long the first byte of an attempt may take, the
	// request included; default 10 s.
	FirstByte time.Duration

	// Idle is how long later Reads may take until another KiB has arrived, or
	// the rest; default 10 s. Time that the caller spends between Reads doesn't
	// count.
	Idle time.Duration

	// Total bounds the whole range, attempts, pauses and the caller's own
	// time included; default 5 min.
	Total time.Duration

	// MinBackoff is about how long the first pause is, and MaxBackoff the
	// longest, each pause being twice as long as that before it, less up to
	// a half at random; defaults 100 ms and 5 s.
	MinBackoff, MaxBackoff time.Duration
}

func (o RetryOptions) withDefaults() RetryOptions {
	o.Attempts = defaultTo(o.Attempts, 5)
	o.FirstByte = defaultTo(o.FirstByte, 10*time.Second)
	o.Idle = defaultTo(o.Idle, 10*time.Second)
	o.Total = defaultTo(o.Total, 5*time.Minute)
	o.MinBackoff = defaultTo(o.MinBackoff, 100*time.Millisecond)
	o.MaxBackoff = max(defaultTo(o.MaxBackoff, 5*time.Second), o.MinBackoff)
	return o
}

func defaultTo[T int | time.Duration](v, d T) T {
	if v <= 0 {
		return d
	}
	return v
}

// Retry returns src, asking again when a range fails, from the byte on that
// didn't arrive. Errors that asking again can't mend (see Final) are returned
// at once. The reader's bytes are those of one uninterrupted stream; that two
// attempts may be answered differently is for the caller's digests to find.
func Retry(src Source, opts RetryOptions) Source {
	return &retrySource{Source: src, opts: opts.withDefaults()}
}

// Final reports whether err, of a read from a Source, will be the answer next
// time too: there's no such blob, access is denied (credentials have been
// renewed by then: that's the registry client's work), or the registry has
// other ideas of the blob's size or digest. Everything else, such as refused
// connections, cut streams, time-outs, overload and server errors, may pass.
func Final(err error) bool {
	for _, e := range []error{
		oci.ErrUnauthorized, oci.ErrDenied, oci.ErrBlobUnknown, oci.ErrNameUnknown, oci.ErrNameInvalid,
		oci.ErrRangeInvalid, oci.ErrDigestInvalid, oci.ErrSizeInvalid, oci.ErrUnsupported,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

type retrySource struct {
	Source
	opts RetryOptions
}

func (s *retrySource) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.opts.Total,
		fmt.Errorf("%w: the range isn't complete after %v", ErrStalled, s.opts.Total))
	r := &retryReader{
		opts:   s.opts,
		off:    off,
		n:      n,
		cancel: cancel,
		cause:  func() error { return context.Cause(ctx) },
		pause:  func(d time.Duration) error { return sleep(ctx, d) },
		start:  func(off, n int64) (*attempt, error) { return startAttempt(ctx, s.Source, s.opts, off, n) },
	}
	if err := r.open(); err != nil {
		cancel()
		return nil, err
	}
	return r, nil
}

// retryReader is one stream made of several attempts.
type retryReader struct {
	opts   RetryOptions
	off, n int64
	got    int64
	failed int // attempts in a row that brought nothing
	cur    *attempt
	err    error // final; sticky

	// The stream's context, as what is done with it.
	cancel context.CancelFunc
	cause  func() error
	pause  func(time.Duration) error
	start  func(off, n int64) (*attempt, error)
}

// open starts attempts until one yields a stream, or fails for good.
func (r *retryReader) open() error {
	for {
		a, err := r.start(r.off+r.got, r.n-r.got)
		if err == nil {
			r.cur = a
			return nil
		}
		if err := r.again(err); err != nil {
			return err
		}
	}
}

// again decides about the failure of an attempt: nil, after a pause, to try
// again, otherwise the stream's error.
func (r *retryReader) again(err error) error {
	if c := r.cause(); c != nil {
		return r.fail(c)
	}
	if Final(err) {
		return r.fail(err)
	}
	r.failed++
	if r.failed >= r.opts.Attempts {
		return r.fail(fmt.Errorf("gave up after %d attempts that brought nothing; the last: %w", r.failed, err))
	}
	d := r.opts.MaxBackoff
	if shift := r.failed - 1; shift < 30 {
		d = min(d, r.opts.MinBackoff<<shift)
	}
	if perr := r.pause(d - rand.N(d/2+1)); perr != nil {
		return r.fail(fmt.Errorf("%w; the last attempt: %w", perr, err))
	}
	return nil
}

func (r *retryReader) fail(err error) error {
	name := ""
	var re *RangeError
	if errors.As(err, &re) {
		name = re.Blob
	}
	r.err = &RangeError{Blob: name, Offset: r.off, Length: r.n, Got: r.got, Err: err}
	return r.err
}

func (r *retryReader) Read(p []byte) (int, error) {
	for {
		if r.err != nil {
			return 0, r.err
		}
		n, err := r.cur.read(p)
		if n > 0 {
			r.got += int64(n)
			r.failed = 0
		}
		if err == nil || err == io.EOF {
			return n, err
		}
		r.cur.close()
		if err = r.again(err); err == nil {
			err = r.open()
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (r *retryReader) Close() error {
	r.cancel() // also of the attempt: its context is a child
	if r.cur == nil {
		return nil
	}
	return r.cur.close()
}

// attempt is one request. Its watch ends it when a byte takes too long.
type attempt struct {
	body   io.ReadCloser
	opts   RetryOptions
	first  time.Duration // what is left of FirstByte; 0 once a byte has arrived
	waited time.Duration // in Reads, since there was progress
	little int           // bytes that have arrived since
	cancel context.CancelCauseFunc
	cause  func() error
}

func startAttempt(ctx context.Context, src Source, opts RetryOptions, off, n int64) (*attempt, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	a := &attempt{opts: opts, cancel: cancel, cause: func() error { return context.Cause(ctx) }}
	began := time.Now()
	watch := a.watch(opts.FirstByte, opts.FirstByte)
	body, err := src.ReadRange(ctx, off, n)
	watch.Stop()
	if err != nil {
		if c := a.cause(); c != nil {
			err = fmt.Errorf("%w: %w", c, err)
		}
		cancel(nil)
		return nil, err
	}
	a.body = body
	a.first = max(opts.FirstByte-time.Since(began), time.Millisecond)
	return a, nil
}

// watch cancels the attempt after left, which is what is left of allowed, unless
// stopped before.
func (a *attempt) watch(left, allowed time.Duration) *time.Timer {
	return time.AfterFunc(left, func() { a.cancel(fmt.Errorf("%w (%v)", ErrStalled, allowed)) })
}

func (a *attempt) read(p []byte) (int, error) {
	left, allowed := a.opts.Idle-a.waited, a.opts.Idle
	if a.first > 0 {
		left, allowed = a.first, a.opts.FirstByte
	}
	watch := a.watch(left, allowed)
	began := time.Now()
	n, err := a.body.Read(p)
	watch.Stop()
	if a.first == 0 {
		a.waited += time.Since(began)
	}
	if n > 0 {
		a.first = 0
	}
	if a.little += n; a.little >= leastProgress {
		a.waited, a.little = 0, 0
	}
	if err != nil && err != io.EOF {
		if c := a.cause(); c != nil {
			err = fmt.Errorf("%w: %w", c, err)
		}
	}
	return n, err
}

func (a *attempt) close() error {
	a.cancel(nil)
	return a.body.Close()
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
