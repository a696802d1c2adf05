package cache

import (
	"context"
	"io"
	"testing"
	"time"
)

// TestMeter: every byte that is fetched is counted once, by why; readers that
// wait are, those that don't aren't.
func TestMeter(t *testing.T) {
	f := newFixture(t, 1, 4<<20, 64<<10)
	c := openCache(t, Options{})
	var m, other Meter
	const slow = 30 * time.Millisecond
	src := &source{size: int64(len(f.blob)), open: func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
		time.Sleep(slow)
		return f.source().ReadRange(ctx, off, n)
	}}
	acquired := func(m *Meter) *Layer {
		l, err := c.Acquire(t.Context(), f.device(t), src, m)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(l.Release)
		return l
	}
	l, idle := acquired(&m), acquired(&other)

	last := len(f.chunks) - 1
	if err := l.PutFrame(t.Context(), last, f.frame(last)); err != nil {
		t.Fatal(err)
	}
	mustRead(t, l, f, f.chunks[last].Offset, 100) // is there
	mustRead(t, l, f, 0, 100)
	mustRead(t, l, f, 0, 100)
	got := m.Read()
	if got.Faults != 1 || got.Failures != 0 || got.Wait < slow {
		t.Errorf("%d faults, %d failures, %v of waiting; want 1, none, at least %v", got.Faults, got.Failures, got.Wait, slow)
	}
	for i, bound := range LatencyBounds() {
		if bound < slow && got.Latency[i] != 0 {
			t.Errorf("%d waits of at most %v, but the source takes %v", got.Latency[i], bound, slow)
		}
	}
	want := [origins]int64{Fault: int64(f.chunks[0].BlobLength), BootPack: int64(f.chunks[last].BlobLength)}
	got.Bytes[ReadAhead] = 0 // what may follow
	if got.Bytes != want {
		t.Errorf("bytes by origin: %v, want %v", got.Bytes, want)
	}

	for off := int64(0); off < 1<<20; off += 4096 { // in order, so that some are read ahead
		mustRead(t, l, f, off, 4096)
	}
	if m.Read().Bytes[ReadAhead] == 0 {
		t.Error("nothing counts as read ahead")
	}
	c.traffic.yield(t.Context()) // to what is still read ahead
	if err := l.Fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	var sum, waits int64
	got = m.Read()
	for _, n := range got.Bytes {
		sum += n
	}
	if sum != int64(len(f.blob)) || got.Bytes[Background] == 0 {
		t.Errorf("%v bytes by origin, want %d together", got.Bytes, len(f.blob))
	}
	for _, n := range got.Latency {
		waits += n
	}
	if waits != got.Faults {
		t.Errorf("the histogram has %d waits, there were %d faults", waits, got.Faults)
	}
	mustRead(t, idle, f, 0, l.Size())
	if got := other.Read(); got != (Metered{}) {
		t.Errorf("the other meter counted %+v", got)
	}
}

// TestMeterFailures: a read that fails is counted, by the meter of its Layer.
func TestMeterFailures(t *testing.T) {
	f := newFixture(t, 1, 100_000, 50_000)
	var m Meter
	l, err := openCache(t, Options{}).Acquire(t.Context(), f.device(t), &source{size: int64(len(f.blob)),
		open: func(context.Context, int64, int64) (io.ReadCloser, error) { return nil, errUnreachable }}, &m)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	if _, err := l.ReadAt(t.Context(), make([]byte, 10), 0); err == nil {
		t.Fatal("no error without a source")
	}
	if got := m.Read(); got.Failures != 1 || got.Faults != 1 || got.Bytes != [origins]int64{} {
		t.Errorf("counted %+v, want one fault that failed", got)
	}
}

// TestLatencyBounds: a wait is counted at the first bound that it's not above.
func TestLatencyBounds(t *testing.T) {
	bounds := LatencyBounds()
	for i, b := range bounds {
		var m Meter
		m.waited(b)
		m.waited(b + 1)
		if got := m.Read(); got.Latency[i] != 1 || got.Latency[i+1] != 1 {
			t.Errorf("waits of %v and a bit more: %v", b, got.Latency)
		}
		if i > 0 && b <= bounds[i-1] {
			t.Errorf("bound %v follows %v", b, bounds[i-1])
		}
	}
}
