package cache

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"sluice/internal/artifact"
	"sluice/internal/durable"
)

// What is known of a chunk; bits of content.chunks[i].
const (
	// present: in data, written by this process or checked by it, so that it
	// may be served. Implies that the page cache has it, not the disk.
	present = 1 << iota

	// claimed: the state file says that data has it. It becomes present when
	// its CRC has been checked.
	claimed

	// mark: it came before anybody asked for it. Whoever reads it first tells
	// read-ahead. guessed: besides, it was read-ahead that fetched it.
	mark
	guessed
)

// content is the cached bytes of one device, shared by all Layers of its key.
//
// A chunk's way to disk: verified against the chunk table, written to data,
// present in chunks (now everybody is served from the page cache); later, in
// flush: fdatasync of data, its entry in state, fdatasync of state. So state
// is never ahead of what the disk holds, and a chunk that a crash of the
// machine catches between is fetched again. What a crash of the process
// catches is known from the file recent.
//
// That leaves one gap which is any local file system's: if the disk fails to
// write a page back, and the kernel drops the page before the next flush, at
// most Options.FlushInterval later, notices, a read between may see a hole.
// Being out of space can't do that: it's found when writing.
type content struct {
	shape
	environment
	dir string

	// The files, set before homeless turns false, and not changed later.
	data   *os.File
	state  *os.File
	recent *os.File // nil: nothing is recorded before it is on disk

	// homeless: the files couldn't be made yet. Content is served from memory
	// until they can be.
	homeless atomic.Bool

	// chunks has a chunk's bits, crcs the CRC-32C of its decoded bytes, valid
	// while it is present or claimed. Written before the bit is set.
	chunks []atomic.Uint32
	crcs   []atomic.Uint32

	stored   atomic.Int64 // decoded bytes of chunks in data, about
	complete atomic.Bool  // checked as a whole, and recorded so
	failing  atomic.Bool  // the last write didn't succeed
	bad      atomic.Pointer[IntegrityError]

	// mu guards what follows. Nothing blocks while it is held.
	mu       sync.Mutex
	flights  map[int]*flight  // chunks on their way, or arrived and not in data
	unstored []*flight        // those of flights that couldn't be written, oldest first
	expected map[int]expected // chunks that a Delivery will bring
	ahead    foresight
	pending  []int // present, not yet in state
	unsynced int64 // decoded bytes of pending

	// flushing serialises flush and close. Taken before mu.
	flushing sync.Mutex
	closed   bool          // guarded by flushing
	named    bool          // guarded by flushing: the files' names are on disk
	tried    time.Time     // guarded by flushing: when the files were last tried to be made
	filling  chan struct{} // holds a token while nobody fills

	damage rate.Sometimes // keeps a disk or a source that is broken from filling the log
}

// environment is what a content has from its Cache.
type environment struct {
	buffers *buffers
	stats   *stats
	log     *slog.Logger
	boot    string // see bootID

	dirtied     func()          // asks for a flush in a while
	wake        func(full bool) // asks for a flush now, or for room
	writeErrors *rate.Sometimes // of the whole cache: it has one disk
}

// homeInterval is how often a layer that has no files tries to make them.
const homeInterval = time.Second

// maxUnstored bounds the chunks of a layer that stay in memory because the
// disk doesn't take them.
const maxUnstored = 8

// openContent opens or makes the files of a layer in dir. Files that aren't
// right are removed and made anew.
func openContent(dir string, s shape, env environment) (*content, error) {
	c := &content{
		shape: s, dir: dir, environment: env,
		chunks:  make([]atomic.Uint32, s.count),
		crcs:    make([]atomic.Uint32, s.count),
		flights: map[int]*flight{},
		filling: make(chan struct{}, 1),
		damage:  rate.Sometimes{First: 5, Interval: logInterval},
	}
	c.filling <- struct{}{}
	if reason, err := os.ReadFile(filepath.Join(dir, quarantineFile)); err == nil {
		return nil, &IntegrityError{Key: s.key, Chunk: -1, Err: fmt.Errorf("quarantined earlier: %s", reason)}
	}
	err := c.open()
	if err != nil && !passing(err) {
		if !errors.Is(err, os.ErrNotExist) {
			c.log.Warn("discarding a cached layer whose files are damaged", "dir", dir, "error", err)
		}
		c.closeFiles()
		c.homeless.Store(true)
		// A disk that doesn't take the layer only costs speed.
		if c.provide() != nil {
			return c, nil
		}
		err = nil
	}
	if err != nil {
		c.closeFiles()
		return nil, fmt.Errorf("cache of layer %s: %w", s.key, err)
	}
	c.openRecent()
	if len(c.pending) > 0 {
		c.dirtied()
	}
	return c, nil
}

// provide makes the files of a layer that has none, if it's time to try. They
// have no file recent then, which only costs.
func (c *content) provide() error {
	c.flushing.Lock()
	defer c.flushing.Unlock()
	if !c.homeless.Load() {
		return nil
	}
	if c.closed {
		return os.ErrClosed
	}
	if time.Since(c.tried) < homeInterval {
		return errHomeless
	}
	c.tried = time.Now()
	if err := c.create(); err != nil {
		c.closeFiles()
		c.failed(err)
		return err
	}
	c.homeless.Store(false)
	return nil
}

// errHomeless is the error of writing what has no file to be written to.
var errHomeless = errors.New("the layer's files can't be made")

// failed takes note that the disk did not take something.
func (c *content) failed(err error) {
	c.stats.writeErrors.Add(1)
	c.failing.Store(true)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		c.wake(true)
	}
	c.writeErrors.Do(func() {
		c.log.Warn("cannot write to the cache; content is served from memory and fetched again when needed", "error", err)
	})
}

func (c *content) has(i int) bool { return c.chunks[i].Load()&present != 0 }

// check makes a claimed chunk present if the data fits what is recorded of
// it, and otherwise forgets it. It reports whether the chunk is present.
func (c *content) check(i int, ch artifact.Chunk) bool {
	bits := c.chunks[i].Load()
	if bits&present != 0 || bits&claimed == 0 {
		return bits&present != 0
	}
	buf := c.buffers.get()
	defer buf.release()
	b := buf.b[:ch.Length]
	_, err := c.data.ReadAt(b, ch.Offset)
	if err == nil && crc32.Checksum(b, castagnoli) == c.crcs[i].Load() {
		c.chunks[i].Or(present)
		return true
	}
	c.distrust(i, err)
	return false
}

// distrust forgets chunk i, which is not on disk as it was written.
func (c *content) distrust(i int, err error) {
	if errors.Is(err, os.ErrClosed) {
		return // nothing is wrong with the disk
	}
	c.checkSize()
	c.damage.Do(func() {
		c.log.Warn("a cached chunk is damaged on disk; it will be fetched again", "chunk", i, "error", err)
	})
	c.chunks[i].And(mark | guessed)
	if c.complete.CompareAndSwap(true, false) {
		if err := durable.Remove(filepath.Join(c.dir, completeFile)); err != nil {
			c.log.Error("cannot take back that a layer is complete", "error", err)
		}
	}
}

// read is pread, all of p or an error. What is read is the layer's content as
// long as no error is returned and the chunks were present before.
func (c *content) read(p []byte, off int64) error {
	n, err := c.data.ReadAt(p, off)
	if bad := c.bad.Load(); bad != nil {
		return bad
	}
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// put takes a frame of chunk i from wherever it came: verifies and decodes
// it, hands the bytes to those who wait for them, then writes them. An
// IntegrityError means that the frame is not the chunk's. Any other error is
// of writing; waiters have been served all the same.
func (c *content) put(i int, ch artifact.Chunk, frame []byte) error {
	if c.has(i) {
		c.land(i, true)
		return nil
	}
	buf := c.buffers.get()
	defer buf.release()
	out, err := ch.Decode(buf.b[:0], frame)
	if err != nil {
		return &IntegrityError{Key: c.key, Chunk: i, Err: err}
	}
	buf.b = out
	c.arrive(i, buf)
	err = c.store(i, ch, out)
	// A cache that was closed meanwhile keeps nothing in memory either.
	c.land(i, err == nil || errors.Is(err, os.ErrClosed))
	return err
}

// store writes a verified chunk and makes it present.
func (c *content) store(i int, ch artifact.Chunk, b []byte) error {
	if bad := c.bad.Load(); bad != nil {
		return bad
	}
	if c.homeless.Load() {
		if err := c.provide(); err != nil {
			return fmt.Errorf("cache of layer %s: %w", c.key, err)
		}
	}
	c.checkSize()
	if _, err := c.data.WriteAt(b, ch.Offset); err != nil {
		c.failed(err)
		return fmt.Errorf("cache of layer %s: %w", c.key, err)
	}
	if c.failing.Load() {
		c.failing.Store(false)
	}
	c.crcs[i].Store(crc32.Checksum(b, castagnoli))
	if c.chunks[i].Or(present)&present != 0 {
		return nil // somebody else brought it, too
	}
	c.remember(i)
	c.stored.Add(int64(len(b)))
	c.mu.Lock()
	first := len(c.pending) == 0
	c.pending = append(c.pending, i)
	c.unsynced += int64(len(b))
	much := c.unsynced >= flushAt
	c.mu.Unlock()
	if much {
		c.wake(false)
	} else if first {
		c.dirtied()
	}
	return nil
}

// checkSize notices when somebody has truncated the data file, before a write
// makes it long again, with a hole: then no chunk counts as present until its
// CRC has been checked again.
func (c *content) checkSize() {
	info, err := c.data.Stat()
	if err != nil || info.Size() == c.size {
		return
	}
	c.damage.Do(func() {
		c.log.Warn("a cached layer's file has been truncated; what is missing will be fetched again", "size", info.Size(), "want", c.size)
	})
	for i := range c.chunks {
		if c.has(i) {
			c.chunks[i].Or(claimed)
			c.chunks[i].And(^uint32(present))
		}
	}
	c.stored.Store(allocated(c.data))
	_ = c.data.Truncate(c.size) // or else the next process discards the file
}

// flush makes what is present durable: data first, then the record of it. If
// data can't be synced, nobody knows what the disk has: all chunks since the
// last flush are forgotten.
func (c *content) flush() error {
	c.flushing.Lock()
	defer c.flushing.Unlock()
	if c.closed {
		return nil
	}
	c.mu.Lock()
	pending := c.pending
	c.pending, c.unsynced = nil, 0
	c.mu.Unlock()
	if len(pending) == 0 {
		return nil
	}
	if err := fdatasync(c.data); err != nil {
		for _, i := range pending {
			c.distrust(i, err)
		}
		return fmt.Errorf("cache of layer %s: syncing its data: %w", c.key, err)
	}
	c.stored.Store(allocated(c.data))
	slices.Sort(pending)
	for len(pending) > 0 {
		n := 1
		for n < len(pending) && pending[n] == pending[0]+n {
			n++
		}
		run := make([]byte, 0, n*stateEntrySize)
		for _, i := range pending[:n] {
			e := c.entry(i, c.crcs[i].Load())
			run = append(run, e[:]...)
		}
		// Not recorded is merely fetched again after a restart, so an error
		// here loses nothing; the file's next state is as good.
		if _, err := c.state.WriteAt(run, stateHeaderSize+int64(pending[0])*stateEntrySize); err != nil {
			return fmt.Errorf("cache of layer %s: recording chunks: %w", c.key, err)
		}
		pending = pending[n:]
	}
	if err := fdatasync(c.state); err != nil {
		return fmt.Errorf("cache of layer %s: syncing its state: %w", c.key, err)
	}
	if err := c.syncNames(); err != nil {
		return fmt.Errorf("cache of layer %s: %w", c.key, err)
	}
	return nil
}

// dirty reports whether there is something to flush.
func (c *content) dirty() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.pending) > 0
}

// quarantine makes the layer unreadable, now and after a restart, and gives
// its space back. Nobody's read turns from right to wrong by it: the flag is
// raised first, and the file is unlinked, not truncated.
func (c *content) quarantine(err *IntegrityError) {
	c.bad.Store(err)
	c.log.Error("layer quarantined: its content is not what its digest promises", "error", err)
	if werr := durable.WriteFile(filepath.Join(c.dir, quarantineFile), []byte(err.Err.Error()+"\n"), 0o600); werr != nil {
		c.log.Error("the quarantine is not recorded, and will be decided again", "error", werr)
	}
	for _, name := range []string{completeFile, recentFile, stateFile, dataFile} {
		if rerr := os.Remove(filepath.Join(c.dir, name)); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			c.log.Error("cannot remove quarantined content", "error", rerr)
		}
	}
	c.stored.Store(0)
}

// close flushes and closes the files. No fetch may be running.
func (c *content) close() error {
	err := c.flush()
	c.flushing.Lock()
	defer c.flushing.Unlock()
	c.closed = true
	c.closeFiles()
	return err
}
