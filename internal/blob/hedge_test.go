package blob_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/blob"
	"sluice/internal/blob/blobtest"
)

func TestHedge(t *testing.T) {
	blobtest.Run(t, func(_ *testing.T, content []byte) blob.Source {
		src := blob.FromBytes(content)
		return blob.Hedge(src, src, &blob.Hedger{})
	})
}

// slowSource answers each request after what delay says.
type slowSource struct {
	blob.Source
	delay   func() time.Duration
	open    atomic.Int64 // requests that have neither failed nor been closed
	started atomic.Int64
}

func (s *slowSource) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	s.started.Add(1)
	select {
	case <-time.After(s.delay()):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r, err := s.Source.ReadRange(ctx, off, n)
	if err != nil {
		return nil, err
	}
	s.open.Add(1)
	return &closing{ReadCloser: r, closed: func() { s.open.Add(-1) }}, nil
}

type closing struct {
	io.ReadCloser
	closed func()
}

func (c *closing) Close() error {
	c.closed()
	return c.ReadCloser.Close()
}

// TestHedgeCutsTheTail: one answer in fifty takes for ever; with a second
// request none does, and few requests are asked twice.
func TestHedgeCutsTheTail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		content := blobtest.Content(100_000)
		var asked atomic.Int64
		src := &slowSource{Source: blob.FromBytes(content)}
		src.delay = func() time.Duration {
			n := asked.Add(1)
			if n%50 == 49 {
				return time.Hour
			}
			return time.Duration(8+n%5) * time.Millisecond
		}
		var h blob.Hedger
		hedged := blob.Hedge(src, src, &h)
		const reads = 1000
		for i := range reads {
			began := time.Now()
			p := make([]byte, 1000)
			if err := blob.ReadFull(t.Context(), hedged, p, int64(i*90)); err != nil || !bytes.Equal(p, content[i*90:][:1000]) {
				t.Fatalf("read %d: %v, or wrong bytes", i, err)
			}
			if d := time.Since(began); d > 100*time.Millisecond {
				t.Fatalf("read %d took %v", i, d)
			}
		}
		if n := src.open.Load(); n != 0 {
			t.Errorf("%d answers were not closed", n)
		}
		if n := h.Hedges(); n < reads/60 || n > reads/15 {
			t.Errorf("%d of %d requests were asked twice", n, reads)
		}
	})
}

// TestHedgeBudget: a source that gets ten times slower for good isn't asked
// twice as much.
func TestHedgeBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := 10 * time.Millisecond
		src := &slowSource{Source: blob.FromBytes(blobtest.Content(10)), delay: func() time.Duration { return slow }}
		var h blob.Hedger
		hedged := blob.Hedge(src, src, &h)
		const reads = 400
		for i := range reads {
			if i%100 == 99 {
				slow *= 10
			}
			if err := blob.ReadFull(t.Context(), hedged, make([]byte, 5), 0); err != nil {
				t.Fatal(err)
			}
		}
		if n, most := src.started.Load(), int64(reads*106/100); n > most {
			t.Errorf("%d requests for %d reads, want at most %d", n, reads, most)
		}
	})
}

// TestHedgeErrors: an error is the caller's at once, unless the other request
// may still succeed.
func TestHedgeErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good := &slowSource{Source: blob.FromBytes(blobtest.Content(1000)), delay: func() time.Duration { return 10 * time.Millisecond }}
		broken := errors.New("broken")
		var bad bool
		first := sourceFunc{good, func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
			if bad {
				time.Sleep(25 * time.Millisecond) // after the second has been asked
				return nil, broken
			}
			return good.ReadRange(ctx, off, n)
		}}
		var h blob.Hedger
		hedged := blob.Hedge(first, good, &h)
		for range 50 {
			if err := blob.ReadFull(t.Context(), hedged, make([]byte, 5), 0); err != nil {
				t.Fatal(err)
			}
		}
		bad = true
		if err := blob.ReadFull(t.Context(), hedged, make([]byte, 5), 0); err != nil {
			t.Errorf("the second request was answered, and yet: %v", err)
		}
		fresh := blob.Hedge(first, good, &blob.Hedger{})
		if err := blob.ReadFull(t.Context(), fresh, make([]byte, 5), 0); !errors.Is(err, broken) {
			t.Errorf("error %v, want that of the only request", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := hedged.ReadRange(ctx, 0, 5); err == nil {
			t.Error("no error from a source that was given up")
		}
	})
}

type sourceFunc struct {
	blob.Source
	open func(ctx context.Context, off, n int64) (io.ReadCloser, error)
}

func (s sourceFunc) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	return s.open(ctx, off, n)
}
