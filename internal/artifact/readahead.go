package artifact

import (
	"context"
	"io"
)

// The blocks that a readAhead reads ahead, so that decompressing a layer
// overlaps with everything else.
const (
	aheadBlock  = 512 << 10
	aheadBlocks = 4
)

// readAhead reads from a reader on a goroutine of its own.
type readAhead struct {
	ctx      context.Context // that of the one EncodeLayer call it lives in
	full     chan aheadResult
	free     chan []byte
	ended    chan struct{} // closed when the goroutine has ended
	stopping chan struct{} // closed by stop

	// Of Read's goroutine.
	block []byte // the rest of it is to be returned
	whole []byte // the block that it's the rest of
	err   error
}

type aheadResult struct {
	block []byte
	err   error
}

// newReadAhead starts reading r. stop must be called.
func newReadAhead(ctx context.Context, r io.Reader, progress func(int64)) *readAhead {
	a := &readAhead{
		ctx: ctx, full: make(chan aheadResult, aheadBlocks), free: make(chan []byte, aheadBlocks),
		ended: make(chan struct{}), stopping: make(chan struct{}),
	}
	for range aheadBlocks {
		a.free <- nil
	}
	go a.run(r, progress)
	return a
}

func (a *readAhead) run(r io.Reader, progress func(int64)) {
	defer close(a.ended)
	var total int64
	for {
		var block []byte
		select {
		case block = <-a.free:
		case <-a.stopping:
			return
		}
		if block == nil {
			block = make([]byte, aheadBlock)
		}
		n, err := io.ReadFull(r, block[:aheadBlock])
		if err == io.ErrUnexpectedEOF {
			err = io.EOF
		}
		total += int64(n)
		if progress != nil && n > 0 {
			progress(total)
		}
		a.full <- aheadResult{block[:n], err} // has room for all blocks
		if err != nil {
			return
		}
	}
}

// Read implements io.Reader.
func (a *readAhead) Read(p []byte) (int, error) {
	for len(a.block) == 0 {
		if a.err != nil {
			return 0, a.err
		}
		if a.whole != nil {
			a.free <- a.whole
			a.whole = nil
		}
		select {
		case r := <-a.full:
			a.whole, a.block, a.err = r.block, r.block, r.err
		case <-a.ctx.Done():
			return 0, context.Cause(a.ctx)
		}
	}
	n := copy(p, a.block)
	a.block = a.block[n:]
	return n, nil
}

// stop waits for a read that is under way and ends the goroutine.
func (a *readAhead) stop() {
	close(a.stopping)
	<-a.ended
}
