// Package background is work that goes on behind the methods of something that is
// open, and ends when that is closed.
package background

import (
	"context"
	"sync"
)

// Work is all that goes on behind one owner, who has to Stop it. Use New. It may be used
// concurrently.
type Work struct {
	ctx    context.Context // of all of it: its whole meaning is to end with the owner
	cancel context.CancelFunc

	mu      sync.Mutex // a leaf lock
	stopped bool
	running sync.WaitGroup // added to under mu, unless stopped
}

// New returns work of which there is none yet.
func New() *Work {
	w := &Work{}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	return w
}

// Go runs fn, which must end soon after its context does. After Stop it does nothing.
func (w *Work) Go(fn func(ctx context.Context)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.stopped {
		w.running.Go(func() { fn(w.ctx) })
	}
}

// Stop ends the work's context and returns when all of it has ended. It may be called
// again.
func (w *Work) Stop() {
	w.mu.Lock()
	w.stopped = true
	w.mu.Unlock()
	w.cancel()
	w.running.Wait()
}
