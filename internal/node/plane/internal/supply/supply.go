// Package supply is where the bytes of a device come from, whatever plane asks:
// from any of the images that have the device, within a bound, each image's
// content for as long as it is attached.
package supply

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"sluice/internal/node/plane"
)

// Supply is the content of one device. Its methods may be called concurrently.
type Supply struct {
	Name string // never changes
	Size int64  // exact, never changes; the kernel is told KernelSize

	mu sync.Mutex // of what follows; nothing else is locked while it is held
	// sources supply the bytes, one per image that has the device: each
	// image's content lives as long as its own attachment. Any will do.
	sources []*Source
	// changed is closed and replaced when a source was added or will not
	// come any more.
	changed chan struct{}
	// settled: nobody waits for a source.
	settled bool
	// failures are the last reads that failed after a wait, the oldest first.
	failures []failure
}

// New returns the supply of a device of size bytes, without a source yet. Unless
// it is settled, reads wait for the first one.
func New(name string, size int64, settled bool) *Supply {
	return &Supply{Name: name, Size: size, changed: make(chan struct{}), settled: settled}
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
func (d *Supply) fail(off, n int64, waited time.Duration) {
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
func (d *Supply) patience(off, n int64, most time.Duration) time.Duration {
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

// Source is one image's content of a device.
type Source struct {
	content plane.Content
	file    *os.File // what content reads, ours to close; nil if it is the caller's

	// Under Supply.mu:
	reads   int           // calls of content.ReadAt under way
	idle    chan struct{} // made by Drop, closed when reads has come to 0
	dropped bool
}

var errNoContent = errors.New("no content was supplied for this device")

// KernelSize is the size that the kernel sees: whole pages. No read that the
// kernel makes for a page which has bytes of the device is cut short then, so
// nothing depends on how a reader treats short reads.
func (d *Supply) KernelSize() int64 {
	page := int64(os.Getpagesize())
	return (d.Size + page - 1) / page * page
}

// NewSource returns what d supplies: its content, or its file's.
func NewSource(d plane.Device) (*Source, error) {
	if d.File == "" {
		return &Source{content: d.Content}, nil
	}
	f, err := os.Open(d.File)
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", d.Name, err)
	}
	return &Source{content: plane.FileContent{File: f}, file: f}, nil
}

// Close closes what NewSource opened. Nobody may read from s any more.
func (s *Source) Close() {
	if s.file != nil {
		s.file.Close()
	}
}

// Add lets d be read from s, too.
func (d *Supply) Add(s *Source) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sources = append(d.sources, s)
	d.wake()
}

// Settle ends the waiting for a source.
func (d *Supply) Settle() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.settled {
		d.settled = true
		d.wake()
	}
}

func (d *Supply) wake() {
	close(d.changed)
	d.changed = make(chan struct{})
}

// Drop takes s away: no new read uses it. The channel is closed when the last
// read that does has ended.
func (d *Supply) Drop(s *Source) <-chan struct{} {
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

// Complete reports whether some source has all of the device on this machine
// (plane.Completer).
func (d *Supply) Complete() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.sources {
		if c, ok := s.content.(plane.Completer); ok && c.Complete() {
			return true
		}
	}
	return false
}

// take returns the source to use after skip earlier ones have failed, and
// marks it as read from; waiting at most until then for a first one.
func (d *Supply) take(ctx context.Context, skip int, until time.Duration) (*Source, error) {
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

func (d *Supply) release(s *Source) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s.reads--
	if s.dropped && s.reads == 0 {
		close(s.idle)
	}
}

// readAt fills p, all of which lies below KernelSize. Bytes past the device's
// end are zeros.
func (d *Supply) readAt(ctx context.Context, p []byte, off int64, adopt time.Duration) error {
	if n := d.Size - off; n < int64(len(p)) {
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
