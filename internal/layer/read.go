package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strings"
)

// blockSize is tar's unit (POSIX pax, "ustar Interchange Format").
const blockSize = 512

// Read reads one uncompressed tar and returns its tree. Extents have Layer 0,
// meaning the tar itself (Sparse: what was written to opts.Sparse). Whiteouts
// are character devices 0:0 and Opaque directories; a name that is both a
// whiteout and an entry of this layer is the entry, and Opaque if that is a
// directory.
//
// The tar is read to the end of the stream, not only to the end of the archive,
// so that a digest taken of what passes covers everything. Reads are as small
// as tar's blocks: give it a reader for which that is cheap.
//
// Read keeps no file content. Memory is that of the tree. An error names the
// entry and its offset; it wraps ctx's error when that ended the reading.
func Read(ctx context.Context, r io.Reader, opts Options) (*Tree, error) {
	in := &counter{r: r, stop: ctx.Err}
	l := &reader{
		in:    in,
		tar:   tar.NewReader(in),
		opts:  opts,
		build: newBuilder(opts.Limits.withDefaults()),
	}
	l.sparse.w, l.sparse.limit = opts.Sparse, l.build.limits.Sparse
	entries := 0
	for header := int64(0); ; entries++ {
		h, err := l.tar.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) { // names are judged in cleanName
			return nil, fmt.Errorf("layer entry at offset %d (read up to %d): %w", header, in.n, unexpected(err))
		}
		next, err := l.entry(h, header)
		if err != nil {
			return nil, fmt.Errorf("layer entry %.200q at offset %d: %w", h.Name, header, err)
		}
		header = next
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return nil, fmt.Errorf("layer after the end of the archive, at offset %d: %w", in.n, err)
	}
	root := l.build.finish()
	return &Tree{Root: root, Size: in.n, SparseSize: l.sparse.n, Entries: entries}, nil
}

// reader is the state of one Read.
type reader struct {
	in     *counter
	tar    *tar.Reader
	opts   Options
	build  *builder
	sparse sparseWriter
}

// entry takes in one entry, whose first header block is at offset header, and
// returns the offset of the next one's.
func (l *reader) entry(h *tar.Header, header int64) (next int64, err error) {
	content := l.in.n
	if h.Typeflag == tar.TypeXGlobalHeader {
		// containerd applies none of these either; git writes one to keep
		// the commit's id.
		return alignUp(content), nil
	}
	if h.Size < 0 || h.Size > math.MaxInt64-content-blockSize {
		return 0, fmt.Errorf("size %d is impossible", h.Size)
	}
	n, err := newNode(h, l.build.limits)
	if err != nil {
		return 0, err
	}
	next = content
	if n != nil && n.Type() == TypeRegular {
		next, err = l.regular(n, h, header)
		if err != nil {
			return 0, err
		}
	}
	return alignUp(next), l.build.add(h, n)
}

// regular finds where the content of a regular file is, and returns where it
// ends in the tar.
func (l *reader) regular(n *Node, h *tar.Header, header int64) (end int64, err error) {
	content := l.in.n
	if isSparse(h) {
		if n.Extents, err = l.sparse.member(l.tar, h.Size); err != nil {
			return 0, err
		}
		return l.in.n, nil
	}
	if content%blockSize != 0 {
		return 0, fmt.Errorf("content at offset %d, which is not a multiple of %d", content, blockSize)
	}
	if l.opts.OnFile != nil {
		l.opts.OnFile(header, content, h.Size)
	}
	if h.Size > 0 {
		n.Extents = []Extent{{Offset: content, Length: h.Size}}
	}
	return content + h.Size, nil
}

// isSparse reports whether archive/tar may give the content of h other than
// byte by byte from the tar. It errs on the safe side: a file taken for sparse
// is copied, a sparse file taken for a plain one would be corrupt.
func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// counter knows how far the tar has been read, which is how the offset of a
// file's content is known: archive/tar reads headers block by block, never
// further. It must not implement io.Seeker, or archive/tar would skip content
// that whoever hashes the stream needs to see.
type counter struct {
	r    io.Reader
	n    int64
	stop func() error
}

func (c *counter) Read(p []byte) (int, error) {
	if err := c.stop(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

func alignUp(n int64) int64 { return (n + blockSize - 1) &^ (blockSize - 1) }

// cleanName returns the path that an entry's or a hard link's name means,
// relative to the root; "" is the root itself.
func cleanName(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", errors.New("name contains a NUL byte")
	}
	clean := path.Clean(strings.TrimLeft(name, "/"))
	switch {
	case clean == ".":
		return "", nil
	case clean == ".." || strings.HasPrefix(clean, "../"):
		return "", errors.New("name leads out of the layer's root")
	}
	return clean, nil
}
