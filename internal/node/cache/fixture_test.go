package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/oci"
)

// fixture is a device with real content: frames, their blob, and the chunk
// table that says so.
type fixture struct {
	content []byte
	padded  []byte // the device: content and zeros up to a multiple of 512
	blob    []byte
	chunks  []artifact.Chunk
	table   []byte
	ref     artifact.TableRef
}

// newFixture makes a device of size bytes in chunks of about chunkSize.
func newFixture(tb testing.TB, seed uint64, size, chunkSize int) *fixture {
	tb.Helper()
	rng := rand.New(rand.NewPCG(seed, 2))
	f := &fixture{content: make([]byte, size)}
	var word [8]byte
	for i := 0; i < size; i += len(word) { // compresses to about a half
		binary.LittleEndian.PutUint64(word[:], rng.Uint64()&0x0f0f0f0f0f0f0f0f)
		copy(f.content[i:], word[:])
	}
	f.padded = append(bytes.Clone(f.content), make([]byte, -len(f.content)&511)...)
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		tb.Fatal(err)
	}
	defer enc.Close()
	for off := 0; off < size; {
		n := min(1+chunkSize/2+rng.IntN(chunkSize), artifact.MaxChunkLength, size-off)
		frame := enc.EncodeAll(f.content[off:off+n], nil)
		f.chunks = append(f.chunks, artifact.Chunk{
			Offset: int64(off), Length: uint32(n),
			BlobOffset: int64(len(f.blob)), BlobLength: uint32(len(frame)), Digest: sha256.Sum256(frame),
		})
		f.blob = append(f.blob, frame...)
		off += n
	}
	f.encodeTable(sha256.Sum256(f.content), sha256.Sum256(f.blob))
	if size > 0 { // what decoders share must not belong to a bubble
		if _, err := f.chunks[0].Decode(nil, f.frame(0)); err != nil {
			tb.Fatal(err)
		}
	}
	return f
}

// encodeTable writes the chunk table as docs/format.md has it.
func (f *fixture) encodeTable(diffID, blobDigest [32]byte) {
	le := binary.LittleEndian
	var pages []byte
	for _, c := range f.chunks {
		pages = le.AppendUint32(pages, c.Length)
		pages = le.AppendUint32(pages, c.BlobLength)
		pages = append(pages, c.Digest[:]...)
	}
	const perPage, entry = artifact.ChunksPerPage, 40
	n := (len(f.chunks) + perPage - 1) / perPage
	rootSize := 16 + 88 + n*56
	root := append([]byte("SLUICECT"), 1, 0, 0, 0, 1, 0, 0, 0)
	root = append(root, diffID[:]...)
	root = append(root, blobDigest[:]...)
	var last artifact.Chunk
	if n := len(f.chunks); n > 0 {
		last = f.chunks[n-1]
	}
	root = le.AppendUint64(root, uint64(last.BlobOffset)+uint64(last.BlobLength))
	root = le.AppendUint64(root, uint64(last.Offset)+uint64(last.Length))
	root = le.AppendUint32(root, uint32(len(f.chunks)))
	root = le.AppendUint32(root, 0)
	for i := range n {
		page := pages[i*perPage*entry : min((i+1)*perPage*entry, len(pages))]
		digest := sha256.Sum256(page)
		root = append(root, digest[:]...)
		root = le.AppendUint64(root, uint64(f.chunks[i*perPage].Offset))
		root = le.AppendUint64(root, uint64(f.chunks[i*perPage].BlobOffset))
		root = le.AppendUint64(root, uint64(rootSize+i*perPage*entry))
	}
	f.table = append(root, pages...)
	f.ref = artifact.TableRef{
		Blob:       oci.Descriptor{Digest: oci.DigestOf(f.table), Size: int64(len(f.table))},
		RootDigest: oci.DigestOf(root), RootSize: int64(len(root)),
	}
}

// device opens the table: each call gives a Device of its own.
func (f *fixture) device(tb testing.TB) *artifact.Device {
	tb.Helper()
	table, err := artifact.OpenTable(tb.Context(), f.ref, blob.FromBytes(f.table))
	if err != nil {
		tb.Fatal(err)
	}
	return table.Devices[0]
}

func (f *fixture) source() blob.Source { return blob.FromBytes(f.blob) }

func (f *fixture) frame(i int) []byte {
	c := f.chunks[i]
	return f.blob[c.BlobOffset : c.BlobOffset+int64(c.BlobLength)]
}

// openCache opens a cache that is closed when the test ends.
func openCache(tb testing.TB, opts Options) *Cache {
	tb.Helper()
	if opts.Dir == "" {
		opts.Dir = tb.TempDir()
	}
	c, err := Open(tb.Context(), opts)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := c.Close(); err != nil {
			tb.Error(err)
		}
	})
	return c
}

// prune removes what nobody has acquired.
func prune(tb testing.TB, c *Cache) Pruned {
	tb.Helper()
	c.Settled(nil)
	p, err := c.Prune(tb.Context(), PruneOptions{})
	if err != nil {
		tb.Error(err)
	}
	return p
}

// acquire acquires a layer that is released when the test ends.
func acquire(tb testing.TB, c *Cache, f *fixture, src blob.Source) *Layer {
	tb.Helper()
	l, err := c.Acquire(tb.Context(), f.device(tb), src, nil)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(l.Release)
	return l
}

// mustRead reads a range and compares it.
func mustRead(tb testing.TB, l *Layer, f *fixture, off, n int64) {
	tb.Helper()
	if err := checkRead(tb.Context(), l, f, off, n); err != nil {
		tb.Fatal(err)
	}
}

var errWrongBytes = errors.New("WRONG BYTES")

func checkRead(ctx context.Context, l *Layer, f *fixture, off, n int64) error {
	p := make([]byte, n)
	for i := range p {
		p[i] = 0xee // so that what isn't written shows
	}
	got, err := l.ReadAt(ctx, p, off)
	if err != nil && !(err == io.EOF && off+n > l.Size()) {
		return err
	}
	want := f.padded
	want = want[min(off, int64(len(want))):min(off+n, int64(len(want)))]
	if got != len(want) || !bytes.Equal(p[:got], want) {
		return errWrongBytes
	}
	return nil
}

// source is a blob.Source whose behaviour a test decides.
type source struct {
	size int64
	open func(ctx context.Context, off, n int64) (io.ReadCloser, error)
}

func (s *source) Size() int64 { return s.size }

func (s *source) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	return s.open(ctx, off, n)
}

// flaky is a source in which everything goes wrong now and then.
func flaky(f *fixture, seed uint64) blob.Source {
	var n atomic.Uint64
	return &source{size: int64(len(f.blob)), open: func(ctx context.Context, off, length int64) (io.ReadCloser, error) {
		rng := rand.New(rand.NewPCG(seed, n.Add(1)))
		select {
		case <-time.After(time.Duration(rng.IntN(500)) * time.Microsecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		b := bytes.Clone(f.blob[off : off+length])
		switch rng.IntN(8) {
		case 0:
			return nil, errors.New("connection refused")
		case 1:
			b = b[:rng.IntN(len(b))]
		case 2:
			b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
		case 3: // another range
			copy(b, f.blob)
		case 4:
			b = append(b, "and more"...)
		}
		return io.NopCloser(&trickle{r: bytes.NewReader(b), rng: rng}), nil
	}}
}

// trickle yields pieces of random sizes, with pauses.
type trickle struct {
	r   io.Reader
	rng *rand.Rand
}

func (t *trickle) Read(p []byte) (int, error) {
	if t.rng.IntN(10) == 0 {
		time.Sleep(time.Duration(t.rng.IntN(200)) * time.Microsecond)
	}
	return t.r.Read(p[:min(len(p), 1+t.rng.IntN(20000))])
}

// gate is a source that lets requests through only when open is closed, and
// reports each on asked.
func gate(f *fixture, asked chan<- int64, open <-chan struct{}) blob.Source {
	return &source{size: int64(len(f.blob)), open: func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
		select {
		case asked <- off:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		select {
		case <-open:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return f.source().ReadRange(ctx, off, n)
	}}
}
