package kube

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"sluice/internal/node/happening"
)

// Daemon is what the reporter asks of the node daemon.
type Daemon interface {
	// Streams returns "" if the daemon streams images, or else why it doesn't.
	Streams(ctx context.Context) (why string, err error)

	// Follow calls each with every event after a cursor, those that come later
	// too, until each returns an error, ctx ends, the daemon does, or nothing is
	// heard of it for a minute. lost events before this one will never come.
	Follow(ctx context.Context, after happening.Cursor, each func(e happening.Event, lost uint64) error) error

	// SetStreaming switches streaming on or off for as long as the daemon lives.
	SetStreaming(ctx context.Context, on bool, why string) error
}

const (
	// daemonTimeout is how long a daemon may take for an answer.
	daemonTimeout = 10 * time.Second

	// minReconnect and maxReconnect are how long the reporter waits before it
	// connects to the daemon again.
	minReconnect = 200 * time.Millisecond
	maxReconnect = 5 * time.Second
)

// daemonState is what is known of the daemon.
type daemonState struct {
	up    bool
	since time.Time // of up
	start uint64    // another for each connection
}

// follower brings the daemon's events, from wherever it connects. One goroutine
// owns it.
type follower struct {
	daemon Daemon
	cursor happening.Cursor
	state  *latest[daemonState]
	log    *slog.Logger
}

// run sends events to lines until ctx ends.
func (f *follower) run(ctx context.Context, lines chan<- line) error {
	now := daemonState{since: time.Now()}
	pause := minReconnect
	told := ""
	for {
		err := f.connection(ctx, &now, lines)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if now.up {
			if time.Since(now.since) > maxReconnect {
				pause, told = minReconnect, ""
			}
			now.up, now.since = false, time.Now()
			f.state.set(now)
		}
		if err.Error() != told {
			told = err.Error()
			f.log.Warn("waiting for the node daemon", "error", err)
		}
		if err := sleep(ctx, pause/2+rand.N(pause/2+1)); err != nil {
			return err
		}
		pause = min(2*pause, maxReconnect)
	}
}

// errEnded: the daemon ended the stream of events without an error.
var errEnded = errors.New("the stream of events ended")

// connection follows the events of one connection. It never returns nil.
func (f *follower) connection(ctx context.Context, now *daemonState, lines chan<- line) error {
	asking, cancel := context.WithTimeout(ctx, daemonTimeout)
	_, err := f.daemon.Streams(asking)
	cancel()
	if err != nil {
		return err
	}
	*now = daemonState{up: true, since: time.Now(), start: now.start + 1}
	f.state.set(*now)
	err = f.daemon.Follow(ctx, f.cursor, func(e happening.Event, lost uint64) error {
		select {
		case lines <- line{e, lost}:
			f.cursor = e.Cursor()
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	if err == nil {
		err = errEnded
	}
	return err
}

// latest hands on the last of several values. It may be used concurrently.
type latest[T any] struct {
	mu    sync.Mutex
	value T
	news  chan struct{} // has room for one
}

func newLatest[T any]() *latest[T] { return &latest[T]{news: make(chan struct{}, 1)} }

func (l *latest[T]) set(v T) {
	l.mu.Lock()
	l.value = v
	l.mu.Unlock()
	select {
	case l.news <- struct{}{}:
	default:
	}
}

// edit changes the value, which is no news.
func (l *latest[T]) edit(change func(T) T) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.value = change(l.value)
}

func (l *latest[T]) get() T {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.value
}
