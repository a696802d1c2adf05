package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	requestTimeout = 15 * time.Second
	minBackoff     = 500 * time.Millisecond
	maxBackoff     = 30 * time.Second
	maxAfter       = 2 * time.Minute // that an API server may have us wait at once

	// patience is how long a request may fail while the API server answers
	// others; overloadPatience is that for one that asks for patience.
	patience         = 2 * time.Minute
	overloadPatience = 10 * time.Minute

	// warmUp is how long a request may be forbidden as everything else is: by an
	// API server that hasn't read its roles yet. If it's longer, nobody gave
	// the reporter any rights, and for belief it isn't tried again.
	warmUp = time.Minute
	belief = 10 * time.Minute

	// tellAgain is how often a refusal of one kind is told.
	tellAgain = time.Hour
)

// errStuck: only this request fails, for too long.
var errStuck = errors.New("it fails again and again, while others succeed")

// asker asks the API server: not too often, and again when it fails in passing.
// It may be used concurrently.
type asker struct {
	cluster Cluster
	node    string
	limit   *rate.Limiter
	log     *slog.Logger

	mu      sync.Mutex // protects the following
	failing string     // why the API server can't be asked now; "": it can
	denied  time.Time  // when it was still forbidding everything after warmUp
	refused map[string]*refusal
}

// refusal is what was told of requests that are refused.
type refusal struct {
	at     time.Time
	silent int // how many weren't told since
}

// do makes a request until it's answered. It returns nil, ErrExists,
// ErrNotFound, ErrConflict, ErrRefused, errStuck, or the error of ctx.
func (a *asker) do(ctx context.Context, request func(context.Context) error) error {
	var began time.Time
	confirmed := false // that it's this request that is forbidden
	for pause := minBackoff; ; pause = min(2*pause, maxBackoff) {
		if err := a.limit.Wait(ctx); err != nil {
			return contextError(ctx, err)
		}
		err := once(ctx, request)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if began.IsZero() {
			began = time.Now()
		}
		if err == nil || permanent(err) && !(errors.Is(err, ErrForbidden) && a.warming(ctx, began, &confirmed)) {
			a.note(nil)
			return err
		}
		a.note(err)
		wait := pause/2 + rand.N(pause/2+1)
		var u *Unavailable
		patience := patience
		if errors.As(err, &u) && u.After > 0 {
			wait = max(wait, min(u.After, maxAfter)+rand.N(time.Second))
			patience = overloadPatience
		}
		if time.Since(began) >= patience && once(ctx, func(ctx context.Context) error { return a.cluster.Works(ctx, a.node) }) == nil {
			a.note(nil)
			return fmt.Errorf("%w: %w", errStuck, err)
		}
		if err := sleep(ctx, wait); err != nil {
			return err
		}
	}
}

// warming reports whether what is forbidden may be permitted soon: since began
// everything is, or it was until a moment ago.
func (a *asker) warming(ctx context.Context, began time.Time, confirmed *bool) bool {
	a.mu.Lock()
	believed := !a.denied.IsZero() && time.Since(a.denied) < belief
	a.mu.Unlock()
	if believed || *confirmed {
		return false
	}
	err := once(ctx, func(ctx context.Context) error { return a.cluster.Works(ctx, a.node) })
	if !errors.Is(err, ErrForbidden) {
		*confirmed = err == nil
		return true
	}
	if time.Since(began) < warmUp {
		return true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.denied = time.Now()
	return false
}

// once makes a request, which may not take for ever.
func once(ctx context.Context, request func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return request(ctx)
}

func permanent(err error) bool {
	return errors.Is(err, ErrExists) || errors.Is(err, ErrNotFound) || errors.Is(err, ErrConflict) || errors.Is(err, ErrRefused)
}

// contextError is the error of ctx, or err if it hasn't one.
func contextError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// note tells when the API server can't be asked any more, and when it can again.
func (a *asker) note(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case err == nil && a.failing != "":
		a.failing = ""
		a.log.Info("the API server answers again")
	case err != nil && a.failing == "":
		a.failing = err.Error()
		a.log.Warn("what happens on this node is told to the API server later", "error", err)
	}
}

// Failing returns why the API server can't be asked now, "" if it can.
func (a *asker) Failing() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failing
}

// refuse tells that something isn't done at the API server, with what it
// concerns: the first of a kind, and then the first in an hour.
func (a *asker) refuse(what string, err error, args ...any) {
	kind := what
	for _, e := range []error{ErrNotFound, ErrConflict, ErrRefused, errStuck} {
		if errors.Is(err, e) {
			kind += ": " + e.Error()
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.refused == nil {
		a.refused = map[string]*refusal{}
	}
	r := a.refused[kind]
	if r != nil && time.Since(r.at) < tellAgain {
		r.silent++
		a.log.Debug(what, append(args, "error", err)...)
		return
	}
	args = append(args, "error", err)
	if r != nil && r.silent > 0 {
		args = append(args, "more", r.silent)
	}
	a.refused[kind] = &refusal{at: time.Now()}
	a.log.Warn(what, args...)
}
