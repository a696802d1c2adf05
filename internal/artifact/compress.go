package artifact

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"sluice/oci"
)

// Sink is where an encoder's blobs go: a registry, a directory. Their digests are
// known only at their ends.
type Sink interface {
	// Create begins a blob. The context governs the writes as well.
	Create(ctx context.Context) (BlobWriter, error)
}

// BlobWriter is a blob on its way into a Sink. It's used by one goroutine at a
// time. Exactly one of Commit and Cancel ends it.
type BlobWriter interface {
	io.Writer

	// Commit makes the blob durable and visible under digest, the sha256
	// digest of what was written. A sink that has the blob already is content.
	Commit(ctx context.Context, digest oci.Digest) error

	// Cancel discards the blob.
	Cancel()
}

// newEncoder returns a zstd encoder for chunks. What it makes of a chunk
// depends on the chunk alone: EncodeAll forgets all it has seen before.
func newEncoder() (*zstd.Encoder, error) {
	return zstd.NewWriter(nil,
		zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderLevel(zstd.SpeedDefault),
		zstd.WithWindowSize(MaxChunkLength),
		zstd.WithSingleSegment(true), // no window beyond the chunk, content size in the header
		zstd.WithEncoderCRC(false))   // every frame has a SHA-256 in the chunk table
}

// compressor turns chunks into frames on several goroutines. Its jobs, of
// which there is a fixed number, bound its memory: about 512 KiB each.
type compressor struct {
	free chan *job // those that nobody uses; taking one is where a fast producer waits
	work chan *job // those to compress; has room for all
	wg   sync.WaitGroup
}

// job is a chunk on its way from cut to blob.
type job struct {
	data   []byte
	frame  []byte
	digest [sha256.Size]byte
	done   chan struct{} // gets a token when frame and digest are set
}

// startCompressor starts workers goroutines, which stop waits for.
func startCompressor(workers int) (*compressor, error) {
	jobs := 4*workers + 4
	c := &compressor{free: make(chan *job, jobs), work: make(chan *job, jobs)}
	for range jobs {
		c.free <- &job{done: make(chan struct{}, 1)} // buffers come with the first use
	}
	encoders := make([]*zstd.Encoder, workers)
	for i := range encoders {
		var err error
		if encoders[i], err = newEncoder(); err != nil {
			return nil, fmt.Errorf("zstd encoder: %w", err)
		}
	}
	for _, enc := range encoders {
		c.wg.Go(func() {
			for j := range c.work {
				if j.frame == nil {
					j.frame = make([]byte, 0, MaxFrameLength)
				}
				j.frame = enc.EncodeAll(j.data, j.frame[:0])
				j.digest = sha256.Sum256(j.frame)
				j.done <- struct{}{}
			}
		})
	}
	return c, nil
}

// stop ends the workers once they have done what was queued.
func (c *compressor) stop() {
	close(c.work)
	c.wg.Wait()
}

// deviceWriter writes one device: chunks go in at cut, in order, and their
// frames come out into a blob in the same order.
type deviceWriter struct {
	c         *compressor
	mediaType string
	blob      BlobWriter
	content   hash.Hash // of the decoded bytes
	size      int64     // of the decoded bytes
	chunks    int       // that were cut
	order     chan *job // as cut; has room for all jobs

	// fail stops the whole encoding when the sink fails.
	fail context.CancelCauseFunc

	// Of the writing goroutine until it has ended, which ended tells.
	ended    chan struct{}
	blobHash hash.Hash
	blobSize int64
	entries  []byte
}

// newDeviceWriter creates a blob in sink and starts the goroutine that writes
// it. finish or abort must be called, before the compressor is stopped.
func newDeviceWriter(ctx context.Context, c *compressor, sink Sink, mediaType string, fail context.CancelCauseFunc) (*deviceWriter, error) {
	b, err := sink.Create(ctx)
	if err != nil {
		return nil, fmt.Errorf("creating a blob: %w", err)
	}
	w := &deviceWriter{
		c: c, mediaType: mediaType, blob: b, content: sha256.New(), order: make(chan *job, cap(c.free)),
		fail: fail, ended: make(chan struct{}), blobHash: sha256.New(),
	}
	go w.write()
	return w, nil
}

// cut takes the device's next chunk, of 1 to MaxChunkLength bytes, which it
// copies. It waits while all jobs are in use.
func (w *deviceWriter) cut(ctx context.Context, data []byte) error {
	if w.chunks == MaxChunks {
		return fmt.Errorf("layer is too large: its first %d bytes have %d chunks, which is all that is allowed", w.size, w.chunks)
	}
	w.chunks++
	var j *job
	select {
	case j = <-w.c.free:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if j.data == nil {
		j.data = make([]byte, 0, MaxChunkLength)
	}
	j.data = append(j.data[:0], data...)
	w.content.Write(data)
	w.size += int64(len(data))
	w.order <- j
	w.c.work <- j
	return nil
}

// write writes the frames as they get ready, and gives the jobs back. After a
// failure of the sink it only gives back.
func (w *deviceWriter) write() {
	defer close(w.ended)
	failed := false
	for j := range w.order {
		<-j.done
		if !failed {
			w.blobHash.Write(j.frame)
			w.entries = appendChunkEntry(w.entries, Chunk{Length: uint32(len(j.data)), BlobLength: uint32(len(j.frame)), Digest: j.digest})
			w.blobSize += int64(len(j.frame))
			if _, err := w.blob.Write(j.frame); err != nil {
				w.fail(fmt.Errorf("writing a blob at %d: %w", w.blobSize-int64(len(j.frame)), err))
				failed = true
			}
		}
		w.c.free <- j
	}
}

// finish waits until all frames have been written and describes the device.
// The blob remains to be committed or canceled.
func (w *deviceWriter) finish() *DeviceData {
	close(w.order)
	<-w.ended
	return &DeviceData{
		DiffID:  digestOf(w.content),
		Size:    w.size,
		Blob:    oci.Descriptor{MediaType: w.mediaType, Digest: digestOf(w.blobHash), Size: w.blobSize},
		Entries: w.entries,
	}
}

// digestOf returns the sha256 digest that h has come to.
func digestOf(h hash.Hash) oci.Digest {
	return oci.Digest(fmt.Sprintf("sha256:%x", h.Sum(nil)))
}
