package layer

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// maxWindow is the largest zstd window that is accepted: 128 MiB, what the
// zstd program itself decodes without being told otherwise (windowLog 27).
// It bounds the decoder's memory.
const maxWindow = 128 << 20

// Decompress returns the tar inside r, which is gzip (also of several members),
// zstd (also of several frames) or not compressed, as its first bytes say. It
// reads ahead of what it has returned. Memory is bounded whatever the stream
// says about itself; its decoded length is not, so the caller must bound that
// if it keeps the bytes. Errors name the compressed and the decoded offset.
// Close frees the decoder and leaves r alone.
func Decompress(r io.Reader) (io.ReadCloser, error) { return decompress(r, gunzipHere) }

// gunzipHere opens gzip in this process.
func gunzipHere(r io.Reader) (io.Reader, func() error, error) {
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, nil, fmt.Errorf("header: %w", unexpected(err))
	}
	return z, z.Close, nil
}

// decompress is Decompress with a decoder of gzip.
func decompress(r io.Reader, gunzip func(io.Reader) (io.Reader, func() error, error)) (io.ReadCloser, error) {
	in := &offsetReader{r: r}
	buf := bufio.NewReaderSize(in, 64<<10)
	head, err := buf.Peek(10)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read the first bytes of a layer: %w", err)
	}
	d := &decompressor{in: in, buf: buf}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b, 8}):
		d.format = "gzip"
		if d.dec, d.close, err = gunzip(buf); err != nil {
			return nil, fmt.Errorf("gzip layer: %w", err)
		}
	case isZstd(head):
		// One goroutine's worth: the caller decides what runs in parallel.
		z, err := zstd.NewReader(buf, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(maxWindow))
		if err != nil {
			return nil, fmt.Errorf("zstd layer: %w", unexpected(err))
		}
		d.format, d.dec, d.close = "zstd", z, func() error { z.Close(); return nil }
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		return nil, errors.New("layer is compressed with xz; only gzip, zstd and plain tar are defined for images")
	case len(head) == 10 && string(head[:3]) == "BZh" && string(head[4:]) == "1AY&SY":
		return nil, errors.New("layer is compressed with bzip2; only gzip, zstd and plain tar are defined for images")
	default:
		d.format, d.dec, d.close = "tar", buf, func() error { return nil }
	}
	return d, nil
}

// isZstd knows the magic of a frame and of the 16 skippable frames (RFC 8878
// section 3.1), with which a stream may begin.
func isZstd(head []byte) bool {
	return bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}) ||
		len(head) >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18})
}

// decompressor adds to a decoder's errors where they happened.
type decompressor struct {
	in     *offsetReader
	buf    *bufio.Reader
	dec    io.Reader
	format string
	out    int64
	close  func() error
}

func (d *decompressor) Read(p []byte) (int, error) {
	n, err := d.dec.Read(p)
	d.out += int64(n)
	if err == nil || err == io.EOF {
		return n, err
	}
	return n, fmt.Errorf("%s layer: at compressed offset %d, decoded offset %d: %w",
		d.format, d.in.n-int64(d.buf.Buffered()), d.out, unexpected(err))
}

func (d *decompressor) Close() error { return d.close() }

// unexpected makes an end that a decoder met inside its header the error that
// it is.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

type offsetReader struct {
	r io.Reader
	n int64
}

func (o *offsetReader) Read(p []byte) (int, error) {
	n, err := o.r.Read(p)
	o.n += int64(n)
	return n, err
}
