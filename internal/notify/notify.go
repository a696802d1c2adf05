package notify

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"time"

	"sluice/internal/index"
)

// Options of a Notifier; the zero value is the default.
type Options struct {
	Endpoints []Endpoint

	// URL is the registry's as its clients know it, for links to what happened.
	// Empty: events have no links.
	URL string

	// Instance tells replicas apart in events' sources.
	Instance string

	// Retain is how long an event is tried to be delivered. 0 means 24 hours.
	Retain time.Duration

	// RetryMin and RetryMax bound the pause before an event is sent again: it
	// doubles from the one to the other. 0 means 1 second and 10 minutes.
	RetryMin, RetryMax time.Duration

	// Poll is how often the index is asked for news. 0 means 1 second.
	Poll time.Duration

	// TLS is for endpoints that the system's roots don't vouch for. nil: those
	// roots.
	TLS *tls.Config

	// Observe is called with every attempt to deliver, by several goroutines.
	// May be nil.
	Observe func(Attempt)

	// Log gets what could not be delivered. May be nil.
	Log *slog.Logger
}

// Attempt is one attempt to deliver an event, for metrics.
type Attempt struct {
	Endpoint string
	Outcome  Outcome
	Took     time.Duration
}

// Outcome is how an attempt ended.
type Outcome string

// The outcomes.
const (
	Delivered Outcome = "delivered"
	Retried   Outcome = "retried" // it failed and will be made again
	Dropped   Outcome = "dropped" // it failed, and Options.Retain has passed
)

// Notifier delivers events. Any number may run on one index, one per replica.
type Notifier struct {
	db        *index.DB
	opts      Options
	endpoints []Endpoint
	base      *url.URL
	client    *http.Client
}

// New returns a Notifier of the events in db, or what is wrong with opts.
func New(db *index.DB, opts Options) (*Notifier, error) {
	setDefault(&opts.Retain, 24*time.Hour)
	setDefault(&opts.RetryMin, time.Second)
	setDefault(&opts.RetryMax, 10*time.Minute)
	setDefault(&opts.Poll, time.Second)
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Observe == nil {
		opts.Observe = func(Attempt) {}
	}
	n := &Notifier{db: db, opts: opts}
	seen := map[string]bool{}
	for _, e := range opts.Endpoints {
		e, err := e.check()
		if err != nil {
			return nil, err
		}
		if seen[e.Name] {
			return nil, fmt.Errorf("two endpoints are named %s", e.Name)
		}
		seen[e.Name] = true
		n.endpoints = append(n.endpoints, e)
	}
	if opts.URL != "" {
		var err error
		if n.base, err = url.Parse(opts.URL); err != nil {
			return nil, fmt.Errorf("the registry's URL: %w", err)
		}
	}
	n.client = &http.Client{
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			TLSClientConfig:        opts.TLS,
			ForceAttemptHTTP2:      true,
			MaxIdleConnsPerHost:    defaultConcurrency,
			IdleConnTimeout:        time.Minute,
			MaxResponseHeaderBytes: maxAnswer,
		},
		// A redirect could lead what is signed, and the headers, to anywhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return n, nil
}

func setDefault(d *time.Duration, value time.Duration) {
	if *d == 0 {
		*d = value
	}
}

// Run delivers until ctx ends, and then gives back what it had begun, to be
// continued by another run.
func (n *Notifier) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { n.repeat(ctx, Queue, n.fanOut) })
	for _, e := range n.endpoints {
		wg.Go(func() {
			n.repeat(ctx, e.queue(), func(ctx context.Context) (bool, error) { return n.deliver(ctx, e) })
		})
	}
	wg.Wait()
	n.client.CloseIdleConnections()
}

// repeat does step until ctx ends, after a pause unless there was something to
// do.
func (n *Notifier) repeat(ctx context.Context, queue string, step func(context.Context) (bool, error)) {
	for ctx.Err() == nil {
		some, err := step(ctx)
		if err != nil && ctx.Err() == nil {
			n.opts.Log.Error("notifications wait: the index can't be used", "queue", queue, "error", err)
		}
		if some && err == nil {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(n.opts.Poll):
		}
	}
}

const (
	batch = 32               // events fanned out at once
	lease = 30 * time.Second // what a job is taken for, beyond a delivery's time-out
)

// fanOut hands events to the queues of the endpoints that want them. When it
// is interrupted, some may be handed over twice; none is lost.
func (n *Notifier) fanOut(ctx context.Context) (some bool, err error) {
	jobs, err := n.take(ctx, Queue, batch, lease)
	if err != nil || len(jobs) == 0 {
		return false, err
	}
	err = n.update(ctx, func(tx *index.Tx) error {
		for _, job := range jobs {
			event, err := parseEvent(job.Payload)
			if err != nil {
				n.opts.Log.Error("an event can't be delivered", "job", job.ID, "error", err)
				continue // nor later
			}
			for _, e := range n.endpoints {
				if e.wants(event) {
					tx.Enqueue(e.queue(), event.Repository, job.Payload)
				}
			}
		}
		return nil
	})
	errs := []error{err}
	for _, job := range jobs {
		if err != nil {
			errs = append(errs, n.retry(ctx, job, 0))
		} else {
			errs = append(errs, n.finish(ctx, job, index.Succeeded))
		}
	}
	return err == nil, errors.Join(errs...)
}

// take leases jobs, whether or not ctx ends meanwhile: they could not be given
// back if nobody knew which they are.
func (n *Notifier) take(ctx context.Context, queue string, most int, d time.Duration) ([]index.Job, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settle)
	defer cancel()
	return n.db.Lease(ctx, queue, most, d)
}
