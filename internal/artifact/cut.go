package artifact

import (
	"fmt"
	"io"
)

// Where a tar is cut. A chunk is MaxChunkLength bytes long unless a file of at
// least borderFileSize bytes begins in it minChunkLength or more after the
// chunk did: then the chunk ends there. So the content of a large file is cut
// at the same places in whatever tar it is, and gives the same chunks, while
// small files share chunks, which compresses better and takes fewer requests.
//
// The numbers are part of the format: other numbers give other blobs for the
// same layer.
const (
	minChunkLength = 128 << 10
	borderFileSize = 128 << 10
)

// cutter passes a tar on to its reader and cuts what it has passed into chunks.
// The reader announces each file with border when exactly the bytes before the
// file's content have been read (layer.Options.OnFile), so the borders in what
// has been passed are known whenever the reader asks for more. All on one
// goroutine.
type cutter struct {
	src     io.Reader
	cut     func(chunk []byte) error
	buf     []byte  // passed, but not cut yet
	base    int64   // the tar's offset of buf[0]
	borders []int64 // beyond base, ascending
}

// Read implements io.Reader for the tar's reader.
func (c *cutter) Read(p []byte) (int, error) {
	if err := c.emit(false); err != nil {
		return 0, err
	}
	n, err := c.src.Read(p)
	c.buf = append(c.buf, p[:n]...)
	return n, err
}

// border tells the cutter of a regular file: the tar's offset of its content,
// and its size.
func (c *cutter) border(content, size int64) error {
	if content < c.base {
		return fmt.Errorf("tar's reader announced the file at %d when %d bytes had been cut already", content, c.base)
	}
	if size >= borderFileSize && content > c.base {
		c.borders = append(c.borders, content)
	}
	return nil
}

// emit cuts all chunks whose ends are certain; at the end of the tar, all.
func (c *cutter) emit(end bool) error {
	done := 0
	for {
		rest := c.buf[done:]
		if !end && len(rest) < MaxChunkLength || len(rest) == 0 {
			break
		}
		n := c.next(len(rest))
		if err := c.cut(rest[:n]); err != nil {
			return err
		}
		done += n
		c.base += int64(n)
		for len(c.borders) > 0 && c.borders[0] <= c.base {
			c.borders = c.borders[1:]
		}
	}
	if done > 0 {
		c.buf = c.buf[:copy(c.buf, c.buf[done:])]
	}
	return nil
}

// next returns the length of the chunk that begins at base, of which have bytes
// are there.
func (c *cutter) next(have int) int {
	for _, b := range c.borders {
		n := b - c.base
		if n > MaxChunkLength {
			break
		}
		if n >= minChunkLength && n < int64(have) {
			return int(n)
		}
	}
	return min(have, MaxChunkLength)
}
