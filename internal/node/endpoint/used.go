package endpoint

import (
	"context"
	"errors"
	"net/http"
	"os"
	"time"
)

const (
	// IdleTime is how long a daemon of ServeWhileUsed stays when nobody uses it.
	IdleTime = 5 * time.Second

	// idleCheck is how often it's looked whether somebody does.
	idleCheck = 250 * time.Millisecond
)

// ServeWhileUsed answers clients at a socket until used has said false for
// IdleTime, and then removes the socket: idle is true. It ends before that with ctx, and
// with an error of used.
func ServeWhileUsed(ctx context.Context, socket string, h http.Handler, used func() (bool, error)) (idle bool, err error) {
	for {
		l, err := Listen(socket)
		if err != nil {
			return false, err
		}
		serving, stop := context.WithCancel(ctx)
		served := make(chan error, 1)
		go func() { served <- Serve(serving, l, h) }()
		err = waitIdle(ctx, used)
		// Requests that came meanwhile are still answered.
		stop()
		if err := errors.Join(err, <-served); err != nil {
			return false, err
		}
		if ctx.Err() != nil {
			return false, nil
		}
		again, err := used()
		if err != nil {
			return false, err
		}
		if !again {
			break
		}
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	return true, nil
}

// waitIdle returns when used has said false for a while, or ctx ends.
func waitIdle(ctx context.Context, used func() (bool, error)) error {
	tick := time.NewTicker(idleCheck)
	defer tick.Stop()
	var since time.Time // when used began to say false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now, err := used()
		switch {
		case err != nil:
			return err
		case now:
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
		case time.Since(since) > IdleTime:
			return nil
		}
	}
}
