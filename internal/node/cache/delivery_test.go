package cache

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"sluice/internal/blob"
)

// deliver puts chunks from r, in which their frames lie one after the other.
func deliver(ctx context.Context, l *Layer, f *fixture, r io.Reader, chunks []int) error {
	for _, i := range chunks {
		frame := make([]byte, f.chunks[i].BlobLength)
		if _, err := io.ReadFull(r, frame); err != nil {
			return err
		}
		if err := l.PutFrame(ctx, i, frame); err != nil {
			return err
		}
	}
	return nil
}

// pack returns the frames of chunks in a row, and where each begins.
func pack(f *fixture, chunks []int) (all []byte, at []int64) {
	for _, i := range chunks {
		at = append(at, int64(len(all)))
		all = append(all, f.frame(i)...)
	}
	return all, at
}

// TestDelivery: readers of what is being delivered wait for it, and get each
// chunk when it has come; nothing is fetched twice.
func TestDelivery(t *testing.T) {
	f := newFixture(t, 1, 1_000_000, 20_000)
	order := rand.New(rand.NewPCG(1, 1)).Perm(len(f.chunks))
	frames, at := pack(f, order)
	synctest.Test(t, func(t *testing.T) {
		var count blob.Counter
		l := acquire(t, openCache(t, Options{ReadAhead: -1}), f, blob.Count(f.source(), &count))
		d := l.cache.NewDelivery(time.Second)
		defer d.Close()
		l.Expect(d, append(order, -1, 1<<20), append(at, 0, 0))

		pr, pw := io.Pipe()
		put := make(chan error, 1)
		go func() { put <- deliver(t.Context(), l, f, d.Reader(pr), order) }()
		var wg sync.WaitGroup
		for i := range f.chunks {
			wg.Go(func() {
				if err := checkRead(t.Context(), l, f, f.chunks[i].Offset, int64(f.chunks[i].Length)); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait() // all of them wait
		for len(frames) > 0 {
			n := min(len(frames), 10_000)
			pw.Write(frames[:n])
			frames = frames[n:]
		}
		wg.Wait()
		if err := <-put; err != nil {
			t.Error(err)
		}
		if n := count.Requests.Load(); n != 0 {
			t.Errorf("%d requests for what was being delivered, want none", n)
		}
		if n := len(l.content.expected); n != 0 {
			t.Errorf("%d chunks are still expected", n)
		}
	})
}

// TestDeliveryFails: whatever becomes of a delivery, readers of what it
// doesn't bring fetch it soon, and get the right bytes.
func TestDeliveryFails(t *testing.T) {
	f := newFixture(t, 1, 200_000, 20_000)
	order := make([]int, len(f.chunks))
	for i := range order {
		order[i] = i
	}
	frames, at := pack(f, order)
	last := f.chunks[len(f.chunks)-1]
	for name, fail := range map[string]func(d *Delivery, l *Layer, pw *io.PipeWriter){
		"stalls": func(*Delivery, *Layer, *io.PipeWriter) {},
		"ends":   func(d *Delivery, _ *Layer, _ *io.PipeWriter) { d.Close() },
		"brings something else": func(_ *Delivery, l *Layer, pw *io.PipeWriter) {
			bad := bytes.Clone(frames[at[1]:])
			bad[len(bad)-5] ^= 1
			go pw.Write(bad)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var count blob.Counter
				l := acquire(t, openCache(t, Options{ReadAhead: -1}), f, blob.Count(f.source(), &count))
				d := l.cache.NewDelivery(time.Millisecond)
				defer d.Close()
				l.Expect(d, order, at)
				pr, pw := io.Pipe()
				put := make(chan error, 1)
				go func() { put <- deliver(t.Context(), l, f, d.Reader(pr), order) }()
				pw.Write(frames[:at[1]])
				read := make(chan error, 1)
				go func() { read <- checkRead(t.Context(), l, f, last.Offset, int64(last.Length)) }()
				synctest.Wait() // the reader waits
				began := time.Now()
				fail(d, l, pw)
				if err := <-read; err != nil {
					t.Error(err)
				}
				if waited := time.Since(began); waited > 0 && name != "stalls" || waited > minStall {
					t.Errorf("the reader waited another %v", waited)
				}
				if n := count.Requests.Load(); n != 1 {
					t.Errorf("%d requests, want 1", n)
				}
				pw.CloseWithError(io.ErrUnexpectedEOF)
				<-put
				if name == "stalls" { // and is waited for again once it goes on
					d.progress(1)
					if !d.worth(at[2]) {
						t.Error("a delivery that went on is not waited for")
					}
				}
			})
		})
	}
}

// TestDeliveryFailsOftener: a reader whom a delivery has let down fetches all
// that it lacks, however often the delivery goes on and stalls again.
func TestDeliveryFailsOftener(t *testing.T) {
	f := newFixture(t, 1, 200_000, 20_000)
	order := make([]int, len(f.chunks))
	for i := range order {
		order[i] = i
	}
	_, at := pack(f, order)
	synctest.Test(t, func(t *testing.T) {
		l := acquire(t, openCache(t, Options{}), f, f.source())
		d := l.cache.NewDelivery(time.Hour)
		defer d.Close()
		l.Expect(d, order, at)
		read := make(chan error, 1)
		go func() { read <- checkRead(t.Context(), l, f, 0, l.Size()) }()
		for range maxRounds {
			synctest.Wait()
			l.content.giveUp(d, false) // it goes on at once
		}
		if err := <-read; err != nil {
			t.Error(err)
		}
	})
}

// TestDeliveryTooFar: a reader doesn't wait for what comes long after what
// is being brought now.
func TestDeliveryTooFar(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := openCache(t, Options{}).NewDelivery(time.Millisecond)
		d.progress(1 << 20)
		time.Sleep(time.Second)
		if !d.worth(2 << 20) {
			t.Error("a chunk a second away isn't waited for")
		}
		if d.worth(10 << 20) {
			t.Error("a chunk nine seconds away is waited for")
		}
		d.Close()
		if d.worth(0) {
			t.Error("a chunk of a delivery that has ended is waited for")
		}
	})
}

// TestDeliveries runs deliveries that stall, break and send rubbish beside
// readers: no read fails, hangs, or returns wrong bytes.
func TestDeliveries(t *testing.T) {
	f := newFixture(t, 7, 300_000, 10_000)
	rapid.Check(t, func(rt *rapid.T) {
		c := openCache(t, Options{})
		seed := rapid.Uint64().Draw(rt, "source")
		src := &source{size: int64(len(f.blob)), open: func(_ context.Context, off, n int64) (io.ReadCloser, error) {
			return io.NopCloser(&trickle{r: bytes.NewReader(f.blob[off : off+n]), rng: rand.New(rand.NewPCG(seed, uint64(off)))}), nil
		}}
		l, err := c.Acquire(t.Context(), f.device(t), src, nil)
		if err != nil {
			rt.Fatal(err)
		}
		defer c.Close()
		defer l.Release()
		var wg sync.WaitGroup
		for range rapid.IntRange(1, 3).Draw(rt, "deliveries") {
			order := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "order"), 1)).Perm(len(f.chunks))
			frames, at := pack(f, order)
			cut := rapid.IntRange(0, len(frames)).Draw(rt, "cut")
			bad := rapid.IntRange(0, 2*len(frames)).Draw(rt, "damage")
			seed := rapid.Uint64().Draw(rt, "pace")
			if bad < len(frames) {
				frames[bad] ^= 0x10
			}
			wg.Go(func() {
				d := c.NewDelivery(0)
				d.patience = 100 * time.Microsecond
				defer d.Close()
				l.Expect(d, order, at)
				r := d.Reader(&trickle{r: bytes.NewReader(frames[:cut]), rng: rand.New(rand.NewPCG(seed, 3))})
				_ = deliver(t.Context(), l, f, r, order) // ends with the first damaged one
			})
		}
		for range 4 {
			seed := rapid.Uint64().Draw(rt, "reader")
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(seed, 4))
				for range 20 {
					off := rng.Int64N(l.Size())
					if err := checkRead(t.Context(), l, f, off, 1+rng.Int64N(30_000)); err != nil {
						t.Errorf("read at %d: %v", off, err)
					}
				}
			})
		}
		wg.Wait()
		l.content.mu.Lock()
		defer l.content.mu.Unlock()
		if len(l.content.expected) != 0 {
			rt.Errorf("%d chunks are expected from nobody", len(l.content.expected))
		}
	})
}

// TestFillLeavesDeliveries: Fill hardly asks while a delivery is on its way, and
// leaves alone what that brings.
func TestFillLeavesDeliveries(t *testing.T) {
	f := newFixture(t, 1, 200_000, 20_000)
	order := []int{0, 1, 2}
	frames, at := pack(f, order)
	synctest.Test(t, func(t *testing.T) {
		var count blob.Counter
		l := acquire(t, openCache(t, Options{}), f, blob.Count(f.source(), &count))
		d := l.cache.NewDelivery(time.Hour)
		l.Expect(d, order, at)
		filled := make(chan error, 1)
		go func() { filled <- l.Fill(t.Context()) }()
		time.Sleep(maxYield / 2)
		if n := count.Requests.Load(); n != 0 {
			t.Errorf("%d requests beside a delivery, want none", n)
		}
		if err := deliver(t.Context(), l, f, d.Reader(bytes.NewReader(frames)), order); err != nil {
			t.Fatal(err)
		}
		d.Close()
		d.Close() // which it may
		if err := <-filled; err != nil {
			t.Fatal(err)
		}
		if n := count.Bytes.Load(); n != int64(len(f.blob)-len(frames)) {
			t.Errorf("Fill fetched %d bytes, want %d", n, len(f.blob)-len(frames))
		}
	})
}

// TestFillAfterDelivery: what a delivery promised and didn't bring, Fill fetches.
func TestFillAfterDelivery(t *testing.T) {
	f := newFixture(t, 1, 200_000, 20_000)
	order := []int{0, 1, 2}
	_, at := pack(f, order)
	synctest.Test(t, func(t *testing.T) {
		l := acquire(t, openCache(t, Options{}), f, f.source())
		d := l.cache.NewDelivery(time.Hour)
		l.Expect(d, order, at)
		time.AfterFunc(5*maxYield, d.Close)
		if err := l.Fill(t.Context()); err != nil || !l.Complete() {
			t.Errorf("complete: %v, %v", l.Complete(), err)
		}
	})
}
