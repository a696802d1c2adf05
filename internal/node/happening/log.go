package happening

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"maps"
	"sync"
	"time"
)

// Capacity is how many Events a node daemon's Log has: some 1 MB at most.
const Capacity = 1024

// ErrClosed: the Log is closed, nothing will happen any more.
var ErrClosed = errors.New("the daemon is ending")

// Log is the last Events. It may be used concurrently.
type Log struct {
	epoch string

	mu     sync.Mutex
	events []Event // a ring: the Event of sequence number n is at n % len
	last   uint64  // sequence number of the newest; 0: there's none
	more   chan struct{}
	closed bool
	starts map[string]int64
}

// NewLog returns a Log of the last capacity Events, which must be positive.
func NewLog(capacity int) *Log {
	var b [8]byte
	_, _ = rand.Read(b[:]) // it doesn't fail
	return &Log{epoch: hex.EncodeToString(b[:]), events: make([]Event, capacity), more: make(chan struct{}), starts: make(map[string]int64)}
}

// Add appends an Event, whose Epoch and Seq it sets, and its Time unless it has
// one. It never waits for a reader.
func (l *Log) Add(e Event) {
	e = e.clip()
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.last++
	e.Epoch, e.Seq = l.epoch, l.last
	l.events[l.last%uint64(len(l.events))] = e
	if e.Kind == Started {
		l.starts[e.Reason]++
	}
	close(l.more)
	l.more = make(chan struct{})
}

// Starts returns how many containers have started, by the reason why their images
// weren't streamed: "" for those that were.
func (l *Log) Starts() map[string]int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.starts)
}

// Close ends all Follow, once they have what there is.
func (l *Log) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.closed = true
		close(l.more)
	}
}

// After returns the Events after a cursor, oldest first, which may be none, and
// how many there were before them that the Log doesn't have any more. After a
// cursor that is none of this Log's, such as one of an earlier daemon, come all.
func (l *Log) After(c Cursor) (events []Event, lost uint64) {
	events, lost, _, _ = l.after(c)
	return events, lost
}

// after is After; more is closed when there's more, or the Log is closed.
func (l *Log) after(c Cursor) (events []Event, lost uint64, more <-chan struct{}, closed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	seen := c.Seq
	if c.Epoch != l.epoch || seen > l.last {
		seen = 0
	}
	oldest := uint64(1) // of those that are here
	if n := uint64(len(l.events)); l.last > n {
		oldest = l.last - n + 1
	}
	if seen+1 < oldest {
		if c != (Cursor{}) { // who begins has lost nothing
			lost = oldest - seen - 1
		}
		seen = oldest - 1
	}
	for seq := seen + 1; seq <= l.last; seq++ {
		events = append(events, l.events[seq%uint64(len(l.events))])
	}
	return events, lost, l.more, l.closed
}

// Follow is After, but waits until there's at least one Event. Its error is
// that of ctx, or ErrClosed.
func (l *Log) Follow(ctx context.Context, c Cursor) (events []Event, lost uint64, err error) {
	for {
		events, lost, more, closed := l.after(c)
		if len(events) > 0 {
			return events, lost, nil
		}
		if closed {
			return nil, 0, ErrClosed
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil, 0, context.Cause(ctx)
		}
	}
}
