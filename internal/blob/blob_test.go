package blob_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"sluice/internal/blob"
	"sluice/internal/blob/blobtest"
	"sluice/oci"
	"sluice/oci/ocimem"
)

func TestBytes(t *testing.T) {
	blobtest.Run(t, func(_ *testing.T, content []byte) blob.Source { return blob.FromBytes(content) })
}

func TestFile(t *testing.T) {
	blobtest.Run(t, func(t *testing.T, content []byte) blob.Source {
		name := filepath.Join(t.TempDir(), "blob")
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return blob.FromFile(f, int64(len(content)))
	})
}

func TestRegistry(t *testing.T) {
	blobtest.Run(t, func(_ *testing.T, content []byte) blob.Source {
		r := &registry{content: content}
		return blob.FromRegistry(r, "a/b", r.descriptor())
	})
}

// TestMemoryRegistry is FromRegistry on a real oci.Registry.
func TestMemoryRegistry(t *testing.T) {
	blobtest.Run(t, func(t *testing.T, content []byte) blob.Source {
		r := ocimem.New()
		desc := oci.Descriptor{MediaType: oci.MediaTypeOctetStream, Digest: oci.DigestOf(content), Size: int64(len(content))}
		if _, err := r.PushBlob(t.Context(), "a/b", desc, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		return blob.FromRegistry(r, "a/b", desc)
	})
	src := blob.FromRegistry(ocimem.New(), "a/b", oci.Descriptor{Digest: oci.DigestOf(nil), Size: 5})
	if err := blob.ReadFull(t.Context(), src, make([]byte, 5), 0); !errors.Is(err, oci.ErrNameUnknown) || !blob.Final(err) {
		t.Errorf("a repository that isn't there: %v, want ErrNameUnknown, which is final", err)
	}
}

func TestDecorators(t *testing.T) {
	blobtest.Run(t, func(_ *testing.T, content []byte) blob.Source {
		var c blob.Counter
		src := blob.Retry(blob.Count(blob.FromBytes(content), &c), blob.RetryOptions{})
		return blob.Limit(src, blob.Bandwidth(1<<30))
	})
}

// TestRetryFlaky runs the whole suite over a source that cuts almost every
// stream.
func TestRetryFlaky(t *testing.T) {
	blobtest.Run(t, func(_ *testing.T, content []byte) blob.Source {
		var n atomic.Int64
		src := &funcSource{size: int64(len(content)), open: func(ctx context.Context, off, length int64) (io.ReadCloser, error) {
			switch k := n.Add(1) % 4; {
			case k == 1:
				return nil, errors.New("connection refused")
			case k == 2 && length > 1:
				r, err := blob.FromBytes(content).ReadRange(ctx, off, length/2+1)
				return r, err // ends early
			}
			return blob.FromBytes(content).ReadRange(ctx, off, length)
		}}
		// funcSource's streams may just end: FromRegistry is what checks that.
		return blob.Retry(blob.FromRegistry(&registry{content: content, source: src}, "a/b",
			(&registry{content: content}).descriptor()), blob.RetryOptions{MinBackoff: time.Microsecond, MaxBackoff: time.Microsecond})
	})
}

func TestLyingLength(t *testing.T) {
	content := blobtest.Content(1000)
	for name, test := range map[string]struct {
		sent int64
		want error
	}{
		"short": {sent: 99, want: io.ErrUnexpectedEOF},
		"long":  {sent: 101, want: oci.ErrSizeInvalid},
		"all":   {sent: 1000, want: oci.ErrSizeInvalid},
		"none":  {sent: 0, want: io.ErrUnexpectedEOF},
	} {
		t.Run(name, func(t *testing.T) {
			src := &funcSource{size: 1000, open: func(ctx context.Context, _, _ int64) (io.ReadCloser, error) {
				return blob.FromBytes(content).ReadRange(ctx, 0, test.sent)
			}}
			r := &registry{content: content, source: src}
			err := blob.ReadFull(t.Context(), blob.FromRegistry(r, "a/b", r.descriptor()), make([]byte, 100), 200)
			if !errors.Is(err, test.want) {
				t.Fatalf("error %v, want %v", err, test.want)
			}
			for _, part := range []string{r.descriptor().Digest.String(), "100 bytes at offset 200"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error %q doesn't say %q", err, part)
				}
			}
		})
	}
}

func TestOtherBlob(t *testing.T) {
	r := &registry{content: blobtest.Content(1000)}
	desc := r.descriptor()
	desc.Size = 999
	if err := blob.ReadFull(t.Context(), blob.FromRegistry(r, "a/b", desc), make([]byte, 10), 0); !errors.Is(err, oci.ErrSizeInvalid) {
		t.Errorf("a registry with another size: %v, want ErrSizeInvalid", err)
	}
	desc = r.descriptor()
	desc.Digest = oci.DigestOf([]byte("another"))
	if err := blob.ReadFull(t.Context(), blob.FromRegistry(r, "a/b", desc), make([]byte, 10), 0); !errors.Is(err, oci.ErrDigestInvalid) {
		t.Errorf("a registry that answers with another blob: %v, want ErrDigestInvalid", err)
	}
	two := &mirrored{registry: registry{content: blobtest.Content(1000)}, mirror: registry{content: blobtest.Content(999)}}
	if err := blob.ReadFull(t.Context(), blob.FromRegistry(two, "a/b", two.descriptor()), make([]byte, 10), 0); err != nil {
		t.Errorf("a registry whose mirror has another blob: %v", err)
	}
}

// mirrored is a registry whose mirror answers, unless there's doubt.
type mirrored struct {
	registry
	mirror registry
}

func (r *mirrored) GetBlobRange(ctx context.Context, repo string, digest oci.Digest, off, n int64) (oci.BlobReader, error) {
	if blob.Doubted(ctx) {
		return r.registry.GetBlobRange(ctx, repo, digest, off, n)
	}
	return r.mirror.GetBlobRange(ctx, repo, digest, off, n)
}

// TestRetryResumes checks that a cut stream goes on at the byte where it
// broke and asks for no byte twice.
func TestRetryResumes(t *testing.T) {
	content := blobtest.Content(10_000)
	var asked []int64
	var c blob.Counter
	cut := &funcSource{size: 10_000, open: func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
		asked = append(asked, off)
		r, err := blob.FromBytes(content).ReadRange(ctx, off, n)
		return &cutReader{ReadCloser: r, left: 3000}, err
	}}
	src := blob.Retry(blob.Count(cut, &c), blob.RetryOptions{Attempts: 1 << 20, MinBackoff: 1, MaxBackoff: 1})
	got := make([]byte, 9500)
	if err := blob.ReadFull(t.Context(), src, got, 500); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, content[500:]) {
		t.Error("wrong bytes")
	}
	want := []int64{500, 3500, 6500, 9500}
	if len(asked) != len(want) {
		t.Fatalf("asked at offsets %v, want %v", asked, want)
	}
	for i := range want {
		if asked[i] != want[i] {
			t.Fatalf("asked at offsets %v, want %v", asked, want)
		}
	}
	if c.Bytes.Load() != 9500 || c.Requests.Load() != 4 || c.Failures.Load() != 3 {
		t.Errorf("counted %d bytes, %d requests, %d failures; want 9500, 4, 3", c.Bytes.Load(), c.Requests.Load(), c.Failures.Load())
	}
}

func TestRetryFinal(t *testing.T) {
	for _, err := range []error{oci.ErrUnauthorized, oci.ErrDenied, oci.ErrBlobUnknown, oci.ErrNameUnknown} {
		src := &funcSource{size: 10, open: func(context.Context, int64, int64) (io.ReadCloser, error) { return nil, err }}
		var c blob.Counter
		got := blob.ReadFull(t.Context(), blob.Retry(blob.Count(src, &c), blob.RetryOptions{}), make([]byte, 5), 0)
		if !errors.Is(got, err) || c.Requests.Load() != 1 {
			t.Errorf("%v: asked %d times, error %v; want once and the same error", err, c.Requests.Load(), got)
		}
	}
	if blob.Final(oci.ErrTooManyRequests) || blob.Final(io.ErrUnexpectedEOF) || blob.Final(errors.New("502 bad gateway")) {
		t.Error("an error that may pass is called final")
	}
}

func TestRetryGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &funcSource{size: 10, open: func(context.Context, int64, int64) (io.ReadCloser, error) { return nil, oci.ErrTooManyRequests }}
		var c blob.Counter
		began := time.Now()
		err := blob.ReadFull(t.Context(), blob.Retry(blob.Count(src, &c), blob.RetryOptions{}), make([]byte, 5), 0)
		if !errors.Is(err, oci.ErrTooManyRequests) || c.Requests.Load() != 5 {
			t.Errorf("asked %d times, error %v; want 5 times and ErrTooManyRequests", c.Requests.Load(), err)
		}
		// Pauses of 100, 200, 400, 800 ms, each less up to a half.
		if d := time.Since(began); d < 750*time.Millisecond || d > 1500*time.Millisecond {
			t.Errorf("gave up after %v, want 0.75 s to 1.5 s", d)
		}
	})
}

// TestRetryTimeouts: a source that hangs is given up for each of the reasons
// that RetryOptions name, at the time that they name.
func TestRetryTimeouts(t *testing.T) {
	content := blobtest.Content(1000)
	hangInOpen := func(ctx context.Context, _, _ int64) (io.ReadCloser, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	hangAfter := func(n int64) func(context.Context, int64, int64) (io.ReadCloser, error) {
		return func(ctx context.Context, off, length int64) (io.ReadCloser, error) {
			r, err := blob.FromBytes(content).ReadRange(ctx, off, length)
			return &hangReader{ReadCloser: r, left: n, done: ctx.Done()}, err
		}
	}
	for name, test := range map[string]struct {
		open func(context.Context, int64, int64) (io.ReadCloser, error)
		opts blob.RetryOptions
		want time.Duration
	}{
		"open":       {hangInOpen, blob.RetryOptions{Attempts: 1, FirstByte: 2 * time.Second}, 2 * time.Second},
		"first byte": {hangAfter(0), blob.RetryOptions{Attempts: 1, FirstByte: 3 * time.Second, Idle: time.Second}, 3 * time.Second},
		// One byte, 4 s of silence, one byte, 4 s of silence … each attempt
		// brings something, so only the total ends it.
		"total": {hangAfter(1), blob.RetryOptions{Attempts: 2, Idle: 4 * time.Second, Total: 10 * time.Second, MinBackoff: 1, MaxBackoff: 1}, 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				src := blob.Retry(&funcSource{size: 1000, open: test.open}, test.opts)
				began := time.Now()
				err := blob.ReadFull(t.Context(), src, make([]byte, 1000), 0)
				if !errors.Is(err, blob.ErrStalled) {
					t.Errorf("error %v, want ErrStalled", err)
				}
				if d := time.Since(began); d < test.want || d > test.want+50*time.Millisecond {
					t.Errorf("gave up after %v, want %v", d, test.want)
				}
			})
		})
	}
}

// TestRetryIdleResumes: a stream that stalls is abandoned and continued.
func TestRetryIdleResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		content := blobtest.Content(1000)
		requests := 0
		src := &funcSource{size: 1000, open: func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
			requests++
			r, err := blob.FromBytes(content).ReadRange(ctx, off, n)
			if requests == 1 {
				return &hangReader{ReadCloser: r, left: 300, done: ctx.Done()}, err
			}
			return r, err
		}}
		got := make([]byte, 1000)
		if err := blob.ReadFull(t.Context(), blob.Retry(src, blob.RetryOptions{Idle: time.Second}), got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, content) || requests != 2 {
			t.Errorf("%d requests, content equal: %v; want 2 and equal", requests, bytes.Equal(got, content))
		}
	})
}

// TestRetryDrips: a stream that brings a byte now and then is abandoned like one
// that stalls, a slow one isn't.
func TestRetryDrips(t *testing.T) {
	for _, c := range []struct {
		bytes, requests int // a second; for all
		took            time.Duration
	}{
		{1, 2, 4 * time.Second},
		{400, 1, 8 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			content := blobtest.Content(3000)
			requests := 0
			src := &funcSource{size: 3000, open: func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
				requests++
				r, err := blob.FromBytes(content).ReadRange(ctx, off, n)
				if requests == 1 {
					return dripReader{r, c.bytes, ctx.Done()}, err
				}
				return r, err
			}}
			got, began := make([]byte, 3000), time.Now()
			opts := blob.RetryOptions{FirstByte: 2 * time.Second, Idle: 4 * time.Second, MinBackoff: 1, MaxBackoff: 1}
			if err := blob.ReadFull(t.Context(), blob.Retry(src, opts), got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, content) || requests != c.requests {
				t.Errorf("%d bytes a second: %d requests, content equal: %v; want %d and equal", c.bytes, requests, bytes.Equal(got, content), c.requests)
			}
			if took := time.Since(began).Truncate(time.Second); took < c.took || took > c.took+time.Second {
				t.Errorf("%d bytes a second took %v, want %v", c.bytes, took, c.took)
			}
		})
	}
}

// dripReader brings so many bytes a second.
type dripReader struct {
	io.ReadCloser
	bytes int
	done  <-chan struct{}
}

func (d dripReader) Read(p []byte) (int, error) {
	select {
	case <-time.After(time.Second):
	case <-d.done:
		return 0, context.Canceled
	}
	return d.ReadCloser.Read(p[:min(len(p), d.bytes)])
}

// TestRetrySlowCaller: time that the caller takes between reads is not held
// against the source.
func TestRetrySlowCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := blob.Retry(blob.FromBytes(blobtest.Content(10)), blob.RetryOptions{FirstByte: time.Second, Idle: time.Second})
		r, err := src.ReadRange(t.Context(), 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		for range 10 {
			time.Sleep(5 * time.Second)
			if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestRetryCallerCancels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := blob.Retry(&funcSource{size: 10, open: func(context.Context, int64, int64) (io.ReadCloser, error) {
			return nil, errors.New("connection refused")
		}}, blob.RetryOptions{MinBackoff: time.Hour, MaxBackoff: time.Hour})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		err := blob.ReadFull(ctx, src, make([]byte, 10), 0)
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("error %v after %v; want DeadlineExceeded after 1 s, not after the pause", err, time.Since(began))
		}
	})
}

func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := blob.Limit(blob.FromBytes(blobtest.Content(11000)), rate.NewLimiter(1000, 1000))
		began := time.Now()
		if err := blob.ReadFull(t.Context(), src, make([]byte, 11000), 0); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d < 9900*time.Millisecond || d > 10100*time.Millisecond {
			t.Errorf("11,000 bytes at 1,000/s with a burst of 1,000 took %v, want 10 s", d)
		}

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began = time.Now()
		if err := blob.ReadFull(ctx, src, make([]byte, 11000), 0); err == nil || time.Since(began) > time.Second {
			t.Errorf("waited %v for bandwidth beyond the context's deadline, error %v", time.Since(began), err)
		}
	})
}

// registry is the one method of an oci.Reader that FromRegistry uses.
type registry struct {
	oci.Reader
	content []byte
	source  blob.Source // if not nil, what ranges are answered from
}

func (r *registry) descriptor() oci.Descriptor {
	return oci.Descriptor{Digest: oci.DigestOf(r.content), Size: int64(len(r.content))}
}

func (r *registry) GetBlobRange(ctx context.Context, repo string, _ oci.Digest, off, n int64) (oci.BlobReader, error) {
	if repo != "a/b" || n <= 0 {
		return nil, oci.ErrRangeInvalid
	}
	src := r.source
	if src == nil {
		src = blob.FromBytes(r.content)
	}
	body, err := src.ReadRange(ctx, off, n)
	if err != nil {
		return nil, err
	}
	return &blobReader{ReadCloser: body, desc: r.descriptor()}, nil
}

type blobReader struct {
	io.ReadCloser
	desc oci.Descriptor
}

func (b *blobReader) Descriptor() oci.Descriptor { return b.desc }

type funcSource struct {
	size int64
	open func(ctx context.Context, off, n int64) (io.ReadCloser, error)
}

func (s *funcSource) Size() int64 { return s.size }

func (s *funcSource) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	return s.open(ctx, off, n)
}

// cutReader breaks after some bytes, as a connection does.
type cutReader struct {
	io.ReadCloser
	left int
}

func (r *cutReader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, errors.New("connection reset by peer")
	}
	n, err := r.ReadCloser.Read(p[:min(len(p), r.left)])
	r.left -= n
	return n, err
}

// hangReader goes silent after some bytes, until its context is done.
type hangReader struct {
	io.ReadCloser
	left int64
	done <-chan struct{}
}

func (r *hangReader) Read(p []byte) (int, error) {
	if r.left == 0 {
		<-r.done
		return 0, context.Canceled
	}
	n, err := r.ReadCloser.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	return n, err
}
