package supply

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/node/plane"
)

// hung is content that never comes.
type hung struct{}

func (hung) ReadAt(ctx context.Context, _ []byte, _ int64) (int, error) {
	<-ctx.Done()
	return 0, ctx.Err()
}

// What has been waited for in vain is given only a moment when the kernel asks
// again by itself; other bytes, and a program that tries later, as long as ever.
func TestWaitedForInVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const patience = 8 * time.Second
		source, err := NewSource(plane.Device{Content: hung{}})
		if err != nil {
			t.Fatal(err)
		}
		d := New("name", 1<<20, true)
		d.Add(source)
		var r Reader
		for _, read := range []struct {
			off, n int64
			pause  time.Duration // before it
			want   time.Duration
		}{
			{0, 8192, 0, patience},
			{0, 4096, 0, shortWait},
			{4096, 8192, 0, shortWait},
			{8192, 4096, 0, patience}, // that short wait is no failure to remember
			{0, 4096, 0, patience},    // the first one is forgotten
			{0, 4096, patience / 10, shortWait},
			{0, 4096, patience / 8, patience},
		} {
			time.Sleep(read.pause)
			began := time.Now()
			if err := r.Read(t.Context(), Patience{Read: patience}, d, make([]byte, read.n), read.off); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%+v: got %v", read, err)
			}
			if took := time.Since(began); took != read.want {
				t.Errorf("%+v took %v", read, took)
			}
		}
	})
}
