// Package cache keeps the decoded content of layers on the node's disk, chunk
// by chunk, as it is needed.
//
// A Cache is a directory with one sparse file of decoded bytes per device key
// (see artifact.Device), shared by all images that have the layer. Acquire
// returns a Layer, whose ReadAt fetches what is missing: each chunk once
// however many wait for it, adjacent chunks in one request, those that
// sequential readers will want next ahead of them. Every chunk is verified
// against its digest before any byte of it is decoded, let alone read. PutFrame
// takes chunks that came another way, in a boot pack. Fill fetches the rest
// behind everybody's back, then checks the whole layer against its diff ID:
// from then on it is Complete, needs no registry, and its file (Path) can be
// given to the kernel as it is. A layer that fails that check is quarantined.
//
// What is recorded as being on disk never is ahead of what the disk holds,
// also across loss of power (see content), and carries a checksum that is
// checked on the first read after a restart, save that of Complete layers,
// which are read like any local file. Files that are damaged are
// discarded and fetched again. A full disk costs speed, not correctness:
// content is then served from memory.
//
// Start with Cache and Layer. How a chunk reaches the disk is content.go, what
// is there files.go and state.go, how it reaches readers flight.go and fetch.go.
package cache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"sluice/internal/blob"
	"sluice/internal/durable"
	"sluice/oci"
)

const (
	// flushAt is how many bytes may wait for the flusher's next round.
	flushAt = 64 << 20

	// logInterval is how often one and the same complaint about a layer is
	// logged.
	logInterval = 30 * time.Second

	// complainInterval is likewise for complaints about the disk as a whole.
	complainInterval = 10 * time.Minute

	// lockPatience is how long Open waits for an earlier process to end.
	lockPatience = 10 * time.Second

	// lookInterval is how often the disk is looked at while nothing is
	// written here, because others write to it too. It is kubelet's interval.
	lookInterval = 10 * time.Second
)

// Cache is a directory of cached layers. It may be used concurrently.
type Cache struct {
	opts    Options
	log     *slog.Logger
	lock    *os.File // flock: this process has the directory
	buffers *buffers
	traffic *traffic
	limiter *rate.Limiter // of all Fills
	stats   *stats
	full    atomic.Bool                                // a write found no space since the flusher last looked
	needs   atomic.Pointer[func() map[oci.Digest]Need] // nil before Settled

	// These keep a disk that is full for days from filling the log.
	writeErrors, diskErrors, inUse rate.Sometimes

	evicting sync.Mutex // held by evict; taken first of all

	// mu guards slots, the fields of each slot that say so, and closed.
	// Nothing blocks while it is held. Order: slot.mu, content.flushing,
	// content.mu; Cache.mu is taken last and alone after any of them.
	mu     sync.Mutex
	slots  map[oci.Digest]*slot
	closed bool

	dirty   chan struct{} // there is something to flush, in a while
	kick    chan struct{} // wakes the flusher early
	stop    chan struct{} // closed by Close
	boot    string        // see bootID
	stopped sync.WaitGroup
}

// Open opens the cache in opts.Dir. It waits, for 10 s at most, for an earlier
// process that still has the directory.
func Open(ctx context.Context, opts Options) (*Cache, error) {
	opts = opts.withDefaults()
	if err := durable.MkdirAll(opts.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	lctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	lock, err := durable.Lock(lctx, filepath.Join(opts.Dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	c := &Cache{
		opts: opts, log: opts.Log, lock: lock,
		buffers: &buffers{}, traffic: newTraffic(),
		limiter: blob.Bandwidth(opts.FillBandwidth),
		stats:   &stats{},
		slots:   map[oci.Digest]*slot{},
		dirty:   make(chan struct{}, 1),
		kick:    make(chan struct{}, 1),
		stop:    make(chan struct{}),
		boot:    bootID(),

		writeErrors: rate.Sometimes{First: 1, Interval: logInterval},
		diskErrors:  rate.Sometimes{First: 1, Interval: complainInterval},
		inUse:       rate.Sometimes{First: 1, Interval: complainInterval},
	}
	if err := c.scan(); err != nil {
		lock.Close()
		return nil, fmt.Errorf("open cache: %w", err)
	}
	c.stopped.Go(c.flusher)
	return c, nil
}

// scan finds the layers that earlier processes left, and removes what they
// didn't finish removing.
func (c *Cache) scan() error {
	entries, err := os.ReadDir(c.opts.Dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(c.opts.Dir, e.Name())
		if durable.IsTemp(e.Name()) {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
			continue
		}
		key, ok := keyOf(e.Name())
		if !ok || !e.IsDir() {
			continue // not ours
		}
		s := &slot{key: key, disk: inspect(path)}
		if info, err := e.Info(); err == nil {
			s.used = info.ModTime()
		}
		c.slots[key] = s
	}
	return nil
}

// dirOf returns a layer's directory: its key with a dash, because mount
// options and search paths make something of colons.
func (c *Cache) dirOf(key oci.Digest) string {
	return filepath.Join(c.opts.Dir, key.Algorithm().String()+"-"+key.Encoded())
}

// keyOf is the reverse of dirOf's last element.
func keyOf(name string) (oci.Digest, bool) {
	const prefix = "sha256-"
	if len(name) < len(prefix) || name[:len(prefix)] != prefix {
		return "", false
	}
	key, err := oci.ParseDigest("sha256:" + name[len(prefix):])
	return key, err == nil
}

// Close makes everything durable that can be, and gives up the directory.
// Layers still acquired are to be released, and of no other use: what is on
// disk can't be read through them any more.
func (c *Cache) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.mu.Unlock()
	close(c.stop)
	c.stopped.Wait()
	var errs []error
	for _, o := range c.opened() {
		errs = append(errs, o.close())
	}
	return errors.Join(append(errs, c.lock.Close())...)
}

func (c *Cache) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// dirtied makes the flusher look in a while.
func (c *Cache) dirtied() {
	select {
	case c.dirty <- struct{}{}:
	default:
	}
}

// wake makes the flusher look now. full tells that the disk is.
func (c *Cache) wake(full bool) {
	if full {
		c.full.Store(true)
	}
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// flusher makes new content durable, some time after a wake, and makes room
// where the marks or the disk ask for it. It sleeps while there is nothing new.
func (c *Cache) flusher() {
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	due, armed := time.NewTimer(c.opts.FlushInterval), true
	defer due.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-look.C:
			if c.opts.Free != (Space{}) {
				c.makeRoom()
			}
			continue
		case <-c.dirty:
			if !armed {
				due.Reset(c.opts.FlushInterval)
				armed = true
			}
			continue
		case <-due.C:
		case <-c.kick:
			due.Stop()
		}
		armed = false
		for _, o := range c.opened() {
			if !o.dirty() {
				continue
			}
			if err := o.flush(); err != nil {
				c.writeErrors.Do(func() { c.log.Error("making cached content durable", "error", err) })
			}
		}
		c.makeRoom()
	}
}

// opened returns the layers that are open.
func (c *Cache) opened() []*content {
	c.mu.Lock()
	defer c.mu.Unlock()
	var open []*content
	for _, s := range c.slots {
		if s.content != nil {
			open = append(open, s.content)
		}
	}
	return open
}

// stats count since Open.
type stats struct {
	faults, requests, readAheads, corrupt, writeErrors atomic.Int64
}

// Stats are counts since the Cache was opened.
type Stats struct {
	Faults      int64 // ReadAts that had to wait for content
	Requests    int64 // ranged requests, those of Fill included
	ReadAheads  int64 // of Requests: made ahead of sequential readers
	Corrupt     int64 // frames that arrived and weren't what their digest promises
	WriteErrors int64 // chunks that the disk did not take
}

// Stats returns the counts up to now.
func (c *Cache) Stats() Stats {
	return Stats{
		Faults: c.stats.faults.Load(), Requests: c.stats.requests.Load(), ReadAheads: c.stats.readAheads.Load(),
		Corrupt: c.stats.corrupt.Load(), WriteErrors: c.stats.writeErrors.Load(),
	}
}
