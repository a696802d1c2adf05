package index

import (
	"context"
	"crypto/rand"
	"fmt"
	"math"
	"time"
)

// The states of a job. It is active while queued or running, and ended
// otherwise.
const (
	Queued    = "queued"
	Running   = "running"
	Succeeded = "succeeded"
	Failed    = "failed"
	Canceled  = "canceled"
)

// Job is one thing to be done at least once.
//
// Jobs of one queue with the same key, other than the empty one, are done one
// at a time, in the order they were enqueued: one that is retried later keeps
// those behind it waiting. Different keys take turns.
type Job struct {
	ID               string
	Queue, Key       string
	Payload          []byte
	State            string
	Progress         []byte // what its consumer last told
	Result           []byte // what its consumer told at the end
	Attempts         int    // how often it was leased; identifies the lease
	Canceling        bool   // somebody asked for it to be canceled while it was running
	Created, Updated time.Time
}

// parkedUntil is the ready time of a job that waits for another one with its key.
// Whether a job can be leased is then a matter of one index.
const parkedUntil = math.MaxInt64

const (
	jobColumns = "id, queue, key, payload, state, progress, result, attempts, canceling, created, updated"
	active     = "state IN ('queued', 'running')"
)

func scanJob(scan scan) (j Job, err error) {
	var created, updated, canceling int64
	err = scan(&j.ID, &j.Queue, &j.Key, &j.Payload, &j.State, &j.Progress, &j.Result, &j.Attempts, &canceling, &created, &updated)
	j.Created, j.Updated, j.Canceling = timeOf(created), timeOf(updated), canceling != 0
	return j, err
}

// Enqueue puts a job at the end of a queue.
func (tx *Tx) Enqueue(queue, key string, payload []byte) (id string) {
	return tx.enqueue(queue, key, payload, 0)
}

// EnqueueOnce is Enqueue, unless a job that came by it with the same queue and
// key is active. Which one is then active tells LatestJob.
func (tx *Tx) EnqueueOnce(queue, key string, payload []byte) {
	tx.enqueue(queue, key, payload, 1)
}

// EnqueueAnew is Enqueue, unless a job with the same queue and key waits. One that
// is being done doesn't count: it may have looked by then at what has changed now.
func (tx *Tx) EnqueueAnew(queue, key string, payload []byte) {
	id := tx.enqueue(queue, key, payload, 0)
	tx.add("DELETE FROM jobs WHERE id = $1 AND EXISTS (SELECT 1 FROM jobs WHERE queue = $2 AND key = $3 AND state = 'queued' AND id <> $1)", id, queue, key)
}

func (tx *Tx) enqueue(queue, key string, payload []byte, single int) string {
	id := newJobID()
	tx.add(`INSERT INTO jobs (id, queue, key, single, payload, state, canceling, progress, result, attempts, ready, created, updated)
		VALUES ($1, $2, $3, $4, $5, 'queued', 0, $6, $6, 0, $7, $7, $7) ON CONFLICT DO NOTHING`,
		id, queue, key, single, notNull(payload), []byte{}, now())
	return id
}

// newJobID returns a random UUID (RFC 9562, version 4): clients of Azure Container
// Registry look for one in what operations are called.
func newJobID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// NextQueue returns the first queue, by name, that has a job which may be leased
// now, of those that begin with prefix and come after the given name; "" if there
// is none. Queues of a common prefix that are asked for in turn share their
// consumers fairly.
func (db *DB) NextQueue(ctx context.Context, prefix, after string) (string, error) {
	names, err := all(ctx, db, "SELECT queue FROM jobs WHERE queue > $1 AND queue < $2 AND "+active+" AND ready <= $3 ORDER BY queue LIMIT 1",
		func(scan scan) (name string, err error) { return name, scan(&name) }, max(prefix, after), prefix+lastText, now())
	if err != nil {
		return "", fmt.Errorf("index: next queue of %s: %w", prefix, err)
	}
	if len(names) == 0 {
		return "", nil
	}
	return names[0], nil
}

// CountJobs returns how many jobs the queues that begin with prefix have waiting
// and running.
func (db *DB) CountJobs(ctx context.Context, prefix string) (queued, running int, err error) {
	counts, err := all(ctx, db, "SELECT state, COUNT(*) FROM jobs WHERE queue >= $1 AND queue < $2 AND "+active+" GROUP BY state",
		func(scan scan) (n struct {
			state string
			jobs  int
		}, err error) {
			return n, scan(&n.state, &n.jobs)
		}, prefix, prefix+lastText)
	if err != nil {
		return 0, 0, fmt.Errorf("index: jobs of %s: %w", prefix, err)
	}
	for _, n := range counts {
		if n.state == Running {
			running = n.jobs
		} else {
			queued = n.jobs
		}
	}
	return queued, running, nil
}

// lastText sorts behind every other text.
const lastText = "\U0010FFFF"

// Job returns a job. Errors: ErrNotFound.
func (db *DB) Job(ctx context.Context, id string) (Job, error) {
	j, err := one(ctx, db, "SELECT "+jobColumns+" FROM jobs WHERE id = $1", scanJob, id)
	if err != nil {
		return j, fmt.Errorf("index: job %s: %w", id, err)
	}
	return j, nil
}

// LatestJob returns the job of a queue with a key that was enqueued last.
//
// Errors: ErrNotFound.
func (db *DB) LatestJob(ctx context.Context, queue, key string) (Job, error) {
	j, err := one(ctx, db, "SELECT "+jobColumns+" FROM jobs WHERE queue = $1 AND key = $2 ORDER BY seq DESC LIMIT 1", scanJob, queue, key)
	if err != nil {
		return j, fmt.Errorf("index: latest job of %s for %s: %w", queue, key, err)
	}
	return j, nil
}

// Jobs returns the last n jobs of a queue that have a key, the newest first.
func (db *DB) Jobs(ctx context.Context, queue string, n int) ([]Job, error) {
	jobs, err := all(ctx, db, "SELECT "+jobColumns+" FROM jobs WHERE queue = $1 AND key <> '' ORDER BY seq DESC LIMIT $2", scanJob, queue, max(n, 0))
	if err != nil {
		return nil, fmt.Errorf("index: jobs of %s: %w", queue, err)
	}
	return jobs, nil
}
