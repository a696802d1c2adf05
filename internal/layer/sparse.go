package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
)

// Holes are looked for in runs of at least minGrain bytes: a page, and the
// smallest block of the file systems that made these files. In a file over
// minGrain*maxGrains = 1 GiB the grain doubles with the size up to maxGrain, so
// that a file that is nearly all hole doesn't cost more metadata than that.
const (
	minGrain  = 4 << 10
	maxGrain  = 1 << 20
	maxGrains = 1 << 18
)

// grainOf returns the run length for a file of the given size; every extent of
// the file but the last begins and ends on a multiple of it.
func grainOf(size int64) int64 {
	g := int64(minGrain)
	for g < size/maxGrains && g < maxGrain {
		g *= 2
	}
	return g
}

// sparseWriter lays the expanded content of sparse members into one stream.
type sparseWriter struct {
	w       io.Writer
	n       int64 // written, a multiple of blockSize
	logical int64 // expanded bytes seen
	limit   int64 // of logical
	buf     []byte
}

// member reads one sparse file of the given logical size from r, writes what
// isn't zero, and returns where it went.
func (s *sparseWriter) member(r io.Reader, size int64) ([]Extent, error) {
	if s.w == nil {
		return nil, errors.New("file is sparse and there is nowhere to expand it to")
	}
	if size > s.limit-s.logical {
		return nil, fmt.Errorf("sparse files expand to more than the limit of %d bytes", s.limit)
	}
	s.logical += size
	grain := grainOf(size)
	if int64(len(s.buf)) < grain {
		s.buf = make([]byte, max(grain, 64<<10))
	}
	batch := int64(len(s.buf)) // a multiple of grain, both being powers of two
	var extents []Extent
	for pos := int64(0); pos < size; {
		want := min(batch, size-pos)
		// A missing byte is the tar's end inside a file, which archive/tar reports.
		if _, err := io.ReadFull(r, s.buf[:want]); err != nil {
			return nil, fmt.Errorf("sparse file's content at %d of %d: %w", pos, size, unexpected(err))
		}
		for off := int64(0); off < want; off += grain {
			run := s.buf[off:min(off+grain, want)]
			if isZero(run) {
				continue
			}
			at := s.n
			if err := s.write(run); err != nil {
				return nil, err
			}
			extents = appendRun(extents, Extent{Sparse: true, Offset: at, Length: int64(len(run)), FileOffset: pos + off})
		}
		pos += want
	}
	// archive/tar finds data that no run of the map refers to only at the end.
	if n, err := r.Read(s.buf[:1]); n != 0 || err != io.EOF {
		return nil, fmt.Errorf("sparse file has more content than its map says: %w", unexpected(err))
	}
	return extents, nil
}

func (s *sparseWriter) write(p []byte) error {
	if _, err := s.w.Write(p); err != nil {
		return fmt.Errorf("write expanded content: %w", err)
	}
	s.n += int64(len(p))
	if pad := alignUp(s.n) - s.n; pad > 0 {
		if _, err := s.w.Write(make([]byte, pad)); err != nil {
			return fmt.Errorf("write expanded content: %w", err)
		}
		s.n += pad
	}
	return nil
}

// appendRun adds e, as a part of the last extent if it continues that.
func appendRun(extents []Extent, e Extent) []Extent {
	if len(extents) > 0 {
		last := &extents[len(extents)-1]
		if last.Offset+last.Length == e.Offset && last.FileOffset+last.Length == e.FileOffset {
			last.Length += e.Length
			return extents
		}
	}
	return append(extents, e)
}

// isZero reports whether p, which isn't empty, has only zeros: the first byte
// is one and each equals the one before it.
func isZero(p []byte) bool {
	return p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}
