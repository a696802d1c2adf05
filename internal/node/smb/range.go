package smb

import (
	"context"
	"errors"
	"io"

	"sluice/internal/blob"
	"sluice/oci"
)

const (
	// partSize is how much is asked for at once, in bytes: no reader of blocks needs
	// two requests for one, and an answer is soon there.
	partSize = 512 << 10

	// ahead is how many parts of a range are under way: enough for a fast server, and
	// not so many that who needs a block now waits for them for long on a slow link.
	ahead = 4
)

// file is a Source that is a file of a share.
type file struct {
	client *Client
	path   string
	size   int64
	name   string
}

func (f *file) Size() int64 { return f.size }

func (f *file) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	r := &ranges{file: f, off: off, n: n}
	if off < 0 || n < 0 || off > f.size || n > f.size-off {
		return nil, r.fail(oci.ErrRangeInvalid.Withf("outside of %s, which has %d bytes", f.path, f.size))
	}
	if ctx.Err() != nil {
		return nil, r.fail(context.Cause(ctx))
	}
	if blob.Doubted(ctx) {
		f.client.forget(f.path) // what's there by that name now may be right
	}
	ctx, r.cancel = context.WithCancel(ctx)
	r.ended, r.cause = ctx.Done(), func() error { return context.Cause(ctx) }
	r.read = func(p []byte, off int64) error { return f.read(ctx, p, off) }
	if err := r.fill(); err != nil {
		r.cancel()
		return nil, r.fail(err)
	}
	return r, nil
}

// read fills p with what begins at off.
func (f *file) read(ctx context.Context, p []byte, off int64) error {
	read := func(_ *session, h *handle) error {
		if size := h.file.Size(); size != f.size {
			return oci.ErrSizeInvalid.Withf("%s has %d bytes on the file server, not %d: it was altered", f.path, size, f.size)
		}
		return h.read(p, off)
	}
	err := f.client.with(ctx, f.path, read)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = f.client.with(ctx, f.path, read) // opened anew, it says what size it has
	}
	return err
}

// forget has a file opened anew by its next reader.
func (c *Client) forget(path string) {
	c.mu.Lock()
	s := c.live
	c.mu.Unlock()
	if s != nil {
		s.forget(path)
	}
}

// part is a piece of a range.
type part struct {
	content []byte
	done    chan struct{} // closed when content, or err, is there
	err     error
}

// ranges reads a range, parts of it ahead. It belongs to one goroutine, except for
// Close.
type ranges struct {
	file  *file
	off   int64
	n     int64
	asked int64 // of n
	got   int64 // of n
	parts []*part
	rest  []byte // of the part that was there last
	err   error  // sticky

	// The stream's context, as what is done with it.
	cancel context.CancelFunc
	ended  <-chan struct{}
	cause  func() error
	read   func(p []byte, off int64) error
}

// fill asks for parts until enough are under way.
func (r *ranges) fill() error {
	for len(r.parts) < ahead && r.asked < r.n {
		p := &part{content: make([]byte, min(partSize, r.n-r.asked)), done: make(chan struct{})}
		off := r.off + r.asked
		if err := r.file.client.start(func() {
			defer close(p.done)
			p.err = r.read(p.content, off)
		}); err != nil {
			return err
		}
		r.asked += int64(len(p.content))
		r.parts = append(r.parts, p)
	}
	return nil
}

func (r *ranges) Read(p []byte) (int, error) {
	if r.err == nil && r.got < r.n {
		select {
		case <-r.ended: // also where there's something left
			r.err = r.fail(r.cause())
		default:
		}
	}
	for {
		switch {
		case r.err != nil:
			return 0, r.err
		case r.got == r.n:
			return 0, io.EOF
		case len(r.rest) > 0:
			n := copy(p, r.rest)
			r.rest = r.rest[n:]
			r.got += int64(n)
			return n, nil
		}
		if err := r.next(); err != nil {
			r.err = r.fail(err)
		}
	}
}

// next waits for the next part.
func (r *ranges) next() error {
	p := r.parts[0]
	select {
	case <-p.done:
	case <-r.ended:
		return r.cause()
	}
	if p.err != nil {
		return p.err
	}
	r.parts = r.parts[1:]
	r.rest = p.content
	return r.fill()
}

func (r *ranges) fail(err error) error {
	return &blob.RangeError{Blob: r.file.name, Offset: r.off, Length: r.n, Got: r.got, Err: err}
}

// Close gives up what hasn't been read.
func (r *ranges) Close() error {
	r.cancel()
	return nil
}
