// Package blobtest is the conformance suite of blob.Source: what every source
// and every decorator must do, whatever it reads from.
package blobtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/iotest"

	"sluice/internal/blob"
	"sluice/oci"
)

// Run tests sources. open returns one whose content is the given bytes; it is
// called once per test.
func Run(t *testing.T, open func(t *testing.T, content []byte) blob.Source) {
	t.Run("Ranges", func(t *testing.T) { testRanges(t, open) })
	t.Run("Stream", func(t *testing.T) { testStream(t, open) })
	t.Run("Outside", func(t *testing.T) { testOutside(t, open) })
	t.Run("Empty", func(t *testing.T) { testEmpty(t, open) })
	t.Run("CloseEarly", func(t *testing.T) { testCloseEarly(t, open) })
	t.Run("Canceled", func(t *testing.T) { testCanceled(t, open) })
	t.Run("Concurrent", func(t *testing.T) { testConcurrent(t, open) })
}

// Content returns n bytes that look random and are the same in every run.
func Content(n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(b) // never fails
	return b
}

func testRanges(t *testing.T, open func(*testing.T, []byte) blob.Source) {
	content := Content(100_003)
	size := int64(len(content))
	src := open(t, content)
	if src.Size() != size {
		t.Fatalf("Size is %d, want %d", src.Size(), size)
	}
	for _, r := range [][2]int64{{0, size}, {0, 1}, {size - 1, 1}, {1, size - 2}, {4096, 4096}, {99_999, 4}, {0, 0}, {size, 0}, {77, 0}} {
		got := make([]byte, r[1])
		if err := blob.ReadFull(t.Context(), src, got, r[0]); err != nil {
			t.Errorf("range %v: %v", r, err)
			continue
		}
		if !bytes.Equal(got, content[r[0]:r[0]+r[1]]) {
			t.Errorf("range %v: wrong bytes", r)
		}
	}
}

func testStream(t *testing.T, open func(*testing.T, []byte) blob.Source) {
	content := Content(70_001)
	src := open(t, content)
	r, err := src.ReadRange(t.Context(), 1, 70_000)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := iotest.TestReader(r, content[1:]); err != nil {
		t.Error(err)
	}
	for range 3 {
		if n, err := r.Read(make([]byte, 10)); n != 0 || err != io.EOF {
			t.Fatalf("reading at the end: %d, %v; want io.EOF every time", n, err)
		}
	}
	if err := r.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func testOutside(t *testing.T, open func(*testing.T, []byte) blob.Source) {
	src := open(t, Content(1000))
	const top = 1<<63 - 1
	for _, r := range [][2]int64{{-1, 1}, {0, -1}, {0, 1001}, {1000, 1}, {1001, 0}, {999, 2}, {1, top}, {top, top}, {top, 1}} {
		body, err := src.ReadRange(t.Context(), r[0], r[1])
		if err == nil {
			body.Close()
			t.Errorf("range %v of 1000 bytes: no error", r)
			continue
		}
		if !errors.Is(err, oci.ErrRangeInvalid) {
			t.Errorf("range %v of 1000 bytes: %v, want ErrRangeInvalid", r, err)
		}
		var re *blob.RangeError
		if !errors.As(err, &re) || re.Offset != r[0] || re.Length != r[1] {
			t.Errorf("range %v: error %#v doesn't name the range", r, err)
		}
	}
}

func testEmpty(t *testing.T, open func(*testing.T, []byte) blob.Source) {
	src := open(t, nil)
	if src.Size() != 0 {
		t.Errorf("Size is %d, want 0", src.Size())
	}
	if err := blob.ReadFull(t.Context(), src, nil, 0); err != nil {
		t.Errorf("reading all of nothing: %v", err)
	}
}

func testCloseEarly(t *testing.T, open func(*testing.T, []byte) blob.Source) {
	content := Content(1 << 20)
	src := open(t, content)
	for range 5 {
		r, err := src.ReadRange(t.Context(), 0, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(r, make([]byte, 10)); err != nil {
			t.Fatal(err)
		}
		if err := r.Close(); err != nil {
			t.Errorf("closing early: %v", err)
		}
	}
	got := make([]byte, 100)
	if err := blob.ReadFull(t.Context(), src, got, 500); err != nil || !bytes.Equal(got, content[500:600]) {
		t.Errorf("a range after others were closed early: %v", err)
	}
}

func testCanceled(t *testing.T, open func(*testing.T, []byte) blob.Source) {
	src := open(t, Content(1<<20))
	ctx, cancel := context.WithCancel(t.Context())
	r, err := src.ReadRange(ctx, 0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, context.Canceled) {
		t.Errorf("reading on after the context was canceled: %v, want context.Canceled", err)
	}
	r2, err := src.ReadRange(ctx, 0, 1<<20)
	if err == nil {
		_, err = io.Copy(io.Discard, r2)
		r2.Close()
	}
	if !errors.Is(err, context.Canceled) {
		t.Errorf("reading with a canceled context: %v, want context.Canceled", err)
	}
}

func testConcurrent(t *testing.T, open func(*testing.T, []byte) blob.Source) {
	content := Content(300_000)
	src := open(t, content)
	errs := make(chan error, 8)
	var wg sync.WaitGroup
	for i := range cap(errs) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for range 20 {
				off := rng.Int64N(300_000)
				got := make([]byte, rng.Int64N(300_000-off+1))
				if err := blob.ReadFull(t.Context(), src, got, off); err != nil {
					errs <- err
					return
				}
				if !bytes.Equal(got, content[off:off+int64(len(got))]) {
					errs <- fmt.Errorf("%d bytes at %d: wrong bytes", len(got), off)
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
}
