package cache

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"time"

	"sluice/internal/blob"
	"sluice/internal/durable"
)

const (
	// fillTimeout bounds one request of Fill, bandwidth limit included.
	fillTimeout = 5 * time.Minute

	// minFill and maxFill bound the size of a request of Fill, in bytes. A
	// request is broken off when a reader comes to wait, so they begin small,
	// and are small again after that. They grow as long as nobody minds and one
	// takes less than fillGrowth, beside which a round trip is little.
	minFill    = 256 << 10
	maxFill    = 32 << 20
	fillGrowth = time.Second

	// fillSeconds is for how many seconds one request of Fill may use the
	// bandwidth that Options.FillBandwidth leaves it.
	fillSeconds = 10

	// fillRounds is how often Fill starts over when chunks turn out to be
	// damaged on disk.
	fillRounds = 3
)

// Fill fetches everything that is missing, then checks the layer as a whole:
// the SHA-256 of its content, as the file has it, against the device's diff
// ID. When it returns nil the layer is Complete, durably. Content that
// doesn't match quarantines the layer: Fill, all reads and later Acquires
// return an *IntegrityError.
//
// It stands back for reads that wait for content, keeps to
// Options.FillBandwidth, and stops at the quota with ErrQuota. After any other
// error it may be called again, and goes on where it stopped. Concurrent calls
// for one layer take turns.
func (l *Layer) Fill(ctx context.Context) error {
	ctx, done, err := l.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	l.filled.Store(true)
	c := l.content
	select {
	case <-c.filling:
		defer func() { c.filling <- struct{}{} }()
	case <-ctx.Done():
		return fmt.Errorf("fill layer %s: waiting for another fill of it: %w", l.dev.Key, context.Cause(ctx))
	}
	for range fillRounds {
		if c.complete.Load() {
			return nil
		}
		if bad := c.bad.Load(); bad != nil {
			return bad
		}
		if err := l.fillMissing(ctx); err != nil {
			return fmt.Errorf("fill layer %s: %w", l.dev.Key, err)
		}
		whole, err := l.verify(ctx)
		var ie *IntegrityError
		if errors.As(err, &ie) {
			c.quarantine(ie)
			return ie
		}
		if err != nil {
			return fmt.Errorf("fill layer %s: %w", l.dev.Key, err)
		}
		if !whole {
			continue
		}
		if err := c.setComplete(); err != nil {
			return fmt.Errorf("fill layer %s: %w", l.dev.Key, err)
		}
		return nil
	}
	return fmt.Errorf("fill layer %s: chunks keep getting damaged on disk; check %s", l.dev.Key, c.dir)
}

// fillMissing fetches, in order, all chunks that aren't on disk, or said to
// be. What others are fetching it leaves to them, and fetches if they didn't.
func (l *Layer) fillMissing(ctx context.Context) error {
	src := blob.Limit(l.src, l.cache.limiter)
	most := int64(maxFill)
	if b := l.cache.opts.FillBandwidth; b > 0 {
		most = min(most, b*fillSeconds)
	}
	size := min(minFill, most)
	for next := 0; ; {
		run, busy, err := l.missing(ctx, next, size)
		if err != nil {
			return err
		}
		if len(run) == 0 {
			if !busy && next == 0 {
				return nil
			}
			if busy {
				l.cache.traffic.pause(ctx)
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			next = 0
			continue
		}
		began := time.Now()
		err = l.fillRun(ctx, src, run)
		switch {
		case errors.Is(err, errDisturbed): // some of it may have come
			size = min(minFill, most)
		case err != nil:
			return err
		default:
			next = run[len(run)-1].chunk + 1
			if time.Since(began) < fillGrowth {
				size = min(4*size, most)
			}
		}
	}
}

// missing returns the first run of missing chunks from chunk i on, up to most
// bytes of the blob. busy tells that some are missing that others fetch.
func (l *Layer) missing(ctx context.Context, i int, most int64) (run []want, busy bool, _ error) {
	c := l.content
	var size int64
	for ; i < c.count; i++ {
		wanted := c.chunks[i].Load()&(present|claimed) == 0
		if wanted && c.underWay(i) {
			wanted, busy = false, true
		}
		if !wanted {
			if len(run) > 0 {
				break
			}
			continue
		}
		ch, err := l.dev.Chunk(ctx, i)
		if err != nil {
			return nil, false, err
		}
		if size += int64(ch.BlobLength); size > most && len(run) > 0 {
			break
		}
		run = append(run, want{chunk: i, ch: ch, origin: Background})
	}
	return run, busy, nil
}

// underWay reports whether somebody is bringing chunk i.
func (c *content) underWay(i int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.flights[i]
	return f != nil && !f.landed || c.awaited(i)
}

// fillRun fetches one run when nobody waits for content, and breaks off with
// errDisturbed when somebody begins to. A node that always faults must get
// complete, too: after maxYield one chunk is fetched all the same. Chunks have
// no flight meanwhile: a fault for one doesn't wait for a request that is
// standing back for it.
func (l *Layer) fillRun(ctx context.Context, src frames, run []want) error {
	if err := l.cache.traffic.fill(ctx); err != nil {
		return err
	}
	defer l.cache.traffic.endFill()
	ctx, cancel := context.WithTimeoutCause(ctx, fillTimeout, fmt.Errorf("%w (%v)", ErrTimeout, fillTimeout))
	defer cancel()
	if l.cache.traffic.yield(ctx) {
		var undisturbed func()
		ctx, undisturbed = l.cache.traffic.untilBusy(ctx)
		defer undisturbed()
	} else {
		run = run[:1]
	}
	var decoded int64
	for _, w := range run {
		decoded += int64(w.ch.Length)
	}
	if err := l.cache.room(l.slot, decoded); err != nil {
		return err
	}
	c := l.content
	c.failing.Store(false) // so that the disk is tried again
	before := func() error {
		if c.failing.Load() {
			return fmt.Errorf("the disk does not take what is fetched; make room in %s", c.dir)
		}
		return nil
	}
	bad, err := l.stream(ctx, src, run, before)
	if err != nil {
		return err
	}
	if len(bad) > 0 {
		return l.damaged(bad[0])
	}
	return before() // for the last chunk
}

// verify reads the layer back, checks each chunk against its CRC and the
// whole against the diff ID. false means that chunks were damaged on disk,
// and have been forgotten; an *IntegrityError that the chunks are as the chunk
// table has them, and still not the layer.
func (l *Layer) verify(ctx context.Context) (bool, error) {
	c := l.content
	if err := c.flush(); err != nil {
		return false, err
	}
	hash := l.dev.DiffID.Algorithm().Hash()
	buf := c.buffers.get()
	defer buf.release()
	whole := true
	for i := range c.count {
		l.cache.traffic.yield(ctx)
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		ch, err := l.dev.Chunk(ctx, i)
		if err != nil {
			return false, err
		}
		b := buf.mem[:ch.Length]
		_, err = c.data.ReadAt(b, ch.Offset)
		if err != nil || crc32.Checksum(b, castagnoli) != c.crcs[i].Load() {
			c.distrust(i, err)
			whole = false
			continue
		}
		c.chunks[i].Or(present)
		hash.Write(b) // never fails
	}
	if !whole {
		return false, nil
	}
	if got := fmt.Sprintf("%x", hash.Sum(nil)); got != l.dev.DiffID.Encoded() {
		return false, &IntegrityError{Key: l.dev.Key, Chunk: -1, Err: fmt.Errorf(
			"all %d bytes of the layer have digest %s:%s, the image says %s", c.length, l.dev.DiffID.Algorithm(), got, l.dev.DiffID)}
	}
	return true, nil
}

// setComplete records that the whole layer is on disk and checked. All chunks
// are present and synced.
func (c *content) setComplete() error {
	c.flushing.Lock()
	defer c.flushing.Unlock()
	if c.closed {
		return ErrClosed
	}
	if c.homeless.Load() {
		return fmt.Errorf("recording that it is complete: %w", errHomeless)
	}
	b := c.emptyState()
	for i := range c.count {
		e := c.entry(i, c.crcs[i].Load())
		copy(b[stateHeaderSize+i*stateEntrySize:], e[:])
	}
	if _, err := c.state.WriteAt(b, 0); err != nil {
		return fmt.Errorf("recording that it is complete: %w", err)
	}
	if err := fdatasync(c.state); err != nil {
		return fmt.Errorf("recording that it is complete: %w", err)
	}
	if err := c.syncNames(); err != nil {
		return fmt.Errorf("recording that it is complete: %w", err)
	}
	if err := durable.WriteFile(filepath.Join(c.dir, completeFile), []byte(c.completeMark()), 0o600); err != nil {
		return fmt.Errorf("recording that it is complete: %w", err)
	}
	c.complete.Store(true)
	// It has nothing to add to that any more.
	if err := os.Remove(filepath.Join(c.dir, recentFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		c.log.Warn("a file that isn't needed any more stays", "error", err)
	}
	return nil
}
