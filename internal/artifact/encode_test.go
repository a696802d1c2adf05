package artifact

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"sluice/internal/blob"
	"sluice/oci"
)

// memSink keeps blobs in memory.
type memSink struct {
	mu        sync.Mutex // guards all below
	blobs     map[oci.Digest][]byte
	open      int // writers that are neither committed nor canceled
	failAfter int // bytes after which writes fail, if not zero
	failNext  bool
}

func newMemSink() *memSink { return &memSink{blobs: make(map[oci.Digest][]byte)} }

var errSink = errors.New("the disk is full")

func (s *memSink) Create(context.Context) (BlobWriter, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failNext {
		return nil, errSink
	}
	s.open++
	return &memWriter{s: s}, nil
}

func (s *memSink) source(d oci.Descriptor) blob.Source {
	s.mu.Lock()
	defer s.mu.Unlock()
	return blob.FromBytes(s.blobs[d.Digest])
}

type memWriter struct {
	s *memSink
	b bytes.Buffer
}

func (w *memWriter) Write(p []byte) (int, error) {
	if w.s.failAfter > 0 && w.b.Len()+len(p) > w.s.failAfter {
		return 0, errSink
	}
	return w.b.Write(p)
}

func (w *memWriter) Commit(_ context.Context, d oci.Digest) error {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.open--
	if got := oci.DigestOf(w.b.Bytes()); got != d {
		return fmt.Errorf("committed %s as %s", got, d)
	}
	w.s.blobs[d] = w.b.Bytes()
	return nil
}

func (w *memWriter) Cancel() {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.open--
}

// tarOf makes a tar of files of the given sizes, which are named by their index.
func tarOf(t testing.TB, sizes ...int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i, n := range sizes {
		h := &tar.Header{Name: fmt.Sprintf("dir/%d", i), Size: int64(n), Mode: 0o644, ModTime: time.Unix(1e9, 0)}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(words(uint64(n), n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func encode(t testing.TB, content []byte, sink Sink, opts EncodeOptions) *Layer {
	t.Helper()
	l, err := EncodeLayer(context.Background(), bytes.NewReader(content), sink, opts)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// mixed is a tar with files small and large, aligned and not.
func mixed(t testing.TB) []byte {
	return tarOf(t, 0, 1, 511, 512, 513, 100_000, 1<<20, 300_000, 5, 128<<10, 128<<10-1, 3_000_001, 12, 256<<10, 700_000, 9000)
}

func TestLayerBlobIsTheTar(t *testing.T) {
	for what, content := range map[string][]byte{
		"files":        mixed(t),
		"no files":     tarOf(t),
		"odd length":   append(tarOf(t, 1000), 0, 0, 0),
		"long padding": append(tarOf(t, 10), make([]byte, 3<<20)...),
	} {
		t.Run(what, func(t *testing.T) {
			sink := newMemSink()
			l := encode(t, content, sink, EncodeOptions{DiffID: oci.DigestOf(content)})
			if l.DiffID != oci.DigestOf(content) || l.Tar.Size != int64(len(content)) || l.Tree.Size != int64(len(content)) || l.Sparse != nil {
				t.Errorf("got %+v", l)
			}
			if sink.open != 0 || len(sink.blobs) != 1 {
				t.Errorf("%d blobs are open, %d there", sink.open, len(sink.blobs))
			}
			frames := sink.blobs[l.Tar.Blob.Digest]
			if int64(len(frames)) != l.Tar.Blob.Size {
				t.Errorf("blob has %d bytes, not %d", len(frames), l.Tar.Blob.Size)
			}
			// Any zstd decoder gives the tar.
			dec, err := zstd.NewReader(bytes.NewReader(frames))
			if err != nil {
				t.Fatal(err)
			}
			defer dec.Close()
			if got, err := io.ReadAll(dec); err != nil || !bytes.Equal(got, content) {
				t.Errorf("a streaming decoder gives %d bytes, %v", len(got), err)
			}
			// And so do the chunks one by one, in the chunk table.
			table, ref := encodedTable(t, &l.Tar)
			opened, err := OpenTable(t.Context(), ref, blob.FromBytes(table))
			if err != nil {
				t.Fatal(err)
			}
			d := opened.Devices[0]
			var got []byte
			for i := range d.Chunks {
				c, err := d.Chunk(t.Context(), i)
				if err != nil {
					t.Fatal(err)
				}
				data, err := c.Decode(nil, frames[c.BlobOffset:][:c.BlobLength])
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, data...)
			}
			if !bytes.Equal(got, content) {
				t.Errorf("the chunks give %d bytes", len(got))
			}
		})
	}
}

func TestZstdProgramDecodesTheLayerBlob(t *testing.T) {
	zstd := zstdProgram(t)
	content := mixed(t)
	sink := newMemSink()
	l := encode(t, content, sink, EncodeOptions{})
	cmd := exec.CommandContext(t.Context(), zstd, "-dc")
	cmd.Stdin = bytes.NewReader(sink.blobs[l.Tar.Blob.Digest])
	if got, err := cmd.Output(); err != nil || !bytes.Equal(got, content) {
		t.Errorf("zstd gives %d bytes, %v", len(got), err)
	}
}

// The blobs depend on the tar alone: not on the number of workers or
// processors, nor on how the tar arrives.
func TestEncodingIsDeterministic(t *testing.T) {
	content := mixed(t)
	want := encode(t, content, newMemSink(), EncodeOptions{Workers: 1})
	for _, procs := range []int{1, 2, 5} {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
		for what, r := range map[string]io.Reader{
			"at once":         bytes.NewReader(content),
			"half":            iotest.HalfReader(bytes.NewReader(content)),
			"EOF with data":   iotest.DataErrReader(bytes.NewReader(content)),
			"odd pieces":      &pieces{content, 7777},
			"through buffers": io.MultiReader(bytes.NewReader(content[:1_000_003]), bytes.NewReader(content[1_000_003:])),
		} {
			l, err := EncodeLayer(t.Context(), r, newMemSink(), EncodeOptions{Workers: procs})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want.Tar, l.Tar); diff != "" {
				t.Fatalf("%s, %d workers: %s", what, procs, diff)
			}
		}
	}
}

// pieces reads n bytes at a time.
type pieces struct {
	b []byte
	n int
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.b) == 0 {
		return 0, io.EOF
	}
	n := copy(b[:min(p.n, len(b))], p.b)
	p.b = p.b[n:]
	return n, nil
}

// A large file gives the same chunks in whatever tar it is, but for the first
// and last.
func TestEqualFilesGiveEqualChunks(t *testing.T) {
	digests := func(sizes ...int) map[string]bool {
		l := encode(t, tarOf(t, sizes...), newMemSink(), EncodeOptions{})
		all := make(map[string]bool)
		for e := l.Tar.Entries; len(e) > 0; e = e[chunkEntrySize:] {
			all[string(e[:chunkEntrySize])] = true
		}
		return all
	}
	const size = 2_000_000
	a, b := digests(200_000, size), digests(150_000, 7, 3000, 161_000, size)
	common := 0
	for d := range a {
		if b[d] {
			common++
		}
	}
	if want := size/MaxChunkLength - 1; common < want {
		t.Errorf("%d chunks are common, at least %d should be", common, want)
	}
}

func TestWrongDiffIDCommitsNothing(t *testing.T) {
	sink := newMemSink()
	_, err := EncodeLayer(t.Context(), bytes.NewReader(mixed(t)), sink, EncodeOptions{DiffID: oci.DigestOf([]byte("another"))})
	var wrong *DiffIDError
	if !errors.As(err, &wrong) || wrong.Got != oci.DigestOf(mixed(t)) || wrong.Want != oci.DigestOf([]byte("another")) {
		t.Errorf("got %v", err)
	}
	if len(sink.blobs) != 0 || sink.open != 0 {
		t.Errorf("%d blobs were committed, %d are open", len(sink.blobs), sink.open)
	}
}

// Whatever fails, the error is the one that matters, nothing is committed and
// nobody is left behind.
func TestEncodingFailsCleanly(t *testing.T) {
	content := mixed(t)
	for what, c := range map[string]struct {
		tar  io.Reader
		sink *memSink
		want string
	}{
		"sink is full":    {bytes.NewReader(content), &memSink{failAfter: 500_000}, errSink.Error()},
		"sink refuses":    {bytes.NewReader(content), &memSink{failNext: true}, errSink.Error()},
		"source breaks":   {io.MultiReader(bytes.NewReader(content[:2_000_000]), iotest.ErrReader(errors.New("cable cut"))), newMemSink(), "cable cut"},
		"tar is cut":      {bytes.NewReader(content[:2_000_000]), newMemSink(), "unexpected EOF"},
		"tar is none":     {strings.NewReader(strings.Repeat("<html>", 1000)), newMemSink(), "tar"},
		"tar is cut, odd": {bytes.NewReader(content[:2_000_100]), newMemSink(), "unexpected EOF"},
		"full at the end": {bytes.NewReader(content), &memSink{failAfter: 100}, errSink.Error()},
	} {
		t.Run(what, func(t *testing.T) {
			before := runtime.NumGoroutine()
			_, err := EncodeLayer(t.Context(), c.tar, c.sink, EncodeOptions{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if len(c.sink.blobs) != 0 || c.sink.open != 0 {
				t.Errorf("%d blobs were committed, %d are open", len(c.sink.blobs), c.sink.open)
			}
			// What context.AfterFunc and timers started may take a moment to end.
			for deadline := time.Now().Add(time.Minute); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%d goroutines before, %d after", before, runtime.NumGoroutine())
				}
			}
		})
	}
}

func TestDeviceHasALimit(t *testing.T) {
	c, err := startCompressor(1)
	if err != nil {
		t.Fatal(err)
	}
	defer c.stop()
	w, err := newDeviceWriter(t.Context(), c, newMemSink(), MediaTypeLayer, func(error) {})
	if err != nil {
		t.Fatal(err)
	}
	w.chunks = MaxChunks - 1
	if err := w.cut(t.Context(), []byte("the last one")); err != nil {
		t.Error(err)
	}
	if err := w.cut(t.Context(), []byte("one too many")); err == nil {
		t.Errorf("more than %d chunks were taken", MaxChunks)
	}
	if d := w.finish(); d.Chunks() != 1 {
		t.Errorf("%d chunks were written, want 1", d.Chunks())
	}
	w.blob.Cancel()
}

func TestEncodingStopsWithTheContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	_, err := EncodeLayer(ctx, &pieces{mixed(t), 10_000}, newMemSink(), EncodeOptions{Progress: func(int64) {
		if n++; n == 3 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// endlessTar is a tar of one file of any size, made as it's read.
func endlessTar(t testing.TB, size int64) io.Reader {
	t.Helper()
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(&tar.Header{Name: "big", Size: size, Mode: 0o644, Format: tar.FormatGNU}); err != nil {
		t.Fatal(err)
	}
	block := words(9, 1<<20)
	return io.MultiReader(&b, io.LimitReader(&repeat{block, 0}, size), bytes.NewReader(make([]byte, 1024)))
}

// repeat repeats a block for ever.
type repeat struct {
	block []byte
	at    int
}

func (r *repeat) Read(p []byte) (int, error) {
	n := copy(p, r.block[r.at:])
	r.at = (r.at + n) % len(r.block)
	return n, nil
}

// discard is a sink that counts.
type discard struct{ n int64 }

func (d *discard) Create(context.Context) (BlobWriter, error) { return d, nil }
func (d *discard) Write(p []byte) (int, error)                { d.n += int64(len(p)); return len(p), nil }
func (d *discard) Commit(context.Context, oci.Digest) error   { return nil }
func (d *discard) Cancel()                                    {}

// The memory that encoding takes doesn't grow with the layer.
func TestEncodingMemoryIsBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("encodes 96 MiB")
	}
	var peak uint64
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			peak = max(peak, m.HeapInuse)
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	_, err := EncodeLayer(t.Context(), endlessTar(t, 96<<20), &discard{}, EncodeOptions{})
	close(stop)
	<-ended
	if err != nil {
		t.Fatal(err)
	}
	if peak > 64<<20 {
		t.Errorf("the heap grew to %d MiB", peak>>20)
	}
	t.Logf("peak heap %d MiB", peak>>20)
}

// How to measure: go test -run '^$' -bench EncodeLayer -benchmem
// ./internal/artifact MB/s is of the uncompressed tar. docs/performance.md has
// the figures of a real image and how they were taken.
func BenchmarkEncodeLayer(b *testing.B) {
	content := tarOf(b, 3<<20, 100, 20_000, 5_000, 900_000, 12<<20, 64_000, 8_000, 2_000, 700_000, 4<<20)
	b.SetBytes(int64(len(content)))
	b.ReportAllocs()
	var blob int64
	for b.Loop() {
		blob = encode(b, content, &discard{}, EncodeOptions{}).Tar.Blob.Size
	}
	b.ReportMetric(float64(len(content))/float64(blob), "ratio")
}
