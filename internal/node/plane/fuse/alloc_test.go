//go:build !race

package fuse

import (
	"context"
	"testing"

	"sluice/internal/node/plane"
)

// TestReadDoesNotAllocate: not under the race detector, which makes sync.Pool
// forget at random.
func TestReadDoesNotAllocate(t *testing.T) {
	s := deafServer(t)
	s.table.add(contentDevice(t, plane.Device{Name: "d", Size: 1 << 20, Content: zeros{}}))
	w := &worker{}
	req := readRequest(firstNode, 4096, 65536)
	if n := testing.AllocsPerRun(1000, func() { s.serve(w, req) }); n > 0 {
		t.Errorf("%v allocations per read", n)
	}
	if n := s.stats.reads.Load(); n < 1000 {
		t.Errorf("%d reads were answered", n)
	}
}

// zeros is content that looks at its context's deadline, as a cache hit may.
type zeros struct{}

func (zeros) ReadAt(ctx context.Context, p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), ctx.Err()
}
