package cache

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/blob"
)

// TestStress reads random ranges in many goroutines through a source in which
// everything goes wrong now and then. Reads may fail; what they return is
// right. Meanwhile the cache's files are copied, as a kill -9 would leave them
// and as a disk may then damage them, and the copies are used as well.
func TestStress(t *testing.T) {
	f := newFixture(t, 1, 2_000_000, 10_000)
	dir := t.TempDir()
	c := openCache(t, Options{Dir: dir, FlushInterval: time.Millisecond, FaultTimeout: 20 * time.Second, ReadAhead: 100_000, MaxRequest: 50_000})
	patient := blob.RetryOptions{Attempts: 3, MinBackoff: time.Microsecond, MaxBackoff: 10 * time.Microsecond}
	var reads, failures atomic.Int64
	var wg sync.WaitGroup
	for i := range 8 {
		src := flaky(f, uint64(i))
		if i%2 == 0 {
			src = blob.Retry(src, patient)
		}
		l := acquire(t, c, f, src)
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 3))
			off := int64(0)
			for range 150 {
				n := rng.Int64N(60_000)
				if off += n; i%4 != 1 || off >= l.Size() { // every fourth one is sequential
					off = rng.Int64N(l.Size())
				}
				ctx, cancel := t.Context(), func() {}
				if rng.IntN(20) == 0 {
					ctx, cancel = context.WithTimeout(ctx, time.Duration(rng.IntN(1000))*time.Microsecond)
				}
				err := checkRead(ctx, l, f, off, n)
				cancel()
				reads.Add(1)
				if errors.Is(err, errWrongBytes) {
					t.Errorf("%d bytes at %d: %v", n, off, err)
					return
				}
				if err != nil {
					failures.Add(1)
				}
			}
		})
	}
	l := acquire(t, c, f, blob.Retry(flaky(f, 100), patient))
	ctx, cancel := context.WithCancel(t.Context())
	var crashes, filler sync.WaitGroup
	filler.Go(func() {
		for ctx.Err() == nil && !l.Complete() {
			if err := l.Fill(ctx); err != nil {
				time.Sleep(time.Millisecond)
			}
		}
	})
	crashes.Go(func() {
		for n := range 1000 {
			if n > 3 && ctx.Err() != nil {
				return
			}
			afterCrash(t, f, copyDir(t, dir), n)
		}
	})
	wg.Wait()
	cancel()
	filler.Wait()
	crashes.Wait()
	if failures.Load() == reads.Load() {
		t.Error("every read failed")
	}
	t.Logf("%d reads, %d failed; %+v", reads.Load(), failures.Load(), c.Stats())
}

// afterCrash uses a cache that a crash left, every other one with damage.
func afterCrash(t *testing.T, f *fixture, dir string, n int) {
	c, err := Open(t.Context(), Options{Dir: dir})
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	key := f.device(t).Key
	_, err = os.Stat(filepath.Join(c.dirOf(key), completeFile))
	if partial := err != nil; partial && n%2 == 1 {
		for _, name := range []string{dataFile, stateFile} {
			_ = flip(filepath.Join(c.dirOf(key), name), 0, n) // which may not be there yet
		}
	}
	l, err := c.Acquire(t.Context(), f.device(t), f.source(), nil)
	if err != nil {
		t.Error(err)
		return
	}
	defer l.Release()
	if err := checkRead(t.Context(), l, f, 0, l.Size()); err != nil {
		t.Errorf("after crash %d: %v", n, err)
	}
}
