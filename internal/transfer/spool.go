package transfer

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

// openTar opens a tar whose content can be read from anywhere. What can't,
// because it is a pipe or compressed, is written to a temporary file first.
func openTar(ctx context.Context, name string) (*tarFiles, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	var magic [4]byte
	if info.Mode().IsRegular() {
		if _, err := f.ReadAt(magic[:], 0); err != nil && err != io.EOF {
			f.Close()
			return nil, err
		}
	}
	if info.Mode().IsRegular() && !isGzip(magic[:]) && !isZstd(magic[:]) {
		return tarOf(ctx, f)
	}
	defer f.Close()
	return spool(ctx, f)
}

// tarOf returns the files of a tar, which it closes when it fails.
func tarOf(ctx context.Context, f *os.File) (*tarFiles, error) {
	t, err := readTar(ctx, f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return t, nil
}

// spool writes a stream, unpacked, to a temporary file without a name, which is
// gone with the process.
func spool(ctx context.Context, r io.Reader) (*tarFiles, error) {
	buffered := bufio.NewReaderSize(r, 64<<10)
	magic, err := buffered.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case len(magic) == 0:
		return nil, errors.New("it is empty")
	case isZstd(magic):
		return nil, errors.New("it is compressed with zstd: decompress it first (zstd -d)")
	case isGzip(magic):
		z, err := gzip.NewReader(buffered)
		if err != nil {
			return nil, fmt.Errorf("decompressing it: %w", err)
		}
		r = z
	default:
		r = buffered
	}
	f, err := os.CreateTemp("", "sluice-import-")
	if err != nil {
		return nil, fmt.Errorf("%w: name another directory in the variable TMPDIR", err)
	}
	os.Remove(f.Name())
	if _, err := io.Copy(f, &checkedReader{r: r, err: ctx.Err}); err != nil {
		f.Close()
		return nil, fmt.Errorf("unpacking it to the directory of temporary files, which TMPDIR names: %w", err)
	}
	return tarOf(ctx, f)
}

// checkedReader ends with the error of a context.
type checkedReader struct {
	r   io.Reader
	err func() error
}

func (c *checkedReader) Read(p []byte) (int, error) {
	if err := c.err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

func isGzip(b []byte) bool { return bytes.HasPrefix(b, []byte{0x1f, 0x8b}) }

func isZstd(b []byte) bool { return bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}) }
