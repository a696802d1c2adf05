package index

import (
	"context"
	"sync"
	"time"
)

// Worker does the jobs of a queue as they come. All fields but Wake must be set.
type Worker struct {
	Slots  int                                  // how many jobs at the same time
	Poll   time.Duration                        // how long it rests when there is none
	Wake   <-chan struct{}                      // ends a rest early
	Next   func(context.Context) ([]Job, error) // leases one job, or none
	Do     func(context.Context, Job)           // does it, and records what became of it
	Failed func(error)                          // is told errors of Next
}

// Run works until ctx ends, and returns when the jobs under way have stopped;
// another process, or the next one, takes them up again.
func (w Worker) Run(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	slots := make(chan struct{}, w.Slots)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		jobs, err := w.Next(ctx)
		if err == nil && len(jobs) > 0 {
			running.Go(func() {
				defer func() { <-slots }()
				w.Do(ctx, jobs[0])
			})
			continue
		}
		<-slots
		if err != nil && ctx.Err() == nil {
			w.Failed(err)
		}
		select {
		case <-w.Wake:
		case <-time.After(w.Poll):
		case <-ctx.Done():
			return
		}
	}
}
