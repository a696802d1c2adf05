package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"

	"sluice/internal/layer"
	"sluice/oci"
)

// Layer is a converted layer: all that Build needs of it. It's a pure function
// of the layer's tar.
type Layer struct {
	DiffID oci.Digest
	Tree   *layer.Tree
	Tar    DeviceData
	Sparse *DeviceData // nil if the layer has no sparse members
}

// EncodeOptions are the options of EncodeLayer. The zero value has a use.
type EncodeOptions struct {
	// DiffID is what the image config says the layer's diff ID is. If it's set
	// and the tar has another one, nothing is committed and the error is a
	// *DiffIDError.
	DiffID oci.Digest

	// Workers is how many goroutines compress. Zero means as many as there are
	// processors.
	Workers int

	// Limits are those of reading the tar.
	Limits layer.Limits

	// Progress, if set, is called now and then with the number of bytes of the
	// tar that have been read. It's called from one goroutine at a time.
	Progress func(bytes int64)
}

// DiffIDError says that a layer isn't what the image's config says it is.
type DiffIDError struct {
	Want, Got oci.Digest
}

// Error names both digests.
func (e *DiffIDError) Error() string {
	return fmt.Sprintf("the tar's digest is %s, but the image config's diff ID is %s: the layer was altered after the config was made", e.Got, e.Want)
}

// EncodeLayer reads a layer's uncompressed tar to its end and writes its blobs
// to sink: the layer blob, and a sparse blob if the tar has sparse members.
// They are committed when all has been read and checked.
//
// Reading, hashing, parsing, compressing and writing overlap. The memory that
// takes doesn't depend on the tar's size: about 1 MiB per worker for chunks
// and 3 MiB for its encoder, 3 MiB for reading ahead; the Layer itself has 40
// bytes per chunk and the layer's tree. The blobs depend on the tar alone.
//
// A Read of tar must return soon when ctx is done: EncodeLayer waits for it.
func EncodeLayer(ctx context.Context, tar io.Reader, sink Sink, opts EncodeOptions) (*Layer, error) {
	if opts.DiffID != "" {
		if _, err := rawDigest(opts.DiffID); err != nil {
			return nil, fmt.Errorf("diff ID: %w", err)
		}
	}
	workers := opts.Workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	c, err := startCompressor(workers)
	if err != nil {
		return nil, err
	}
	defer c.stop()
	e := &encoder{c: c, sink: sink, fail: fail, opts: opts}
	l, err := e.encode(ctx, tar)
	if err != nil {
		e.abort()
		// Whoever notices a failure first sees a canceled context; the cause is
		// what to tell.
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, context.Canceled) {
			err = cause
		}
		return nil, err
	}
	return l, nil
}

// encoder is one run of EncodeLayer.
type encoder struct {
	c      *compressor
	sink   Sink
	fail   context.CancelCauseFunc
	opts   EncodeOptions
	tar    *deviceWriter
	sparse *sparseWriter
}

func (e *encoder) encode(ctx context.Context, tar io.Reader) (*Layer, error) {
	var err error
	if e.tar, err = newDeviceWriter(ctx, e.c, e.sink, MediaTypeLayer, e.fail); err != nil {
		return nil, err
	}
	e.sparse = &sparseWriter{ctx: ctx, e: e}
	ahead := newReadAhead(ctx, tar, e.opts.Progress)
	defer ahead.stop()
	cut := &cutter{src: ahead, cut: func(chunk []byte) error { return e.tar.cut(ctx, chunk) }}
	var announced error
	tree, err := layer.Read(ctx, cut, layer.Options{
		Sparse: e.sparse,
		Limits: e.opts.Limits,
		OnFile: func(_, content, size int64) {
			if err := cut.border(content, size); err != nil && announced == nil {
				announced = err
			}
		},
	})
	if err != nil {
		return nil, err
	}
	if announced != nil {
		return nil, announced
	}
	if err := cut.emit(true); err != nil {
		return nil, err
	}
	if err := e.sparse.flush(); err != nil {
		return nil, err
	}
	return e.commit(ctx, tree)
}

// commit commits the blobs if they are what they should be.
func (e *encoder) commit(ctx context.Context, tree *layer.Tree) (*Layer, error) {
	w := e.tar
	l := &Layer{Tree: tree, Tar: *w.finish()}
	e.tar = nil
	defer func() {
		if w != nil {
			w.blob.Cancel()
		}
	}()
	l.DiffID = l.Tar.DiffID
	if l.Tar.Size != tree.Size {
		return nil, fmt.Errorf("tar has %d bytes, its reader counted %d", l.Tar.Size, tree.Size)
	}
	if e.opts.DiffID != "" && l.DiffID != e.opts.DiffID {
		return nil, &DiffIDError{Want: e.opts.DiffID, Got: l.DiffID}
	}
	if s := e.sparse.device; s != nil {
		l.Sparse = s.finish()
		e.sparse.device = nil
		if l.Sparse.Size != tree.SparseSize {
			s.blob.Cancel()
			return nil, fmt.Errorf("sparse members have %d bytes, the tar's reader counted %d", l.Sparse.Size, tree.SparseSize)
		}
		if err := context.Cause(ctx); err != nil {
			s.blob.Cancel()
			return nil, err
		}
		if err := s.blob.Commit(ctx, l.Sparse.Blob.Digest); err != nil {
			return nil, fmt.Errorf("committing sparse blob %s: %w", l.Sparse.Blob.Digest, err)
		}
	}
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	committing := w.blob
	w = nil
	if err := committing.Commit(ctx, l.Tar.Blob.Digest); err != nil {
		return nil, fmt.Errorf("committing layer blob %s: %w", l.Tar.Blob.Digest, err)
	}
	return l, nil
}

// abort ends what encode left behind when it failed.
func (e *encoder) abort() {
	e.fail(context.Canceled)
	if e.tar != nil {
		e.tar.finish()
		e.tar.blob.Cancel()
	}
	if e.sparse != nil && e.sparse.device != nil {
		e.sparse.device.finish()
		e.sparse.device.blob.Cancel()
	}
}

// sparseWriter cuts the expanded content of sparse members, as it comes, into
// chunks of MaxChunkLength bytes. Its blob comes into being with the first byte.
type sparseWriter struct {
	ctx    context.Context // that of the one EncodeLayer call it lives in
	e      *encoder
	device *deviceWriter
	buf    []byte
}

// Write implements io.Writer for the tar's reader.
func (s *sparseWriter) Write(p []byte) (int, error) {
	n := len(p)
	if s.device == nil && n > 0 {
		d, err := newDeviceWriter(s.ctx, s.e.c, s.e.sink, MediaTypeSparse, s.e.fail)
		if err != nil {
			return 0, err
		}
		s.device, s.buf = d, make([]byte, 0, MaxChunkLength)
	}
	for len(p) > 0 {
		k := min(len(p), MaxChunkLength-len(s.buf))
		s.buf, p = append(s.buf, p[:k]...), p[k:]
		if len(s.buf) == MaxChunkLength {
			if err := s.flush(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

// flush cuts what is left.
func (s *sparseWriter) flush() error {
	if len(s.buf) == 0 {
		return nil
	}
	err := s.device.cut(s.ctx, s.buf)
	s.buf = s.buf[:0]
	return err
}
