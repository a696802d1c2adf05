package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/oci"
)

func TestReadAt(t *testing.T) {
	f := newFixture(t, 1, 1_000_001, 20_000)
	l := acquire(t, openCache(t, Options{}), f, f.source())
	if want := int64(len(f.padded)); l.Size() != want {
		t.Fatalf("Size is %d, want %d", l.Size(), want)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for range 300 {
		mustRead(t, l, f, rng.Int64N(l.Size()+1000), rng.Int64N(100_000))
	}
	mustRead(t, l, f, 0, l.Size()+10)
	mustRead(t, l, f, int64(len(f.content)), 600) // only padding
	for _, off := range []int64{l.Size(), l.Size() + 1, 1 << 62} {
		if n, err := l.ReadAt(t.Context(), make([]byte, 10), off); n != 0 || err != io.EOF {
			t.Errorf("reading at %d: %d, %v; want io.EOF", off, n, err)
		}
	}
	if _, err := l.ReadAt(t.Context(), make([]byte, 10), -1); err == nil || err == io.EOF {
		t.Errorf("reading at -1: %v, want an error", err)
	}
}

func TestEmptyDevice(t *testing.T) {
	f := newFixture(t, 1, 0, 20_000)
	l := acquire(t, openCache(t, Options{}), f, f.source())
	if n, err := l.ReadAt(t.Context(), make([]byte, 10), 0); n != 0 || err != io.EOF {
		t.Errorf("reading an empty device: %d, %v; want io.EOF", n, err)
	}
	if err := l.Fill(t.Context()); err != nil || !l.Complete() {
		t.Errorf("filling an empty device: %v, complete: %v", err, l.Complete())
	}
}

// TestSingleFlight: however many want a chunk, it's asked for once.
func TestSingleFlight(t *testing.T) {
	f := newFixture(t, 1, 100_000, 50_000)
	var count blob.Counter
	asked, open := make(chan int64, 100), make(chan struct{})
	l := acquire(t, openCache(t, Options{ReadAhead: -1}), f, blob.Count(gate(f, asked, open), &count))
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			if err := checkRead(t.Context(), l, f, int64(i), 1000); err != nil {
				t.Error(err)
			}
		})
	}
	<-asked
	time.Sleep(20 * time.Millisecond)
	close(open)
	wg.Wait()
	if n := count.Requests.Load(); n != 1 {
		t.Errorf("%d requests for one chunk, want 1", n)
	}
}

// TestCoalesce: one read of many chunks is one request, and as many as the
// bound of a request asks for.
func TestCoalesce(t *testing.T) {
	f := newFixture(t, 1, 1_000_000, 20_000)
	for _, test := range []struct{ most, want int64 }{{0, 1}, {int64(len(f.blob))/4 + 30_000, 4}} {
		var count blob.Counter
		c := openCache(t, Options{MaxRequest: test.most, ReadAhead: -1})
		l := acquire(t, c, f, blob.Count(f.source(), &count))
		mustRead(t, l, f, 0, 1_000_000)
		if n := count.Requests.Load(); n != test.want {
			t.Errorf("bound %d: %d requests, want %d", test.most, n, test.want)
		}
		if n := count.Bytes.Load(); n != int64(len(f.blob)) {
			t.Errorf("bound %d: fetched %d bytes, want %d", test.most, n, len(f.blob))
		}
	}
}

// TestEarlyWake: a reader gets its chunk when that has arrived, not when the
// whole request has.
func TestEarlyWake(t *testing.T) {
	f := newFixture(t, 1, 1_000_000, 20_000)
	stall := f.chunks[1].BlobOffset + 10
	src := &source{size: int64(len(f.blob)), open: func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
		pr, pw := io.Pipe()
		go func() {
			pw.Write(f.blob[off:stall])
			<-ctx.Done()
			pw.CloseWithError(ctx.Err())
		}()
		return pr, nil
	}}
	l := acquire(t, openCache(t, Options{}), f, src)
	long := make(chan error, 1)
	go func() { long <- checkRead(t.Context(), l, f, 0, 1_000_000) }()
	for l.cache.Stats().Requests == 0 {
		time.Sleep(time.Millisecond)
	}
	mustRead(t, l, f, 100, 1000) // or else it takes FaultTimeout, and fails
	l.Release()
	if err := <-long; !errors.Is(err, ErrClosed) {
		t.Errorf("the read of all, after Release: %v, want ErrClosed", err)
	}
}

// TestSequential: reading from front to end takes few requests, reading here
// and there fetches little that isn't wanted.
func TestSequential(t *testing.T) {
	f := newFixture(t, 1, 8<<20, 16<<10)
	var count blob.Counter
	l := acquire(t, openCache(t, Options{}), f, blob.Count(f.source(), &count))
	for off := int64(0); off < l.Size(); off += 4096 {
		mustRead(t, l, f, off, 4096)
	}
	if n := count.Requests.Load(); n > 20 {
		t.Errorf("%d requests for reading %d chunks in order, want at most 20", n, len(f.chunks))
	}
	if n := count.Bytes.Load(); n != int64(len(f.blob)) {
		t.Errorf("fetched %d bytes of a blob of %d", n, len(f.blob))
	}

	var random blob.Counter
	l = acquire(t, openCache(t, Options{}), f, blob.Count(f.source(), &random))
	for _, i := range rand.New(rand.NewPCG(4, 4)).Perm(len(f.chunks) / 10) {
		mustRead(t, l, f, f.chunks[i*10].Offset, 1)
	}
	if n, most := random.Bytes.Load(), int64(len(f.blob)/6); n > most {
		t.Errorf("reading every tenth chunk in random order fetched %d bytes of %d, want at most %d", n, len(f.blob), most)
	}
}

// TestCanceledReader: who began a fetch may leave, and those who joined it
// are served.
func TestCanceledReader(t *testing.T) {
	f := newFixture(t, 1, 100_000, 50_000)
	var count blob.Counter
	asked, open := make(chan int64, 100), make(chan struct{})
	l := acquire(t, openCache(t, Options{ReadAhead: -1}), f, blob.Count(gate(f, asked, open), &count))
	ctx, cancel := context.WithCancel(t.Context())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- checkRead(ctx, l, f, 0, 100) }()
	<-asked
	go func() { second <- checkRead(t.Context(), l, f, 50, 100) }()
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the canceled read: %v, want context.Canceled", err)
	}
	close(open)
	if err := <-second; err != nil {
		t.Errorf("the other read: %v", err)
	}
	if n := count.Requests.Load(); n != 1 {
		t.Errorf("%d requests, want 1", n)
	}
}

func TestFaultTimeout(t *testing.T) {
	const timeout = 50 * time.Millisecond
	f := newFixture(t, 1, 100_000, 50_000)
	synctest.Test(t, func(t *testing.T) {
		asked := make(chan int64, 100)
		open := make(chan struct{})
		l := acquire(t, openCache(t, Options{FaultTimeout: timeout}), f, gate(f, asked, open))
		began := time.Now()
		err := checkRead(t.Context(), l, f, 0, 100)
		if !errors.Is(err, ErrTimeout) {
			t.Errorf("error %v, want ErrTimeout", err)
		}
		if d := time.Since(began); d != timeout {
			t.Errorf("took %v, want %v", d, timeout)
		}
		close(open)
		mustRead(t, l, f, 0, 100) // the next read asks again
	})
}

// TestOtherSource: a Layer whose source works doesn't suffer from another's
// that doesn't, though they share what is under way.
func TestOtherSource(t *testing.T) {
	f := newFixture(t, 1, 100_000, 50_000)
	c := openCache(t, Options{ReadAhead: -1}) // so that nothing is asked of the broken one twice
	began, fail := make(chan struct{}), make(chan struct{})
	broken := acquire(t, c, f, &source{size: int64(len(f.blob)), open: func(context.Context, int64, int64) (io.ReadCloser, error) {
		close(began)
		<-fail
		return nil, oci.ErrUnauthorized
	}})
	good := acquire(t, c, f, f.source())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- checkRead(t.Context(), broken, f, 0, 100) }()
	<-began
	go func() { second <- checkRead(t.Context(), good, f, 0, 100) }()
	time.Sleep(20 * time.Millisecond)
	close(fail)
	if err := <-first; !errors.Is(err, oci.ErrUnauthorized) {
		t.Errorf("the Layer with the broken source: %v, want ErrUnauthorized", err)
	}
	if err := <-second; err != nil {
		t.Errorf("the Layer with the good source: %v", err)
	}
	mustRead(t, broken, f, 0, 100) // it's in the cache now
}

// TestDamagedOnTheWay: what arrives damaged is asked for once more, and is an
// IntegrityError when that is damaged, too.
func TestDamagedOnTheWay(t *testing.T) {
	f := newFixture(t, 1, 1_000_000, 20_000)
	const victim = 7
	var damage atomic.Int64
	src := &source{size: int64(len(f.blob)), open: func(_ context.Context, off, n int64) (io.ReadCloser, error) {
		b := bytes.Clone(f.blob[off : off+n])
		if at := f.chunks[victim].BlobOffset + 3 - off; at >= 0 && at < n && damage.Add(-1) >= 0 {
			b[at] ^= 0x40
		}
		return io.NopCloser(bytes.NewReader(b)), nil
	}}
	damage.Store(1)
	l := acquire(t, openCache(t, Options{}), f, src)
	mustRead(t, l, f, 0, 1_000_000)
	if n := l.cache.Stats().Corrupt; n != 1 {
		t.Errorf("counted %d damaged frames, want 1", n)
	}

	damage.Store(2)
	l = acquire(t, openCache(t, Options{}), f, src)
	err := checkRead(t.Context(), l, f, 0, 1_000_000)
	var ie *IntegrityError
	if !errors.As(err, &ie) || ie.Chunk != victim || ie.Key != l.dev.Key {
		t.Fatalf("error %v, want an IntegrityError of chunk %d", err, victim)
	}
	mustRead(t, l, f, f.chunks[victim+1].Offset, 1000) // the others came
	mustRead(t, l, f, f.chunks[victim].Offset, 1000)   // and the source has recovered
}

// TestSourceThatLies: content that a source sends wrong until it's told so is
// right in the end.
func TestSourceThatLies(t *testing.T) {
	f := newFixture(t, 1, 1_000_000, 20_000)
	src := &source{size: int64(len(f.blob)), open: func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
		if !blob.Doubted(ctx) {
			return io.NopCloser(bytes.NewReader(make([]byte, n))), nil
		}
		return io.NopCloser(bytes.NewReader(f.blob[off : off+n])), nil
	}}
	l := acquire(t, openCache(t, Options{}), f, blob.Retry(blob.Hedge(src, src, new(blob.Hedger)), blob.RetryOptions{}))
	mustRead(t, l, f, 0, 1_000_000)
}

// TestGarbage: a source that sends something else altogether costs two
// requests, not two per chunk.
func TestGarbage(t *testing.T) {
	f := newFixture(t, 1, 1_000_000, 20_000)
	var count blob.Counter
	src := &source{size: int64(len(f.blob)), open: func(_ context.Context, _, n int64) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(bytes.Repeat([]byte("<html>"), int(n/6+1))[:n])), nil
	}}
	l := acquire(t, openCache(t, Options{ReadAhead: -1}), f, blob.Count(src, &count))
	var ie *IntegrityError
	if err := checkRead(t.Context(), l, f, 0, 1_000_000); !errors.As(err, &ie) {
		t.Errorf("reading garbage: %v, want an IntegrityError", err)
	}
	if err := l.Fill(t.Context()); !errors.As(err, &ie) || l.Complete() {
		t.Errorf("filling with garbage: %v, want an IntegrityError", err)
	}
	if n := count.Requests.Load(); n != 4 {
		t.Errorf("%d requests, want 2 for reading and 2 for filling", n)
	}
}

func TestPutFrame(t *testing.T) {
	f := newFixture(t, 1, 1_000_000, 20_000)
	var count blob.Counter
	l := acquire(t, openCache(t, Options{ReadAhead: -1}), f, blob.Count(f.source(), &count))
	for i := range f.chunks {
		if i%2 == 0 {
			if err := l.PutFrame(t.Context(), i, f.frame(i)); err != nil {
				t.Fatal(err)
			}
			if !l.Has(i) {
				t.Fatalf("chunk %d was put and isn't there", i)
			}
		}
	}
	mustRead(t, l, f, f.chunks[4].Offset, int64(f.chunks[4].Length))
	if n := count.Requests.Load(); n != 0 {
		t.Errorf("%d requests for a chunk that was put, want none", n)
	}
	var ie *IntegrityError
	bad := bytes.Clone(f.frame(5))
	bad[9] ^= 1
	if err := l.PutFrame(t.Context(), 5, bad); !errors.As(err, &ie) {
		t.Errorf("putting a damaged frame: %v, want an IntegrityError", err)
	}
	if err := l.PutFrame(t.Context(), 5, f.frame(7)); !errors.As(err, &ie) || l.Has(5) {
		t.Errorf("putting another chunk's frame: %v, want an IntegrityError", err)
	}
	for _, i := range []int{-1, len(f.chunks)} {
		if err := l.PutFrame(t.Context(), i, nil); err == nil {
			t.Errorf("putting chunk %d of %d: no error", i, len(f.chunks))
		}
	}
	mustRead(t, l, f, 0, 1_000_000)
}

// TestPutServesWaiters: a frame from a boot pack wakes those who already asked
// the registry for it.
func TestPutServesWaiters(t *testing.T) {
	f := newFixture(t, 1, 100_000, 50_000)
	asked, open := make(chan int64, 100), make(chan struct{})
	defer close(open)
	l := acquire(t, openCache(t, Options{}), f, gate(f, asked, open))
	done := make(chan error, 1)
	go func() { done <- checkRead(t.Context(), l, f, 0, 100) }()
	<-asked
	if err := l.PutFrame(t.Context(), 0, f.frame(0)); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil { // ErrTimeout, if it waited for the registry
		t.Error(err)
	}
}

// TestLazyChunkTable: pages of the chunk table that can't be had are an error
// of the read that needs them, and are asked for again.
func TestLazyChunkTable(t *testing.T) {
	f := newFixture(t, 1, 14_000*20, 20) // enough chunks for a table that isn't fetched whole
	var gone atomic.Bool
	table, err := artifact.OpenTable(t.Context(), f.ref, &source{size: int64(len(f.table)),
		open: func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
			if gone.Load() {
				return nil, errUnreachable
			}
			return blob.FromBytes(f.table).ReadRange(ctx, off, n)
		}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := openCache(t, Options{}).Acquire(t.Context(), table.Devices[0], f.source(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	mustRead(t, l, f, 0, 100)
	gone.Store(true)
	if err := checkRead(t.Context(), l, f, 200_000, 100); !errors.Is(err, errUnreachable) {
		t.Errorf("a read that needs a page that can't be had: %v, want the table's error", err)
	}
	mustRead(t, l, f, 0, 100)
	gone.Store(false)
	mustRead(t, l, f, 0, l.Size())
}
