package storage

import (
	"context"
	"time"
)

// Maintainer is what a server does with a Store besides storing.
type Maintainer interface {
	// Check tells whether the store can take objects now. Its error is for
	// whoever runs the server: what is wrong, and what to do.
	Check(ctx context.Context) error

	// Sweep removes what crashes and abandoned clients left behind: uploads
	// to which nothing happened for uploadAge, temporary things, and bytes
	// that no object has. It may run at any time, also in several processes
	// at once, and should when the store was opened and every now and then.
	Sweep(ctx context.Context, uploadAge time.Duration) (SweepResult, error)

	// Close ends the use of the store. Uploads must be closed before.
	Close() error
}

// Signer is a Store whose objects a client can read by itself, by URL.
type Signer interface {
	// SignedURL returns a URL that lets whoever has it GET the object, with
	// ranges, until ttl is over; at most an hour is promised to somebody who
	// begins to read after the object was deleted. Errors: ErrNotFound.
	SignedURL(ctx context.Context, key string, ttl time.Duration) (string, error)
}

var (
	_ Maintainer = (*Local)(nil)
	_ Maintainer = (*Memory)(nil)
	_ Maintainer = (*Objects)(nil)
	_ Store      = (*Objects)(nil)
	_ Signer     = (*Objects)(nil)
)

// Check implements Maintainer: there is always room.
func (m *Memory) Check(context.Context) error { return nil }

// Sweep implements Maintainer. There is nothing to remove: what a Memory holds
// ends with its process, abandoned uploads included.
func (m *Memory) Sweep(context.Context, time.Duration) (SweepResult, error) {
	return SweepResult{}, nil
}

// Close implements Maintainer.
func (m *Memory) Close() error { return nil }
