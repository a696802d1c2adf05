package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"sluice/internal/durable"
	"sluice/internal/node/happening"
	"sluice/oci"
)

// Options configures a Server. Root, Teleport and Ordinary are required.
type Options struct {
	// Root is a directory for what is remembered, made if it's missing.
	Root string

	Teleport Teleport
	Ordinary Ordinary

	// Info is told to clients. The PID is added.
	Info Info

	// Node returns what clients are told of the machine, a value that is JSON.
	// Nil: nothing is.
	Node func(ctx context.Context) any

	// Events is what GET /v1/events tells. Nil: nothing is told.
	Events *happening.Log

	// Log receives what went on. Nil discards it.
	Log *slog.Logger
}

// Server mounts images for processes. Its methods may be called concurrently.
type Server struct {
	opts Options
	log  *slog.Logger
	stop context.CancelFunc
	done sync.WaitGroup // the watch

	// keeping is held while records of images change, before mu.
	keeping sync.Mutex

	mu     sync.Mutex
	claims map[string]Claim // mounted
	kept   map[string]Kept  // by reference
	busy   int              // requests under way
}

const (
	// restoreTimeout bounds how long a start waits for what was mounted.
	restoreTimeout = 10 * time.Second
	restoreAtOnce  = 8

	// watchEvery is how soon it's noticed that a claim's process has ended.
	watchEvery = 250 * time.Millisecond
)

// Open goes on with what is recorded in o.Root: images are held, and those of
// processes that are still there mounted. It comes before the Settled of Teleport.
func Open(ctx context.Context, o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.Info.PID = os.Getpid()
	s := &Server{opts: o, log: o.Log, claims: make(map[string]Claim), kept: make(map[string]Kept)}
	for _, dir := range []string{"claims", "images"} {
		if err := durable.MkdirAll(filepath.Join(o.Root, dir), 0o700); err != nil {
			return nil, fmt.Errorf("open the record of mounts: %w", err)
		}
	}
	if err := s.restore(ctx); err != nil {
		return nil, fmt.Errorf("open the record of mounts: %w", err)
	}
	watching, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	s.done.Go(func() { s.watch(watching) })
	return s, nil
}

// Close ends the server's part. What is mounted stays.
func (s *Server) Close() {
	s.stop()
	s.done.Wait()
}

// images returns where the images of a kind are.
func (s *Server) images(teleported bool) Images {
	if teleported {
		return s.opts.Teleport
	}
	return s.opts.Ordinary
}

// restore goes on with what is recorded.
func (s *Server) restore(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, restoreTimeout, fmt.Errorf("not restored within %v", restoreTimeout))
	defer cancel()
	kept, err := records(s.log, filepath.Join(s.opts.Root, "images"), func(k Kept) string { return s.keptFile(k) })
	if err != nil {
		return err
	}
	for _, k := range kept {
		if err := s.hold(ctx, k); err != nil {
			s.log.WarnContext(ctx, "an image is not here any more, and is forgotten", "image", k.Reference, "error", err)
			if err := durable.Remove(s.keptFile(k)); err != nil {
				return err
			}
			continue
		}
		s.kept[k.Reference] = k
	}
	claims, err := records(s.log, filepath.Join(s.opts.Root, "claims"), func(c Claim) string { return s.claimFile(c.ID) })
	if err != nil {
		return err
	}
	var group errgroup.Group
	group.SetLimit(restoreAtOnce)
	for _, c := range claims {
		group.Go(func() error {
			if c.gone() {
				return s.forget(c) // nobody owns the mount: it isn't restored
			}
			// Also one that can't be mounted is there: the mount of the last
			// process may be.
			if _, err := s.images(c.Teleported).Stack(ctx, c.Image, c.owner()); err != nil {
				s.log.ErrorContext(ctx, "a mount can't be restored", "image", c.Reference, "pid", c.PID, "error", err)
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			s.claims[c.ID] = c
			return nil
		})
	}
	return group.Wait()
}

// maxRecord bounds a record, in bytes.
const maxRecord = 64 << 10

// records reads the records in a directory. What isn't one is left out and removed.
func records[T any](log *slog.Logger, dir string, file func(T) string) ([]T, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var list []T
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		v, err := readRecord[T](name)
		if err == nil && file(v) != name {
			err = errors.New("it's another one's")
		}
		if err == nil {
			list = append(list, v)
			continue
		}
		if !durable.IsTemp(e.Name()) {
			log.Error("a record of the last process can't be used", "record", name, "error", err)
		}
		if err := os.RemoveAll(name); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func readRecord[T any](name string) (v T, err error) {
	if !strings.HasSuffix(name, ".json") || durable.IsTemp(filepath.Base(name)) {
		return v, errors.New("it isn't a record")
	}
	content, err := durable.ReadFile(name, maxRecord)
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(content, &v); err != nil {
		return v, err
	}
	var id oci.Digest
	switch r := any(v).(type) {
	case Claim:
		id = r.Image
	case Kept:
		id = r.ID
	}
	_, err = oci.ParseDigest(id.String())
	return v, err
}

// watch ends the claims whose processes have ended.
func (s *Server) watch(ctx context.Context) {
	// What was pulled in vain, and what the claims had that weren't restored.
	s.opts.Teleport.Collect(ctx)
	s.opts.Ordinary.Collect(ctx)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	failed := make(map[string]bool) // has been told
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, c := range s.Claims() {
			if !c.gone() {
				continue
			}
			err := s.end(ctx, c)
			if err != nil && !failed[c.ID] {
				s.log.WarnContext(ctx, "a mount of a process that has ended stays", "image", c.Reference, "pid", c.PID, "error", err)
			}
			failed[c.ID] = err != nil
		}
	}
}
