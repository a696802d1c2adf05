package cache

import (
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"
)

// TestFillUsesTheBandwidth: undisturbed, over a way with 10 ms round trips, it
// takes little longer than the bytes do.
func TestFillUsesTheBandwidth(t *testing.T) {
	r := openRecording(t, "node.gz")
	for name, rate := range map[string]float64{"200 Mbit/s": 25e6, "1 Gbit/s": 125e6} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				src := &link{recording: r, trip: 10 * time.Millisecond, rate: rate}
				c, err := Open(t.Context(), Options{Dir: t.TempDir()})
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				l, err := c.Acquire(t.Context(), r.device(t), src, nil)
				if err != nil {
					t.Fatal(err)
				}
				defer l.Release()
				began := time.Now()
				var ie *IntegrityError // the content was made up
				if err := l.Fill(t.Context()); !errors.As(err, &ie) {
					t.Fatal(err)
				}
				took := time.Since(began)
				least := time.Duration(float64(src.Size()) / rate * float64(time.Second))
				t.Logf("%.1f MB in %d requests and %v: %.2f of the bandwidth",
					float64(src.bytes)/1e6, src.requests, took.Round(time.Millisecond), float64(least)/float64(took))
				if src.bytes != src.Size() {
					t.Errorf("fetched %d bytes of %d", src.bytes, src.Size())
				}
				if took > least*100/85 {
					t.Errorf("%v for what takes %v, want 0.85 of the bandwidth", took, least)
				}
			})
		})
	}
}

// TestFillGivesWay: a reader that comes while Fill is busy waits about a round
// trip and its own bytes, on a slow way too; and the layer gets complete
// though readers keep coming.
func TestFillGivesWay(t *testing.T) {
	r := openRecording(t, "node.gz")
	r.chunks = r.chunks[:100]
	r.encodeTable([32]byte{1}, [32]byte{2})
	synctest.Test(t, func(t *testing.T) {
		src := &link{recording: r, trip: 20 * time.Millisecond, rate: 1e6}
		c, err := Open(t.Context(), Options{Dir: t.TempDir(), ReadAhead: -1})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var m Meter
		l, err := c.Acquire(t.Context(), r.device(t), src, &m)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Release()
		filled := make(chan error, 1)
		go func() { filled <- l.Fill(t.Context()) }()
		rng := rand.New(rand.NewPCG(1, 1))
		var worst time.Duration
		for done := false; !done; {
			select {
			case err := <-filled: // complete, but not of the digest that was made up
				if err == nil {
					t.Error("no error from content that isn't the layer's")
				}
				done = true
			case <-time.After(time.Duration(rng.IntN(700)) * time.Millisecond):
				ch := r.chunks[len(r.chunks)-1-rng.IntN(len(r.chunks)/2)]
				began := time.Now()
				if _, err := l.ReadAt(t.Context(), make([]byte, 1), ch.Offset); err != nil {
					continue // quarantined
				}
				// A frame that is on the wire already comes first.
				own := time.Duration(float64(ch.BlobLength) / src.rate * float64(time.Second))
				worst = max(worst, time.Since(began)-src.trip-own)
			}
		}
		t.Logf("readers waited %v more than for themselves; %+v", worst, m.Read())
		if worst > 2*src.trip {
			t.Errorf("a reader waited %v for Fill, more than two round trips", worst)
		}
		if got := m.Read(); got.Bytes[Background] == 0 || got.Faults < 10 {
			t.Errorf("%d bytes filled, %d faults: that's no test", got.Bytes[Background], got.Faults)
		}
	})
}
