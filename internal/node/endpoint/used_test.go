package endpoint_test

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/node/endpoint"
)

func TestServeWhileUsed(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "s.sock")
	var unused atomic.Bool
	type end struct {
		idle bool
		err  error
	}
	serve := func(ctx context.Context, used func() (bool, error)) <-chan end {
		ended := make(chan end, 1)
		go func() {
			idle, err := endpoint.ServeWhileUsed(ctx, socket, http.NotFoundHandler(), used)
			ended <- end{idle, err}
		}()
		for { // until it answers, or has ended
			select {
			case e := <-ended:
				ended <- e
				return ended
			default:
			}
			req, err := endpoint.NewRequest(t.Context(), http.MethodGet, "/", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := endpoint.NewClient(socket).Do(req)
			if err == nil {
				resp.Body.Close()
				return ended
			}
			if !errors.Is(err, endpoint.ErrNobody) {
				t.Fatal(err)
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := serve(ctx, func() (bool, error) { return true, nil })
	cancel()
	if e := <-ended; e.idle || e.err != nil {
		t.Errorf("told to end: %+v", e)
	}
	lost := errors.New("lost")
	if e := <-serve(t.Context(), func() (bool, error) { return true, lost }); e.idle || !errors.Is(e.err, lost) {
		t.Errorf("with an error: %+v", e)
	}
	ended = serve(t.Context(), func() (bool, error) { return !unused.Load(), nil })
	began := time.Now()
	unused.Store(true)
	if e := <-ended; !e.idle || e.err != nil || time.Since(began) < endpoint.IdleTime/2 {
		t.Errorf("unused: %+v after %v", e, time.Since(began))
	}
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its socket is left: %v", err)
	}
}
