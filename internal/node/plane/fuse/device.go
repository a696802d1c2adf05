package fuse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"sync"
	"time"

	"sluice/internal/node/plane"
)

// device is one file of the FUSE mount. name, node and size never change.
type device struct {
	name string
	node uint64
	size int64 // exact; the kernel is told a multiple of the page size

	mu sync.Mutex // of what follows; nothing else is locked while it is held
	// sources supply the bytes, one per image that has the device: each
	// image's content lives as long as its own attachment. Any will do.
	sources []*source
	// changed is closed and replaced when a source was added or will not
	// come any more.
	changed chan struct{}
	// settled: nobody waits for a source.
	settled bool
	// failures are the last reads that failed after a wait, the oldest first.
	failures []failure
}

// failure is a read that failed after a wait, and until when others of the same
// bytes aren't given as long: the kernel's own. For one read of a program it asks
// up to three times (EROFS and FUSE read ahead, and each reads the page itself
// when that failed), and whoever waits for the page asks anew, so that a bound
// would be a multiple of itself.
type failure struct {
	off, end int64
	until    time.Time
}

const (
	maxFailures = 64
	// shortWait is how long a read waits that has just been waited for: what is
	// there by now is still read.
	shortWait = 20 * time.Millisecond
	// maxMemory is the longest that a failure is remembered.
	maxMemory = 5 * time.Second
)

// fail notes a read of n bytes at off that failed after a wait.
func (d *device) fail(off, n int64, waited time.Duration) {
	if waited < 5*shortWait {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.failures) >= maxFailures {
		d.failures = append(d.failures[:0], d.failures[1:]...)
	}
	d.failures = append(d.failures, failure{off, off + n, time.Now().Add(min(waited/8, maxMemory))})
}

// patience is how long a read of n bytes at off may wait, of at most d.
func (d *device) patience(off, n int64, most time.Duration) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.failures) == 0 {
		return most
	}
	now := time.Now()
	for len(d.failures) > 0 && now.After(d.failures[0].until) {
		d.failures = d.failures[1:]
	}
	for _, f := range d.failures {
		if off < f.end && f.off < off+n && now.Before(f.until) {
			return min(most, shortWait)
		}
	}
	return most
}

// source is one image's content of a device.
type source struct {
	content plane.Content
	file    *os.File // what content reads, ours to close; nil if it is the caller's

	// Under device.mu:
	reads   int           // calls of content.ReadAt under way
	idle    chan struct{} // made by drop, closed when reads has come to 0
	dropped bool
}

var errNoContent = errors.New("no content was supplied for this device")

// kernelSize is the size that the kernel sees: whole pages. No read that the
// kernel makes for a page which has bytes of the device is cut short then, so
// nothing depends on how a reader treats short reads.
func (d *device) kernelSize() int64 {
	page := int64(os.Getpagesize())
	return (d.size + page - 1) / page * page
}

// newSource returns what d supplies: its content, or its file's.
func newSource(d plane.Device) (*source, error) {
	if d.File == "" {
		return &source{content: d.Content}, nil
	}
	f, err := os.Open(d.File)
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", d.Name, err)
	}
	return &source{content: plane.FileContent{File: f}, file: f}, nil
}

func (s *source) close() {
	if s.file != nil {
		s.file.Close()
	}
}

func (d *device) add(s *source) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sources = append(d.sources, s)
	d.wake()
}

// settle ends the waiting for a source.
func (d *device) settle() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.settled {
		d.settled = true
		d.wake()
	}
}

func (d *device) wake() {
	close(d.changed)
	d.changed = make(chan struct{})
}

// drop takes s away: no new read uses it. The channel is closed when the last
// read that does has ended.
func (d *device) drop(s *source) <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, have := range d.sources {
		if have == s {
			d.sources = append(d.sources[:i:i], d.sources[i+1:]...)
			break
		}
	}
	if !s.dropped {
		s.dropped = true
		s.idle = make(chan struct{})
		if s.reads == 0 {
			close(s.idle)
		}
	}
	return s.idle
}

// take returns the source to use after skip earlier ones have failed, and
// marks it as read from; waiting at most until then for a first one.
func (d *device) take(ctx context.Context, skip int, until time.Duration) (*source, error) {
	var timeout <-chan time.Time
	for {
		d.mu.Lock()
		if skip < len(d.sources) {
			s := d.sources[skip]
			s.reads++
			d.mu.Unlock()
			return s, nil
		}
		changed, settled := d.changed, d.settled
		d.mu.Unlock()
		if settled || skip > 0 {
			return nil, errNoContent
		}
		if timeout == nil {
			t := time.NewTimer(until)
			defer t.Stop()
			timeout = t.C
		}
		select {
		case <-changed:
		case <-timeout:
			return nil, fmt.Errorf("%w within %v of the restart", errNoContent, until)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (d *device) release(s *source) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s.reads--
	if s.dropped && s.reads == 0 {
		close(s.idle)
	}
}

// readAt fills p, all of which lies below kernelSize. Bytes past the device's
// end are zeros.
func (d *device) readAt(ctx context.Context, p []byte, off int64, adopt time.Duration) error {
	if n := d.size - off; n < int64(len(p)) {
		n = max(n, 0)
		clear(p[n:])
		p = p[:n]
	}
	if len(p) == 0 {
		return nil
	}
	var failed error
	for skip := 0; ; skip++ {
		s, err := d.take(ctx, skip, adopt)
		if err != nil {
			if failed != nil {
				return failed
			}
			return err
		}
		n, err := s.content.ReadAt(ctx, p, off)
		d.release(s)
		if n == len(p) && (err == nil || errors.Is(err, io.EOF)) {
			return nil
		}
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		if failed = err; ctx.Err() != nil {
			return failed
		}
	}
}

// table finds devices by node and by name.
type table struct {
	mu     sync.RWMutex // of the maps
	byNode map[uint64]*device
	byName map[string]*device
}

func newTable() *table {
	return &table{byNode: map[uint64]*device{}, byName: map[string]*device{}}
}

func (t *table) node(n uint64) *device {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byNode[n]
}

func (t *table) name(n []byte) *device {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byName[string(n)]
}

func (t *table) add(d *device) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.byNode[d.node], t.byName[d.name] = d, d
}

func (t *table) remove(d *device) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byNode, d.node)
	delete(t.byName, d.name)
}

// all returns the devices ordered by node.
func (t *table) all() []*device {
	t.mu.RLock()
	defer t.mu.RUnlock()
	list := make([]*device, 0, len(t.byNode))
	for _, d := range t.byNode {
		list = append(list, d)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].node < list[j].node })
	return list
}
