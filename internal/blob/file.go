package blob

import (
	"bytes"
	"context"
	"io"
)

// FromFile returns the blob of the given size that r holds: a local file, one
// on a mounted share, or any io.ReaderAt. r stays the caller's, who closes it
// when no reader is in use any more. Errors name the file if r has a Name
// method, as *os.File has.
//
// A read from a local file can't be interrupted: the context is looked at
// between reads.
func FromFile(r io.ReaderAt, size int64) Source {
	s := &fileSource{r: r, size: size}
	if f, ok := r.(interface{ Name() string }); ok {
		s.name = f.Name()
	}
	return s
}

// FromBytes returns the blob that is content, which must not be changed
// afterwards.
func FromBytes(content []byte) Source {
	return &fileSource{r: bytes.NewReader(content), size: int64(len(content)), name: "in memory"}
}

type fileSource struct {
	r    io.ReaderAt
	size int64
	name string
}

func (s *fileSource) Size() int64 { return s.size }

func (s *fileSource) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if err := checkRange(s.name, s.size, off, n); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, &RangeError{Blob: s.name, Offset: off, Length: n, Err: err}
	}
	section := io.NopCloser(io.NewSectionReader(s.r, off, n))
	return &exactReader{ctx: ctx.Err, r: section, name: s.name, off: off, n: n}, nil
}
