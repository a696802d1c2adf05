package main

import (
	"context"
	"sync"
	"time"
)

const (
	sweepInterval     = time.Hour
	reconcileInterval = 10 * time.Minute
	purgeInterval     = time.Hour
	forgetInterval    = time.Hour

	// jobMemory is how long what became of a job can be asked for.
	jobMemory    = 7 * 24 * time.Hour
	tidyInterval = 24 * time.Hour
)

// maintain starts what keeps a registry in order, until ctx ends. Every replica
// does all of it; what only one may do at a time they settle by locks of the
// index.
func (s *server) maintain(ctx context.Context, background *sync.WaitGroup) {
	every := func(interval time.Duration, what string, work func(context.Context) error) {
		background.Go(func() {
			tick := time.NewTicker(interval)
			defer tick.Stop()
			for {
				if err := work(ctx); err != nil && ctx.Err() == nil {
					s.log.Error(what+" did not end; it is tried again", "error", err, "in", interval)
				}
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
			}
		})
	}
	every(sweepInterval, "sweeping", s.sweep)
	every(reconcileInterval, "reconciling the index", s.registry.Reconcile)
	every(purgeInterval, "purging", s.purge)
	every(forgetInterval, "forgetting old jobs", s.forget)
	if interval := s.config.GarbageCollection.Interval; interval > 0 {
		every(interval, "garbage collection", s.collect)
	}
	background.Go(func() { s.manager.RunImports(ctx) })
	if s.streaming != nil {
		background.Go(func() { s.streaming.Run(ctx) })
		every(tidyInterval, "tidying converted layers", s.tidy)
	}
	if s.teleport != nil {
		background.Go(func() { s.teleport.Run(ctx) })
		if s.samba != nil {
			background.Go(func() { s.samba.Run(ctx) })
		}
		every(tidyInterval, "tidying Teleport's disks", s.teleport.Tidy)
	}
	if s.authority != nil {
		background.Go(func() { s.authority.Run(ctx) })
	}
	if s.notifier != nil {
		background.Go(func() { s.notifier.Run(ctx) })
	}
}

// sweep clears away abandoned uploads and what crashes left.
func (s *server) sweep(ctx context.Context) error {
	swept, err := s.store.Sweep(ctx, s.config.Push.UploadAge)
	if swept.Uploads+swept.Temporary+swept.Shared > 0 {
		s.log.Info("swept", "uploads", swept.Uploads, "temporary", swept.Temporary, "shared", swept.Shared)
	}
	return err
}

// purge removes for good what was deleted long enough ago.
func (s *server) purge(ctx context.Context) error {
	purged, err := s.registry.Purge(ctx)
	if purged > 0 {
		s.log.Info("purged deleted manifests", "count", purged)
	}
	return err
}

// forget forgets imports, conversions, expansions and deliveries that ended long ago.
func (s *server) forget(ctx context.Context) error {
	return s.index.PruneJobs(ctx, time.Now().Add(-jobMemory))
}

// collect removes blobs that nothing needs.
func (s *server) collect(ctx context.Context) error {
	collected, err := s.registry.Collect(ctx, s.config.GarbageCollection.Grace)
	if collected.Blobs > 0 {
		s.log.Info("collected garbage", "blobs", collected.Blobs, "bytes", collected.Bytes)
	}
	return err
}

// tidy forgets converted layers that garbage collection has removed.
func (s *server) tidy(ctx context.Context) error {
	forgotten, err := s.streaming.Tidy(ctx)
	if forgotten > 0 {
		s.log.Info("forgot converted layers", "count", forgotten)
	}
	return err
}
