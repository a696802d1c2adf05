package main

import (
	"context"
	"sync"
	"time"
)

const (
	// readyAge is how long an answer holds: everybody may ask, and each one
	// costs a write to the storage.
	readyAge = 5 * time.Second

	// readyTimeout is how long storage and index may take.
	readyTimeout = 10 * time.Second
)

// readiness remembers whether requests can be served.
type readiness struct {
	check func(context.Context) error

	mu       sync.Mutex
	checking chan struct{} // closed when the check under way ends; nil: none is
	asked    time.Time     // when the last one ended
	err      error
}

// ready returns why requests can't be served, nil if they can.
func (r *readiness) ready(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.checking != nil {
		done := r.checking
		r.mu.Unlock()
		<-done // in readyTimeout
		r.mu.Lock()
	}
	if time.Since(r.asked) < readyAge {
		return r.err
	}
	r.checking = make(chan struct{})
	r.mu.Unlock()
	// Others wait for the answer, so it must not end with this request.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyTimeout)
	err := r.check(ctx)
	cancel()
	r.mu.Lock()
	r.err, r.asked = err, time.Now()
	close(r.checking)
	r.checking = nil
	return err
}
