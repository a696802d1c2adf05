package cache

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestManyStartsFetchOnce: 50 containers of one image that start at once, each
// with a Layer of its own, fetch what one would.
func TestManyStartsFetchOnce(t *testing.T) {
	r := openRecording(t, "debian.gz")
	reads := r.starts["numpy"][:200]
	touched := r.touched(reads)
	fetched := func(t *testing.T, starts int) (n int64, took time.Duration) {
		synctest.Test(t, func(t *testing.T) {
			src := &link{recording: r, trip: 10 * time.Millisecond, rate: 25e6}
			c, err := Open(t.Context(), Options{Dir: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			dev := r.device(t)
			began := time.Now()
			var wg sync.WaitGroup
			for range starts {
				wg.Go(func() {
					l, err := c.Acquire(t.Context(), dev, src, nil)
					if err != nil {
						t.Error(err)
						return
					}
					replay(t, l, reads)
					time.Sleep(time.Minute) // for what is still being read ahead
					l.Release()
				})
			}
			wg.Wait()
			n, took = src.bytes, time.Since(began)-time.Minute
		})
		return n, took
	}
	one, oneTook := fetched(t, 1)
	all, allTook := fetched(t, 50)
	t.Logf("%.1f MB touched; one start fetches %.2f of that in %v, 50 at once %.2f in %v", float64(touched)/1e6,
		float64(one)/float64(touched), oneTook, float64(all)/float64(touched), allTook)
	if float64(all) > 1.1*float64(one) || allTook > oneTook*11/10 {
		t.Errorf("50 starts at once fetch %d bytes in %v, one %d in %v", all, allTook, one, oneTook)
	}
}
