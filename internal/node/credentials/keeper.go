package credentials

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

const (
	// patience is how long a request waits for a source, counted from when the
	// source began to ask.
	patience = 5 * time.Second

	// minRetry and maxRetry bound how long a failure is the answer without
	// asking again; doubled with each in a row.
	minRetry, maxRetry = 5 * time.Second, 2 * time.Minute

	// minAge is how old a value must be before a refusal makes a source ask
	// for another one: what is younger was refused for what it is.
	minAge = 30 * time.Second

	// inUse is how long after it was last asked for a value is still renewed.
	// A registry's client asks when its token or, with Basic authentication,
	// what it was first given is refused: after 12 hours at the longest among
	// the large registries.
	inUse = 24 * time.Hour

	// renewCheck is how often a keeper looks at least what is due.
	renewCheck = 10 * time.Minute

	// maxKept bounds the values of one keeper, and its failures.
	maxKept = 4096
)

// got is what somebody who was asked has answered.
type got[V any] struct {
	value V
	key   string    // what it is kept under, for others too
	until time.Time // when it runs out; zero: it isn't kept
}

// keeper asks for values: once for all who want the same registry's at the same
// time, not again at once after a failure, and ahead of time for those in use.
type keeper[V any] struct {
	// ask is what takes time: at most timeout.
	ask     func(ctx context.Context, req Request) (got[V], error)
	timeout time.Duration

	base context.Context // the keeper's own, of all questions; ends with run
	stop context.CancelFunc

	mu      sync.Mutex // guards what follows; nothing is waited for under it
	kept    map[string]*kept[V]
	failed  map[string]*failure   // by the first of a request's keys
	flights map[string]*flight[V] // by host: one question at a time for each
	running sync.WaitGroup        // of flights; none is added when base has ended
	woken   chan struct{}         // there's something new to renew
}

// kept is a value that hasn't run out.
type kept[V any] struct {
	got[V]
	req   Request // for which it was got,
	first string  // and the first of that one's keys
	from  time.Time
	renew time.Time // when to ask again
	used  time.Time // when it was last asked for
}

// failure is that there was no value not long ago.
type failure struct {
	err   error
	retry time.Time // not asked again before
	fails int       // in a row
}

// flight is a question under way.
type flight[V any] struct {
	began time.Time
	done  chan struct{} // closed when what follows is set
	got   got[V]
	err   error
}

func newKeeper[V any](timeout time.Duration, ask func(context.Context, Request) (got[V], error)) *keeper[V] {
	k := &keeper[V]{
		ask: ask, timeout: timeout,
		kept: make(map[string]*kept[V]), failed: make(map[string]*failure), flights: make(map[string]*flight[V]), woken: make(chan struct{}, 1),
	}
	k.base, k.stop = context.WithCancel(context.Background())
	return k
}

// get returns the value kept under one of keys, the most specific first, that
// good says can be used; or asks. Those who ask about the same host wait for one
// answer; if that isn't for them, as keys tell, they ask in turn.
func (k *keeper[V]) get(ctx context.Context, req Request, keys []string, good func(V) bool) (V, time.Time, error) {
	begin := time.Now()
	for {
		now := time.Now()
		k.mu.Lock()
		old := k.find(keys, now)
		if old != nil && (good(old.value) || now.Sub(old.from) < minAge) {
			old.used = now
			k.mu.Unlock()
			return old.value, old.until, nil
		}
		var f *flight[V]
		mine, err := false, k.failure(keys[0], now)
		if err == nil {
			f, mine = k.fly(req, keys[0])
		}
		k.mu.Unlock()
		if err == nil {
			err = f.wait(ctx, min(patience-time.Since(f.began), patience-time.Since(begin)))
		}
		if err != nil && old != nil {
			return old.value, old.until, nil // refused, but nothing better
		}
		if err != nil {
			var none V
			return none, time.Time{}, err
		}
		if mine || slices.Contains(keys, f.got.key) {
			return f.got.value, f.got.until, nil
		}
	}
}

// find returns what is kept under one of keys; k.mu is held.
func (k *keeper[V]) find(keys []string, now time.Time) *kept[V] {
	for _, key := range keys {
		v := k.kept[key]
		if v != nil && now.Before(v.until) {
			return v
		}
		delete(k.kept, key)
	}
	return nil
}

// failure returns the error that is still the answer, or nil; k.mu is held.
func (k *keeper[V]) failure(first string, now time.Time) error {
	if f := k.failed[first]; f != nil && now.Before(f.retry) {
		return f.err
	}
	return nil
}

// errStopped ends the questions of a daemon that ends.
var errStopped = errors.New("the node daemon is ending")

// fly returns the host's flight, and whether it was begun for this request; k.mu
// is held.
func (k *keeper[V]) fly(req Request, first string) (f *flight[V], mine bool) {
	if f = k.flights[req.Host]; f != nil {
		return f, false
	}
	f = &flight[V]{began: time.Now(), done: make(chan struct{})}
	if k.base.Err() != nil {
		f.err = errStopped
		close(f.done)
		return f, true
	}
	k.flights[req.Host] = f
	req.Refused = nil
	// In nobody's name: whoever wants the same waits for it.
	k.running.Go(func() { k.answer(f, req, first) })
	return f, true
}

// answer is a flight; it ends soon after the keeper's timeout.
func (k *keeper[V]) answer(f *flight[V], req Request, first string) {
	ctx, cancel := context.WithTimeoutCause(k.base, k.timeout, fmt.Errorf("no answer within %v", k.timeout))
	defer cancel()
	g, err := k.ask(ctx, req)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	now := time.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	defer close(f.done)
	delete(k.flights, req.Host)
	f.got, f.err = g, err
	k.sweep(now)
	switch {
	case err == nil:
		delete(k.failed, first)
		if now.Before(g.until) {
			k.keep(g, req, first, now)
		}
	case !errors.Is(err, ErrNone):
		fails := 0
		if before := k.failed[first]; before != nil {
			fails = before.fails
		}
		k.failed[first] = &failure{err: err, retry: now.Add(min(minRetry<<min(fails, 16), maxRetry)), fails: fails + 1}
	}
}

// keep keeps a value; k.mu is held.
func (k *keeper[V]) keep(g got[V], req Request, first string, now time.Time) {
	life, used := g.until.Sub(now), now
	if before := k.kept[g.key]; before != nil {
		used = before.used
	}
	k.kept[g.key] = &kept[V]{
		got: g, req: req, first: first, from: now, used: used,
		renew: g.until.Add(-life/10 - rand.N(life/10+1)), // not all of a cluster at once
	}
	select {
	case k.woken <- struct{}{}:
	default:
	}
}

// wait waits so long for a flight's answer.
func (f *flight[V]) wait(ctx context.Context, long time.Duration) error {
	timer := time.NewTimer(max(long, 0))
	defer timer.Stop()
	select {
	case <-f.done:
		return f.err
	default:
	}
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return fmt.Errorf("no answer for %v", patience)
	}
}

// sweep makes room if there's none: what has run out goes, or else all; k.mu is
// held.
func (k *keeper[V]) sweep(now time.Time) {
	if len(k.kept) >= maxKept {
		for key, v := range k.kept {
			if !now.Before(v.until) {
				delete(k.kept, key)
			}
		}
		if len(k.kept) >= maxKept {
			clear(k.kept)
		}
	}
	if len(k.failed) >= maxKept {
		clear(k.failed)
	}
}

// run renews what is in use ahead of its end, until ctx ends. Then it ends all
// questions, waits for them, and no more are asked.
func (k *keeper[V]) run(ctx context.Context) {
	for {
		timer := time.NewTimer(k.renew())
		select {
		case <-ctx.Done():
			timer.Stop()
			k.mu.Lock()
			k.stop()
			k.mu.Unlock()
			k.running.Wait()
			return
		case <-timer.C:
		case <-k.woken:
			timer.Stop()
		}
	}
}

// renew asks for what is due, and returns when to call it again.
func (k *keeper[V]) renew() time.Duration {
	now := time.Now()
	next := now.Add(renewCheck)
	k.mu.Lock()
	defer k.mu.Unlock()
	for key, v := range k.kept {
		if !now.Before(v.until) {
			delete(k.kept, key)
			continue
		}
		if !v.renew.After(now) {
			if now.Sub(v.used) > inUse {
				continue // it may run out
			}
			if _, mine := k.fly(v.req, v.first); mine {
				v.renew = now.Add(max(v.until.Sub(now)/4, time.Second)) // if that fails
			} else {
				v.renew = now.Add(time.Second) // after another question about the host
			}
		}
		if v.renew.Before(next) {
			next = v.renew
		}
	}
	return max(next.Sub(now), 100*time.Millisecond)
}
