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

func (tx *Tx) enqueue(queue, key string, payload []byte, single int) string {
	id := rand.Text()
	tx.add(`INSERT INTO jobs (id, queue, key, single, payload, state, canceling, progress, result, attempts, ready, created, updated)
		VALUES ($1, $2, $3, $4, $5, 'queued', 0, $6, $6, 0, $7, $7, $7) ON CONFLICT DO NOTHING`,
		id, queue, key, single, notNull(payload), []byte{}, now())
	return id
}

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
