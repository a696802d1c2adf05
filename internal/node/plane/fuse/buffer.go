package fuse

import (
	"sync"
	"sync/atomic"
)

// buffers are for replies with data, in three sizes: for a page fault EROFS asks
// for 64 KiB or less, reading ahead in a file for up to maxRead. They are pooled,
// so that memory follows the number of reads that are under way.
type buffers struct{ small, medium, large sync.Pool }

const (
	smallBuffer  = 64<<10 + outHeaderSize
	mediumBuffer = 256<<10 + outHeaderSize
	largeBuffer  = maxRead + outHeaderSize
)

func (b *buffers) pool(n int) (*sync.Pool, int) {
	switch {
	case n <= smallBuffer:
		return &b.small, smallBuffer
	case n <= mediumBuffer:
		return &b.medium, mediumBuffer
	default:
		return &b.large, largeBuffer
	}
}

// get returns a buffer of at least n ≤ largeBuffer bytes, with old content.
func (b *buffers) get(n int) *[]byte {
	pool, size := b.pool(n)
	if buf, ok := pool.Get().(*[]byte); ok {
		return buf
	}
	buf := make([]byte, size)
	return &buf
}

func (b *buffers) put(buf *[]byte) {
	pool, _ := b.pool(len(*buf))
	pool.Put(buf)
}

// Stats counts what the process that asks has served.
type Stats struct {
	Reads   int64 // READs answered with data
	Bytes   int64 // in them
	Failed  int64 // READs answered with EIO
	Waiting int64 // READs being answered now
}

type stats struct{ reads, bytes, failed, waiting atomic.Int64 }

func (s *stats) snapshot() Stats {
	return Stats{Reads: s.reads.Load(), Bytes: s.bytes.Load(), Failed: s.failed.Load(), Waiting: s.waiting.Load()}
}
