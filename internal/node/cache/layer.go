package cache

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sluice/internal/artifact"
	"sluice/internal/blob"
)

// Layer is an acquired layer: the device's content, whether it is there yet
// or not. Its methods may be called concurrently, Release last.
type Layer struct {
	cache   *Cache
	slot    *slot
	content *content
	dev     *artifact.Device
	src     blob.Source
	meter   *Meter

	// find and chunk ask dev without ever waiting: an error means that a page
	// of the chunk table isn't loaded.
	find  func(off int64) (int, error)
	chunk func(i int) (artifact.Chunk, error)

	filled atomic.Bool // Fill was called: it was not acquired to be read

	// mu guards what follows. It's a leaf lock.
	mu       sync.Mutex
	released bool
	cancels  map[int]context.CancelCauseFunc // of the work that runs
	serial   int
	running  sync.WaitGroup // that work; Release waits for it
}

func newLayer(ctx context.Context, c *Cache, s *slot, content *content, dev *artifact.Device, src blob.Source, meter *Meter) *Layer {
	if meter == nil {
		meter = &Meter{} // that nobody reads
	}
	// A device answers from what it has loaded whatever the context, and
	// can't load anything with one that is canceled.
	never, cancel := context.WithCancel(ctx)
	cancel()
	return &Layer{
		cache: c, slot: s, content: content, dev: dev, src: src, meter: meter,
		find:    func(off int64) (int, error) { return dev.Find(never, off) },
		chunk:   func(i int) (artifact.Chunk, error) { return dev.Chunk(never, i) },
		cancels: map[int]context.CancelCauseFunc{},
	}
}

// Size is the size of the device in bytes, a multiple of 512.
func (l *Layer) Size() int64 { return l.content.size }

// Complete reports whether all content is on disk, has been checked as a
// whole against the diff ID, and is recorded so.
func (l *Layer) Complete() bool { return l.content.complete.Load() }

// Path is the file with the device's content. Only when Complete it may be
// given to anybody, for reading, for as long as the Layer isn't released:
// before that, what hasn't been fetched reads as zeros.
func (l *Layer) Path() string { return filepath.Join(l.content.dir, dataFile) }

// Stored is how many bytes of disk the content has, about: Complete layers
// have all that isn't zero.
func (l *Layer) Stored() int64 { return l.content.stored.Load() }

// Has reports whether a chunk is there, so that a read of it wouldn't wait.
// Chunks that aren't the device's never are.
func (l *Layer) Has(chunk int) bool {
	return chunk >= 0 && chunk < l.content.count && l.content.chunks[chunk].Load()&(present|claimed) != 0
}

// ReadAt reads len(p) bytes of the device from off on, fetching what is
// missing: io.ReaderAt with a context. Only what has been verified is ever
// returned. It waits until the content has arrived, the context is done, or
// Options.FaultTimeout is over (ErrTimeout). A fetch that others wait for, too,
// isn't stopped by the context of the one who began it.
//
// After an error nothing is remembered against the content: the next ReadAt
// asks again. Errors are those of the source, of the chunk table, or an
// *IntegrityError.
//
// What is there is read without locks and without allocating.
func (l *Layer) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	size := l.content.size
	if off < 0 {
		return 0, fmt.Errorf("layer %s: read at %d: %w", l.dev.Key, off, unix.EINVAL)
	}
	if off >= size {
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > size-off {
		p = p[:size-off]
		end = io.EOF
	}
	if l.ready(ctx, off, int64(len(p))) && l.content.read(p, off) == nil {
		return len(p), end
	}
	n, err := l.fault(ctx, p, off)
	if err == nil {
		err = end
	}
	return n, err
}

// ready reports whether n bytes from off on may be read from the data file.
func (l *Layer) ready(ctx context.Context, off, n int64) bool {
	c := l.content
	if c.complete.Load() {
		return true
	}
	end := min(off+n, c.length)
	if off >= end {
		return true // only what is zero by definition
	}
	i, err := l.find(off)
	if err != nil {
		return false
	}
	for {
		bits := c.chunks[i].Load()
		if bits&present == 0 {
			return false
		}
		if bits&mark != 0 {
			l.noteRead(ctx, i)
		}
		ch, err := l.chunk(i)
		if err != nil {
			return false
		}
		if ch.Offset+int64(ch.Length) >= end {
			return true
		}
		i++
	}
}

// PutFrame takes chunk's zstd frame from another place than the layer's blob,
// such as a boot pack. It's verified like any other: an *IntegrityError means
// that it isn't the chunk's and was ignored. Any other error means that it
// could not be stored; reads that were waiting for it have been served.
// Acknowledged isn't durable, see Options.FlushInterval. A chunk that is there
// already isn't looked at.
func (l *Layer) PutFrame(ctx context.Context, chunk int, frame []byte) error {
	ctx, done, err := l.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	ch, err := l.dev.Chunk(ctx, chunk)
	if err != nil {
		return err
	}
	l.meter.arrived(BootPack, len(frame))
	if l.content.check(chunk, ch) {
		return nil
	}
	if err := l.content.deliver(chunk, ch, frame); err != nil {
		l.noteCorrupt(err)
		return err
	}
	return nil
}

// Release gives the layer up: it cancels its fetches and Fill, and waits for
// them to end; the last Layer of a key also makes new content durable. Other
// Layers of the key don't notice. Only the first call does anything.
func (l *Layer) Release() {
	l.mu.Lock()
	if l.released {
		l.mu.Unlock()
		return
	}
	l.released = true
	for _, cancel := range l.cancels {
		cancel(ErrClosed)
	}
	l.mu.Unlock()
	l.running.Wait()
	l.cache.release(l.slot, !l.filled.Load())
}

// begin registers work that Release has to stop and to wait for. The work
// ends with done. None begins after the cache was closed.
func (l *Layer) begin(ctx context.Context) (_ context.Context, done func(), _ error) {
	closed := l.cache.isClosed()
	l.mu.Lock()
	defer l.mu.Unlock()
	if closed || l.released {
		return nil, nil, fmt.Errorf("layer %s: %w", l.dev.Key, ErrClosed)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	id := l.serial
	l.serial++
	l.cancels[id] = cancel
	l.running.Add(1)
	return ctx, func() {
		l.mu.Lock()
		delete(l.cancels, id)
		l.mu.Unlock()
		cancel(nil)
		l.running.Done()
	}, nil
}
