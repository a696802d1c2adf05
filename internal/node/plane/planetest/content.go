package planetest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Pattern is content without end that looks random and is computed from its
// offset: any range of any size can be checked without keeping it.
type Pattern uint64

// Fill writes the bytes from off on into p.
func (s Pattern) Fill(p []byte, off int64) {
	var word [8]byte
	for len(p) > 0 {
		binary.LittleEndian.PutUint64(word[:], s.word(uint64(off)/8))
		n := copy(p, word[off%8:])
		p, off = p[n:], off+int64(n)
		for len(p) >= 8 {
			binary.LittleEndian.PutUint64(p, s.word(uint64(off)/8))
			p, off = p[8:], off+8
		}
	}
}

// word is splitmix64. It is never zero's neighbour: a page of zeros, which is
// what a broken plane would show, doesn't occur.
func (s Pattern) word(i uint64) uint64 {
	z := uint64(s)*0x9e3779b97f4a7c15 + (i+1)*0xbf58476d1ce4e5b9
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// Differs returns the index of the first byte of p that is not the content's,
// -1 if there is none.
func (s Pattern) Differs(p []byte, off int64) int {
	var want [4096]byte
	for done := 0; done < len(p); {
		n := min(len(want), len(p)-done)
		s.Fill(want[:n], off+int64(done))
		if bytes.Equal(want[:n], p[done:done+n]) {
			done += n
			continue
		}
		for i, b := range want[:n] {
			if p[done+i] != b {
				return done + i
			}
		}
	}
	return -1
}

// ReadAt implements plane.Content.
func (s Pattern) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	s.Fill(p, off)
	return len(p), nil
}

// Content is a Pattern whose reads can be counted, delayed, failed and held up.
type Content struct {
	Pattern Pattern
	Delay   time.Duration // of each read

	Reads  atomic.Int64 // begun
	Active atomic.Int64 // begun and not ended
	Fail   atomic.Bool

	mu   sync.Mutex
	gate chan struct{} // closed: reads pass; nil: too
}

var errBroken = errors.New("content is broken for the test")

// Hold makes reads wait until the returned function is called.
func (c *Content) Hold() (release func()) {
	gate := make(chan struct{})
	c.mu.Lock()
	c.gate = gate
	c.mu.Unlock()
	return sync.OnceFunc(func() { close(gate) })
}

// ReadAt implements plane.Content.
func (c *Content) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	c.Reads.Add(1)
	c.Active.Add(1)
	defer c.Active.Add(-1)
	c.mu.Lock()
	gate := c.gate
	c.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return 0, fmt.Errorf("held: %w", ctx.Err())
		}
	}
	if c.Delay > 0 {
		select {
		case <-time.After(c.Delay):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	if c.Fail.Load() {
		return 0, errBroken
	}
	return c.Pattern.ReadAt(ctx, p, off)
}
