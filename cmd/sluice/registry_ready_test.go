package main

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// However many ask, the storage is asked once in a while.
func TestReadiness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("broken")
		checks := 0
		r := readiness{check: func(ctx context.Context) error {
			checks++
			time.Sleep(time.Second)
			if checks == 2 {
				return broken
			}
			return ctx.Err()
		}}
		for i, want := range []error{nil, broken, nil} {
			var all sync.WaitGroup
			for range 100 {
				all.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), time.Second/2) // a client in a hurry
					defer cancel()
					if err := r.ready(ctx); !errors.Is(err, want) || (err == nil) != (want == nil) {
						t.Errorf("round %d: %v, want %v", i, err, want)
					}
				})
			}
			all.Wait()
			if checks != i+1 {
				t.Errorf("round %d: %d checks, want one in each", i, checks)
			}
			time.Sleep(readyAge)
		}
	})
}
