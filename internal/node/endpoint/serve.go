package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

const (
	// headerTimeout is how long a client may take for a request's header.
	headerTimeout = 10 * time.Second

	// lastTimeout is how long requests under way may take when it's to end.
	lastTimeout = 10 * time.Second
)

// Serve answers clients of a listener until ctx ends, then lets requests end, for
// ten seconds at most. It closes l.
func Serve(ctx context.Context, l net.Listener, h http.Handler) error {
	server := &http.Server{Handler: h, ReadHeaderTimeout: headerTimeout}
	served := make(chan struct{})
	var failure error // once it's served
	go func() { defer close(served); failure = server.Serve(l) }()
	select {
	case <-served:
		return fmt.Errorf("serve %s: %w", l.Addr(), failure)
	case <-ctx.Done():
	}
	last, stop := context.WithTimeout(context.WithoutCancel(ctx), lastTimeout)
	defer stop()
	err := server.Shutdown(last)
	if err != nil {
		err = errors.Join(err, server.Close())
	}
	<-served // which closes l, also if it had yet to begin
	return err
}
