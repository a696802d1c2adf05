// Package blob reads ranges of immutable blobs: bytes that have a known size
// and never change, wherever they lie.
//
// Source is the one interface. FromRegistry, FromFile and FromBytes make one;
// Retry, Hedge, Limit and Count wrap any of them and are again a Source, so a
// node's usual chain is
//
//	src := Count(FromRegistry(reader, repo, desc), &counter)
//	Limit(Retry(Hedge(src, src, &hedger), RetryOptions{}), bandwidth)
//
// in which the counter sees every request, the one answer in a hundred that
// doesn't come is asked for again before anybody has lost patience, the retry
// resumes a stream where it broke, and time spent waiting for bandwidth is
// nobody's time-out.
//
// Nothing here verifies content: a part of a blob can't be checked against
// the blob's digest. Whoever reads a Source checks what it got (package
// artifact does, chunk by chunk). What is checked here is length: a Source
// yields exactly the bytes it was asked for, or an error that names the blob
// and the range.
//
// The conformance suite that every Source passes is blob/blobtest.
package blob

import (
	"context"
	"errors"
	"fmt"
	"io"

	"sluice/oci"
)

// Source is one immutable blob that can be read in ranges.
//
// Its methods may be called concurrently. The readers it returns belong to
// one goroutine each, except that Close may be called during a Read.
type Source interface {
	// Size is the blob's length in bytes, as its descriptor says. It costs
	// nothing.
	Size() int64

	// ReadRange opens n bytes from offset off on. The reader yields exactly n
	// bytes and then io.EOF, or an error: a stream that ends early is
	// io.ErrUnexpectedEOF, one that has more is oci.ErrSizeInvalid. A range
	// that isn't wholly inside the blob (also: a negative off or n) is
	// oci.ErrRangeInvalid, found without asking anybody. Errors are
	// *RangeErrors.
	//
	// ctx governs the call and the reader: when it is done, a blocked Read
	// returns soon. The reader must be closed; closing early is fine and
	// gives up the rest.
	ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error)
}

// RangeError says which bytes of which blob could not be read.
type RangeError struct {
	Blob   string // the digest, or the file's name; may be empty if the blob has none
	Offset int64  // of the range asked for
	Length int64  // of the range asked for
	Got    int64  // bytes that had arrived
	Err    error
}

// Error names the blob, the range, how far it got and the reason.
func (e *RangeError) Error() string {
	name := e.Blob
	if name == "" {
		name = "without a name"
	}
	if e.Got == 0 {
		return fmt.Sprintf("blob %s: %d bytes at offset %d: %v", name, e.Length, e.Offset, e.Err)
	}
	return fmt.Sprintf("blob %s: %d bytes at offset %d: after %d of them: %v", name, e.Length, e.Offset, e.Got, e.Err)
}

// Unwrap returns the reason.
func (e *RangeError) Unwrap() error { return e.Err }

// ReadFull fills p with the bytes of src that begin at off, and checks that
// the source considers its answer complete there too. Errors are those of
// Source.ReadRange; after one, p's content is undefined.
func ReadFull(ctx context.Context, src Source, p []byte, off int64) error {
	r, err := src.ReadRange(ctx, off, int64(len(p)))
	if err != nil {
		return err
	}
	defer r.Close()
	n, err := io.ReadFull(r, p)
	if err == nil {
		return expectEOF(r, off, int64(n))
	}
	var re *RangeError
	if errors.As(err, &re) {
		return err
	}
	// A Source that merely stops. Those of this package never do.
	return &RangeError{Offset: off, Length: int64(len(p)), Got: int64(n), Err: io.ErrUnexpectedEOF}
}

// expectEOF reads the end of a stream of which n bytes have been read: a
// source finds there that it was sent too much, and an HTTP connection can
// only be used again when its answer was read to the end.
func expectEOF(r io.Reader, off, n int64) error {
	var one [1]byte
	for range 100 { // a Reader may return 0, nil; not for ever
		m, err := r.Read(one[:])
		if m > 0 {
			return &RangeError{Offset: off, Length: n, Got: n + 1, Err: oci.ErrSizeInvalid.Withf("the source sent more than asked for")}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return &RangeError{Offset: off, Length: n, Got: n, Err: io.ErrNoProgress}
}

// checkRange returns a *RangeError that is oci.ErrRangeInvalid unless the
// range lies in a blob of the given size.
func checkRange(name string, size, off, n int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return &RangeError{Blob: name, Offset: off, Length: n, Err: oci.ErrRangeInvalid.Withf("outside the blob, which has %d bytes", size)}
	}
	return nil
}

// exactReader makes an untrusted stream yield exactly its length or an error.
// It belongs to one goroutine, except for Close.
type exactReader struct {
	ctx  func() error // the context's Err; a context itself may not outlive its call in a struct
	r    io.ReadCloser
	name string
	off  int64
	n    int64
	got  int64
}

func (e *exactReader) Read(p []byte) (int, error) {
	if err := e.ctx(); err != nil {
		return 0, e.fail(err)
	}
	if e.got == e.n {
		return 0, e.end()
	}
	if left := e.n - e.got; int64(len(p)) > left {
		p = p[:left]
	}
	n, err := e.r.Read(p)
	e.got += int64(n)
	switch {
	case err == nil:
		return n, nil
	case err == io.EOF && e.got == e.n:
		return n, io.EOF
	case err == io.EOF:
		return n, e.fail(io.ErrUnexpectedEOF)
	}
	return n, e.fail(err)
}

// end decides how a stream that has yielded everything ends.
func (e *exactReader) end() error {
	var one [1]byte
	for range 100 {
		n, err := e.r.Read(one[:])
		if n > 0 {
			return e.fail(oci.ErrSizeInvalid.Withf("the source sent more than asked for"))
		}
		if err == io.EOF {
			return io.EOF
		}
		if err != nil {
			return e.fail(err)
		}
	}
	return e.fail(io.ErrNoProgress)
}

func (e *exactReader) fail(err error) error {
	return &RangeError{Blob: e.name, Offset: e.off, Length: e.n, Got: e.got, Err: err}
}

func (e *exactReader) Close() error { return e.r.Close() }
