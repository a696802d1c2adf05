package notify

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"sluice/internal/index"
)

// maxAnswer bounds what is read of an answer, in bytes: nothing in it matters,
// but a connection can be used again only when its answer was read.
const maxAnswer = 64 << 10

// patience is how often an event is tried before those after it in its
// repository no longer wait for it: about a minute.
const patience = 7

// deliver takes as many jobs of an endpoint as may be sent side by side, which
// the index chooses from different repositories, and sends them.
func (n *Notifier) deliver(ctx context.Context, e Endpoint) (some bool, err error) {
	jobs, err := n.take(ctx, e.queue(), e.Concurrency, e.Timeout+lease)
	if err != nil || len(jobs) == 0 {
		return false, err
	}
	errs := make([]error, len(jobs))
	var wg sync.WaitGroup
	for i, job := range jobs {
		wg.Go(func() { errs[i] = n.attempt(ctx, e, job) })
	}
	wg.Wait()
	return true, errors.Join(errs...)
}

// attempt sends an event once and settles what becomes of its job. The error
// is the index's.
func (n *Notifier) attempt(ctx context.Context, e Endpoint, job index.Job) error {
	event, err := parseEvent(job.Payload)
	if err != nil { // fanOut checked it: the index was tampered with
		n.opts.Log.Error("an event can't be delivered", "endpoint", e, "job", job.ID, "error", err)
		return n.finish(ctx, job, index.Failed)
	}
	start := time.Now()
	after, err := n.send(ctx, e, event)
	took := time.Since(start)
	if err == nil {
		n.opts.Observe(Attempt{e.Name, Delivered, took})
		return n.finish(ctx, job, index.Succeeded)
	}
	if ctx.Err() != nil { // it was broken off: the next to run does it again
		return n.retry(ctx, job, 0)
	}
	log := n.opts.Log.With("endpoint", e, "repository", event.Repository, "event", event.ID, "error", err)
	pause := max(after, n.pause(job.Attempts))
	switch {
	case time.Since(event.Time)+pause > n.opts.Retain:
		log.Error("an event is dropped: it could not be delivered in time")
		n.opts.Observe(Attempt{e.Name, Dropped, took})
		return n.finish(ctx, job, index.Failed)
	case job.Key != "" && job.Attempts >= patience:
		log.Warn("an event could not be delivered; those after it don't wait any longer", "again", n.opts.RetryMin)
		n.opts.Observe(Attempt{e.Name, Retried, took})
		return n.stepAside(ctx, e, job)
	default:
		log.Warn("an event could not be delivered", "again", pause)
		n.opts.Observe(Attempt{e.Name, Retried, took})
		return n.retry(ctx, job, pause)
	}
}

// stepAside gives an event to a job without a key, for which none waits. A
// crash in between sends it twice.
func (n *Notifier) stepAside(ctx context.Context, e Endpoint, job index.Job) error {
	err := n.update(ctx, func(tx *index.Tx) error {
		tx.Enqueue(e.queue(), "", job.Payload)
		return nil
	})
	if err != nil {
		return err
	}
	return n.finish(ctx, job, index.Failed)
}

// pause is how long to wait after the attempts so far, between half of it and
// all of it at random so that what failed together isn't sent together.
func (n *Notifier) pause(attempts int) time.Duration {
	p := n.opts.RetryMin
	for i := 1; i < attempts && p < n.opts.RetryMax; i++ {
		p *= 2
	}
	p = min(p, n.opts.RetryMax)
	return p/2 + rand.N(p/2+1)
}

// settle is how long the index has to note what became of a job once ctx has
// ended; what it doesn't note is done again after the lease.
const settle = 5 * time.Second

// retry gives a job back, to be taken again after a pause.
func (n *Notifier) retry(ctx context.Context, job index.Job, after time.Duration) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settle)
	defer cancel()
	return unlessLost(n.db.Retry(ctx, job, after))
}

// update is index.DB.Update, whether or not ctx ends meanwhile: nobody would know
// then whether it was done, and it would be done twice, or the job stay with a
// Notifier that has stopped.
func (n *Notifier) update(ctx context.Context, f func(*index.Tx) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settle)
	defer cancel()
	return n.db.Update(ctx, f)
}

// finish notes that nothing more is to be done.
func (n *Notifier) finish(ctx context.Context, job index.Job, state string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settle)
	defer cancel()
	return unlessLost(n.db.Finish(ctx, job, state, nil))
}

// unlessLost is err, unless it took so long that another replica has the job.
func unlessLost(err error) error {
	if errors.Is(err, index.ErrLeaseLost) {
		return nil
	}
	return err
}

// send sends an event. after is how long the endpoint asks to be left
// alone, bounded by RetryMax. Errors quote neither URL nor secrets.
func (n *Notifier) send(ctx context.Context, e Endpoint, event Event) (after time.Duration, err error) {
	body, err := json.Marshal(event.envelope(n.base, n.opts.Instance))
	if err != nil {
		return 0, fmt.Errorf("writing an event: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, e.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, e.URL, bytes.NewReader(body))
	if err != nil {
		return 0, errors.New("its request can't be made")
	}
	for key, value := range e.Headers {
		req.Header.Set(key, value)
	}
	req.Header.Set("Content-Type", MediaType)
	req.Header.Set("User-Agent", "sluice")
	if e.Secret != "" {
		req.Header.Set(SignatureHeader, sign(e.Secret, body, time.Now()))
	}
	resp, err := n.client.Do(req)
	if err != nil {
		var withURL *url.Error
		if errors.As(err, &withURL) {
			err = withURL.Err
		}
		return 0, err
	}
	defer resp.Body.Close()
	if _, err := io.CopyN(io.Discard, resp.Body, maxAnswer); err != nil && err != io.EOF {
		return 0, fmt.Errorf("reading its answer: %w", err)
	}
	switch {
	case resp.StatusCode/100 == 2:
		return 0, nil
	case resp.StatusCode/100 == 3:
		return 0, fmt.Errorf("it answers %s, and redirects are not followed: configure where it leads to", resp.Status)
	default:
		seconds, err := strconv.Atoi(resp.Header.Get("Retry-After"))
		if err == nil && seconds > 0 {
			after = min(time.Duration(min(seconds, 1<<20))*time.Second, n.opts.RetryMax)
		}
		return after, fmt.Errorf("it answers %s", resp.Status)
	}
}
