package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
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
	l := acquire(t, openCache(t, Options{}), f, blob.Count(gate(f, asked, open), &count))
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
	l := acquire(t, openCache(t, Options{FaultTimeout: 10 * time.Second}), f, src)
	long := make(chan error, 1)
	go func() { long <- checkRead(t.Context(), l, f, 0, 1_000_000) }()
	for l.cache.Stats().Requests == 0 {
		time.Sleep(time.Millisecond)
	}
	began := time.Now()
	mustRead(t, l, f, 100, 1000)
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("the first chunk took %v while the rest of its request stalled", d)
	}
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
	if n := count.Requests.Load(); n > 15 {
		t.Errorf("%d requests for reading %d chunks in order, want at most 15", n, len(f.chunks))
	}
	if n := count.Bytes.Load(); n != int64(len(f.blob)) {
		t.Errorf("fetched %d bytes of a blob of %d", n, len(f.blob))
	}

	var random blob.Counter
	l = acquire(t, openCache(t, Options{}), f, blob.Count(f.source(), &random))
	for _, i := range rand.New(rand.NewPCG(4, 4)).Perm(len(f.chunks) / 10) {
		mustRead(t, l, f, f.chunks[i*10].Offset, 1)
	}
	if n, most := random.Bytes.Load(), int64(len(f.blob)/8); n > most {
		t.Errorf("reading every tenth chunk in random order fetched %d bytes of %d, want at most %d", n, len(f.blob), most)
	}
}

// TestCanceledReader: who began a fetch may leave, and those who joined it
// are served.
func TestCanceledReader(t *testing.T) {
	f := newFixture(t, 1, 100_000, 50_000)
	var count blob.Counter
	asked, open := make(chan int64, 100), make(chan struct{})
	l := acquire(t, openCache(t, Options{}), f, blob.Count(gate(f, asked, open), &count))
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
	f := newFixture(t, 1, 100_000, 50_000)
	asked := make(chan int64, 100)
	open := make(chan struct{})
	l := acquire(t, openCache(t, Options{FaultTimeout: 50 * time.Millisecond}), f, gate(f, asked, open))
	began := time.Now()
	err := checkRead(t.Context(), l, f, 0, 100)
	if !errors.Is(err, ErrTimeout) {
		t.Errorf("error %v, want ErrTimeout", err)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("took %v, want 50 ms", d)
	}
	close(open)
	mustRead(t, l, f, 0, 100) // the next read asks again
}

// TestOtherSource: a Layer whose source works doesn't suffer from another's
// that doesn't, though they share what is under way.
func TestOtherSource(t *testing.T) {
	f := newFixture(t, 1, 100_000, 50_000)
	c := openCache(t, Options{})
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

func TestPutFrame(t *testing.T) {
	f := newFixture(t, 1, 1_000_000, 20_000)
	var count blob.Counter
	l := acquire(t, openCache(t, Options{}), f, blob.Count(f.source(), &count))
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
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the reader still waits for the registry")
	}
}

func TestRelease(t *testing.T) {
	f := newFixture(t, 1, 100_000, 50_000)
	c := openCache(t, Options{})
	asked := make(chan int64, 100)
	l := acquire(t, c, f, gate(f, asked, nil))
	done := make(chan error, 1)
	go func() { done <- checkRead(t.Context(), l, f, 0, 100) }()
	<-asked
	began := time.Now()
	l.Release()
	l.Release()
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("Release took %v", d)
	}
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("a read that waits: %v, want ErrClosed", err)
	}
	if err := checkRead(t.Context(), l, f, 0, 100); !errors.Is(err, ErrClosed) {
		t.Errorf("a later read: %v, want ErrClosed", err)
	}
	if err := l.Fill(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("a later Fill: %v, want ErrClosed", err)
	}
	l = acquire(t, c, f, f.source())
	mustRead(t, l, f, 0, 100)
}

// TestAcquireReleaseRace opens, reads, releases and prunes one layer at the
// same time.
func TestAcquireReleaseRace(t *testing.T) {
	f := newFixture(t, 1, 200_000, 20_000)
	c := openCache(t, Options{FlushInterval: time.Millisecond})
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 7))
			for range 40 {
				l, err := c.Acquire(t.Context(), f.device(t), f.source())
				if err != nil {
					t.Error(err)
					return
				}
				if err := checkRead(t.Context(), l, f, rng.Int64N(190_000), 5000); err != nil {
					t.Error(err)
				}
				l.Release()
				if rng.IntN(3) == 0 {
					c.Prune()
				}
			}
		})
	}
	wg.Wait()
	c.Prune()
	if u := c.Usage(); u.Bytes != 0 || u.Layers != 0 || u.Acquired != 0 {
		t.Errorf("after Prune: %+v, want nothing", u)
	}
}

func TestEviction(t *testing.T) {
	c := openCache(t, Options{Quota: 7 << 19, FlushInterval: time.Hour})
	var fs []*fixture
	for i := range 4 {
		fs = append(fs, newFixture(t, uint64(i), 1<<20, 64<<10))
	}
	held := acquire(t, c, fs[0], fs[0].source()) // the oldest, but in use
	mustRead(t, held, fs[0], 0, 1<<20)
	for _, f := range fs[1:3] {
		l := acquire(t, c, f, f.source())
		if err := l.Fill(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.Release()
		time.Sleep(2 * time.Millisecond) // so that they differ in age
	}
	l := acquire(t, c, fs[3], fs[3].source())
	if err := l.Fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, want := range []bool{true, false, true, true} {
		_, err := os.Stat(c.dirOf(fs[i].device(t).Key))
		if (err == nil) != want {
			t.Errorf("layer %d in the cache: %v, want %v", i, err == nil, want)
		}
	}
	if u := c.Usage(); u.Bytes > u.Quota || u.Acquired != 2 {
		t.Errorf("usage %+v, want at most the quota and two acquired", u)
	}
	big := newFixture(t, 9, 2<<20, 64<<10)
	lb := acquire(t, c, big, big.source())
	if err := lb.Fill(t.Context()); !errors.Is(err, ErrQuota) {
		t.Errorf("filling beyond the quota: %v, want ErrQuota", err)
	}
	mustRead(t, lb, big, 0, 2<<20) // reading works all the same
	mustRead(t, held, fs[0], 0, 1<<20)
}

func TestOneProcessAtATime(t *testing.T) {
	c := openCache(t, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, Options{Dir: c.opts.Dir}); err == nil {
		t.Fatal("two caches have one directory")
	}
	go func() {
		time.Sleep(50 * time.Millisecond)
		c.Close()
	}()
	second, err := Open(t.Context(), Options{Dir: c.opts.Dir})
	if err != nil {
		t.Fatalf("opening while the first is closing: %v", err)
	}
	second.Close()
}

func TestAcquireChecks(t *testing.T) {
	f, other := newFixture(t, 1, 100_000, 20_000), newFixture(t, 2, 50_000, 20_000)
	c := openCache(t, Options{})
	if _, err := c.Acquire(t.Context(), f.device(t), other.source()); err == nil {
		t.Error("a source of another size was accepted")
	}
	for _, key := range []oci.Digest{"", "sha256:../../etc", "sha256:abc"} {
		d := *f.device(t)
		d.Key = key
		if _, err := c.Acquire(t.Context(), &d, f.source()); err == nil {
			t.Errorf("device key %q was accepted", key)
		}
	}
	for _, change := range []func(*artifact.Device){
		func(d *artifact.Device) { d.Size = -1 },
		func(d *artifact.Device) { d.Chunks = 1 << 30 },
		func(d *artifact.Device) { d.ContentSize = 1 << 60 },
		func(d *artifact.Device) { d.DiffID = "md5:00" },
	} {
		d := *f.device(t)
		change(&d)
		if _, err := c.Acquire(t.Context(), &d, f.source()); err == nil {
			t.Errorf("impossible device %+v was accepted", d)
		}
	}
	if entries, _ := os.ReadDir(c.opts.Dir); len(entries) != 1 { // the lock
		t.Errorf("refused devices left %v", entries)
	}
}

// TestFileModes: what is in layers is nobody else's business.
func TestFileModes(t *testing.T) {
	f := newFixture(t, 1, 100_000, 20_000)
	c := openCache(t, Options{})
	l := acquire(t, c, f, f.source())
	if err := l.Fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	var names []string
	err := filepath.WalkDir(c.opts.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if path != c.opts.Dir && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		if !d.IsDir() {
			names = append(names, d.Name())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	if want := []string{completeFile, dataFile, "lock", stateFile}; !slices.Equal(names, want) {
		t.Errorf("files %v, want %v", names, want)
	}
}
