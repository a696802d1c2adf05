package cache

import (
	"fmt"
	"testing"
)

func BenchmarkReadAtHit(b *testing.B) {
	f := newFixture(b, 1, 16<<20, 256<<10)
	for _, complete := range []bool{false, true} {
		l := acquire(b, openCache(b, Options{}), f, f.source())
		mustRead(b, l, f, 0, l.Size())
		if complete {
			if err := l.Fill(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		for _, n := range []int{4 << 10, 128 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("complete=%v/%dKiB", complete, n>>10), func(b *testing.B) {
				p := make([]byte, n)
				ctx := b.Context()
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					if _, err := l.ReadAt(ctx, p, int64(i)*4096%(15<<20)); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// TestReadAtHitAllocates guards what BenchmarkReadAtHit measures.
func TestReadAtHitAllocates(t *testing.T) {
	f := newFixture(t, 1, 1<<20, 64<<10)
	l := acquire(t, openCache(t, Options{}), f, f.source())
	mustRead(t, l, f, 0, l.Size())
	p := make([]byte, 128<<10)
	ctx := t.Context()
	if n := testing.AllocsPerRun(100, func() {
		if _, err := l.ReadAt(ctx, p, 100_000); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("reading what is there allocates %v times", n)
	}
}

// BenchmarkFault is a 4 KiB read of a chunk of about 256 KiB that isn't
// there, from a source that takes no time.
func BenchmarkFault(b *testing.B) {
	f := newFixture(b, 1, 64<<20, 256<<10)
	c := openCache(b, Options{ReadAhead: -1})
	l := acquire(b, c, f, f.source())
	p := make([]byte, 4096)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		k := i * 7 % len(f.chunks)
		l.content.chunks[k].Store(0)
		if _, err := l.ReadAt(b.Context(), p, f.chunks[k].Offset); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFill fetches a layer of 64 MiB from a source that takes no time,
// and checks it.
func BenchmarkFill(b *testing.B) {
	f := newFixture(b, 1, 64<<20, 256<<10)
	b.SetBytes(64 << 20)
	for b.Loop() {
		c := openCache(b, Options{})
		l := acquire(b, c, f, f.source())
		if err := l.Fill(b.Context()); err != nil {
			b.Fatal(err)
		}
		l.Release()
		prune(b, c)
	}
}
