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
// Start with Cache and Layer. How a chunk reaches the disk is content.go, how
// it reaches readers flight.go and fetch.go.
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

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/internal/durable"
	"sluice/oci"
)

// Options configure a Cache. The zero value of each is its default.
type Options struct {
	// Dir is the cache's directory, made if it's missing. One Cache at a time
	// has it.
	Dir string

	// Quota is how much disk the cache may have; 0 is no bound. Free is how
	// much of the file system it leaves to others. From the lesser of both
	// follows the high mark: when it is passed, layers are evicted, from
	// Settled on, until the cache is down to Low percent of it (default 90).
	// First go the layers that no image has, then the least recently used,
	// never pinned ones nor those that somebody has acquired. Fill stops at
	// the high mark, or for layers that only it has acquired at the low one.
	// What running containers read is stored even so: an ordinary pull would
	// have needed the disk for it before they started.
	Quota, Free Space
	Low         float64

	// FaultTimeout bounds how long a ReadAt waits for content; default 60 s.
	FaultTimeout time.Duration

	// ReadAhead is up to how many decoded bytes are fetched ahead of a
	// sequential reader; default 4 MiB, negative for none.
	ReadAhead int64

	// MaxRequest bounds the bytes of one ranged request; default 4 MiB.
	MaxRequest int64

	// FillBandwidth bounds what all Fills together fetch, in bytes per
	// second; default no bound.
	FillBandwidth int64

	// FlushInterval is how often new content is made durable; default 1 s.
	// What a crash catches before that is fetched again.
	FlushInterval time.Duration

	// Log receives what operators should know; default none.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	o.FaultTimeout = defaultTo(o.FaultTimeout, 60*time.Second)
	o.FlushInterval = defaultTo(o.FlushInterval, time.Second)
	o.MaxRequest = defaultTo(o.MaxRequest, 4<<20)
	switch {
	case o.ReadAhead == 0:
		o.ReadAhead = 4 << 20
	case o.ReadAhead < 0:
		o.ReadAhead = 0
	}
	if o.Low <= 0 || o.Low > 100 {
		o.Low = 90
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

func defaultTo[T int64 | time.Duration](v, d T) T {
	if v <= 0 {
		return d
	}
	return v
}

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

// slot is the place of one device key, open or only on disk.
type slot struct {
	key oci.Digest

	// mu is held while the layer's files are opened, closed or removed.
	mu sync.Mutex

	// Guarded by Cache.mu. content changes only with slot.mu held too.
	content *content // nil unless open
	refs    int      // Layers, and calls of Acquire under way
	disk    onDisk   // when it was last closed
	used    time.Time
}

// Open opens the cache in opts.Dir. It waits, for 10 s at most, for an earlier
// process that still has the directory.
func Open(ctx context.Context, opts Options) (*Cache, error) {
	opts = opts.withDefaults()
	if err := durable.MkdirAll(opts.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	lock, err := lockDir(ctx, opts.Dir)
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

// lockDir takes the directory for this process, until the file is closed.
func lockDir(ctx context.Context, dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: another process has the cache; stop it first: %w", f.Name(), ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
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

// Acquire opens the layer that dev describes, for reading through src, which
// must be its blob (dev.Blob). The layer stays in the cache at least until
// the Layer is released. Several Layers of one key share everything but dev
// and src, and each fetches through its own. meter, unless it's nil, counts
// what that costs.
//
// An *IntegrityError means that the layer was quarantined. src should be
// patient by itself (blob.Retry): the cache asks again only for content that
// arrived damaged, or that it was waiting for through another Layer's source.
func (c *Cache) Acquire(ctx context.Context, dev *artifact.Device, src blob.Source, meter *Meter) (*Layer, error) {
	shape, err := shapeOf(dev)
	if err != nil {
		return nil, err
	}
	if src.Size() != dev.Blob.Size {
		return nil, fmt.Errorf("layer %s: its source has %d bytes, its blob %d", dev.Key, src.Size(), dev.Blob.Size)
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, ErrClosed
	}
	s := c.slots[dev.Key]
	if s == nil {
		s = &slot{key: dev.Key, used: time.Now()}
		c.slots[dev.Key] = s
	}
	s.refs++
	c.mu.Unlock()

	content, err := c.open(s, shape)
	if err != nil {
		c.release(s, false)
		return nil, err
	}
	return newLayer(ctx, c, s, content, dev, src, meter), nil
}

// open returns the slot's content, opening its files if they aren't.
func (c *Cache) open(s *slot, shape shape) (*content, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if have := c.contentOf(s); have != nil {
		if bad := have.bad.Load(); bad != nil {
			return nil, bad
		}
		if have.shape != shape {
			return nil, fmt.Errorf("layer %s: two devices of the same key differ in size", s.key)
		}
		return have, nil
	}
	dir := c.dirOf(s.key)
	env := environment{
		buffers: c.buffers, stats: c.stats, log: c.log.With("layer", s.key), boot: c.boot,
		dirtied: c.dirtied, wake: c.wake, writeErrors: &c.writeErrors,
	}
	opened, err := openContent(dir, shape, env)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	closed := c.closed // and then Close doesn't know of opened
	if !closed {
		s.content = opened
	}
	c.mu.Unlock()
	if closed {
		return nil, errors.Join(ErrClosed, opened.close())
	}
	return opened, nil
}

func (c *Cache) contentOf(s *slot) *content {
	c.mu.Lock()
	defer c.mu.Unlock()
	return s.content
}

// release gives up one reference to the slot, and with the last one its
// files. used tells that the layer was wanted, not merely filled.
func (c *Cache) release(s *slot, used bool) {
	c.mu.Lock()
	s.refs--
	if used {
		s.used = time.Now()
	}
	last := s.refs == 0
	if last && s.content == nil && s.disk == (onDisk{}) {
		delete(c.slots, s.key) // an Acquire that failed
	}
	c.mu.Unlock()
	if last {
		c.closeIdle(s)
	}
}

// closeIdle closes the slot's files unless it has been acquired meanwhile.
func (c *Cache) closeIdle(s *slot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.mu.Lock()
	open := s.content
	if s.refs > 0 {
		open = nil
	}
	if open != nil {
		s.content = nil
	}
	c.mu.Unlock()
	if open == nil {
		return
	}
	if err := open.close(); err != nil {
		c.log.Warn("closing a cached layer", "error", err)
	}
	found := inspect(open.dir)
	c.mu.Lock()
	s.disk = found
	used := s.used
	if s.refs == 0 && found == (onDisk{}) {
		delete(c.slots, s.key) // the disk has taken nothing of it
	}
	c.mu.Unlock()
	touch(open.dir, used)
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
