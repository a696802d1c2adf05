package serve

import (
	"context"
	"errors"
	"log/slog"
)

// ErrLost ends a daemon whose mounts were taken away. The next one makes new
// ones.
var ErrLost = errors.New("the FUSE connection is lost: somebody unmounted or aborted it")

// Lost returns ErrLost once lost is closed. A nil channel never is.
func Lost(lost <-chan struct{}) error {
	select {
	case <-lost:
		return ErrLost
	default:
		return nil
	}
}

// Until runs a daemon until ctx ends or the daemon fails: anew when it is lost.
func Until(ctx context.Context, log *slog.Logger, daemon func(context.Context) error) error {
	for {
		err := daemon(ctx)
		if !errors.Is(err, ErrLost) || ctx.Err() != nil {
			return err
		}
		log.Error("starting anew with fresh mounts; containers that run have lost their images and must be restarted", "error", err)
	}
}
