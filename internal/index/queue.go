package index

import (
	"context"
	"fmt"
	"time"
)

// Lease gives the caller at most n jobs of a queue for the time d: queued ones,
// and running ones whose lease has run out. Nobody else gets them until then,
// unless the lease is ended by Finish or Retry, or lengthened by Extend. A
// consumer that dies is followed by another one, so a job may be done more than
// once. There is no waiting: no jobs and no error means ask again later.
func (db *DB) Lease(ctx context.Context, queue string, n int, d time.Duration) ([]Job, error) {
	// Asking an idle queue costs a read and no write.
	waiting, err := all(ctx, db, "SELECT id FROM jobs WHERE queue = $1 AND "+active+" AND ready <= $2 LIMIT 1",
		func(scan scan) (id string, err error) { return id, scan(&id) }, queue, now())
	var jobs []Job
	if err == nil && len(waiting) > 0 && n > 0 {
		err = db.engine.transact(ctx, func(ctx context.Context, q querier) (err error) {
			jobs, err = db.lease(ctx, q, queue, n, d)
			return err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("index: lease of %s: %w", queue, err)
	}
	return jobs, nil
}

// blocked tells of a queued job j that one with its key is before it.
const blocked = `j.key <> '' AND j.state = 'queued' AND EXISTS (SELECT 1 FROM jobs AS o
	WHERE o.queue = j.queue AND o.key = j.key AND o.state IN ('queued', 'running') AND o.id <> j.id
		AND (o.seq < j.seq OR o.state = 'running'))`

// parkMax is how many jobs one Lease parks at most, to keep it short.
const parkMax = 1000

func (db *DB) lease(ctx context.Context, q querier, queue string, n int, d time.Duration) ([]Job, error) {
	if err := q.lock(ctx, queueLock(queue)); err != nil {
		return nil, err
	}
	at := now()
	// Without this, a thousand jobs behind one that isn't done yet would be
	// looked at again each time.
	_, err := q.exec(ctx, "UPDATE jobs SET ready = $3 WHERE seq IN (SELECT seq FROM jobs AS j WHERE queue = $1 AND "+active+
		" AND ready <= $2 AND "+blocked+" ORDER BY ready, seq LIMIT $4)", queue, at, parkedUntil, parkMax)
	if err != nil {
		return nil, err
	}
	heads, err := collect(ctx, q, "SELECT "+jobColumns+" FROM jobs AS j WHERE queue = $1 AND "+active+
		" AND ready <= $2 AND NOT ("+blocked+") ORDER BY ready, seq LIMIT $3 {locked}", scanJob, queue, at, n)
	if err != nil {
		return nil, err
	}
	var jobs []Job
	for _, j := range heads {
		if j.Canceling { // and whoever had it is gone
			if err := end(ctx, q, j, Canceled, nil); err != nil {
				return nil, err
			}
			continue
		}
		j.State, j.Attempts, j.Updated = Running, j.Attempts+1, timeOf(at)
		_, err := q.exec(ctx, "UPDATE jobs SET state = $2, attempts = $3, ready = $4, updated = $5 WHERE id = $1",
			j.ID, j.State, j.Attempts, at+d.Microseconds(), at)
		if err != nil {
			return nil, err
		}
		jobs = append(jobs, j)
	}
	return jobs, nil
}

// held changes a running job whose lease the caller has, in one transaction
// together with the queue.
func (db *DB) held(ctx context.Context, job Job, what string, f func(context.Context, querier, Job) error) error {
	err := db.engine.transact(ctx, func(ctx context.Context, q querier) error {
		if err := q.lock(ctx, queueLock(job.Queue)); err != nil {
			return err
		}
		found, err := collect(ctx, q, "SELECT "+jobColumns+" FROM jobs WHERE id = $1 AND state = 'running' AND attempts = $2",
			scanJob, job.ID, job.Attempts)
		if err != nil {
			return err
		}
		if len(found) == 0 {
			return ErrLeaseLost
		}
		return f(ctx, q, found[0])
	})
	if err != nil {
		return fmt.Errorf("index: %s job %s of %s: %w", what, job.ID, job.Queue, err)
	}
	return nil
}

// Extend makes a lease end d from now, and records the job's progress unless it
// is nil.
//
// Errors: ErrLeaseLost when the job was given to somebody else or has ended;
// ErrCanceled, with the lease extended, when the job is to be canceled: stop,
// and Finish it as Canceled.
func (db *DB) Extend(ctx context.Context, job Job, d time.Duration, progress []byte) error {
	canceling := false
	err := db.held(ctx, job, "extend", func(ctx context.Context, q querier, found Job) error {
		canceling = found.Canceling
		if progress == nil {
			progress = found.Progress
		}
		_, err := q.exec(ctx, "UPDATE jobs SET ready = $2, progress = $3, updated = $4 WHERE id = $1",
			job.ID, now()+d.Microseconds(), notNull(progress), now())
		return err
	})
	if err == nil && canceling {
		err = fmt.Errorf("index: job %s of %s: %w", job.ID, job.Queue, ErrCanceled)
	}
	return err
}

// Finish ends a job as Succeeded, Failed or Canceled.
//
// Errors: ErrLeaseLost.
func (db *DB) Finish(ctx context.Context, job Job, state string, result []byte) error {
	if state != Succeeded && state != Failed && state != Canceled {
		return fmt.Errorf("index: job %s of %s can't finish as %q", job.ID, job.Queue, state)
	}
	return db.held(ctx, job, "finish", func(ctx context.Context, q querier, found Job) error {
		return end(ctx, q, found, state, result)
	})
}

// Retry gives a job back, to be leased again once the time after has passed. If
// it is to be canceled, it is.
//
// Errors: ErrLeaseLost.
func (db *DB) Retry(ctx context.Context, job Job, after time.Duration) error {
	return db.held(ctx, job, "retry", func(ctx context.Context, q querier, found Job) error {
		if found.Canceling {
			return end(ctx, q, found, Canceled, nil)
		}
		_, err := q.exec(ctx, "UPDATE jobs SET state = 'queued', ready = $2, updated = $3 WHERE id = $1",
			job.ID, now()+after.Microseconds(), now())
		if err != nil {
			return err
		}
		return advance(ctx, q, found)
	})
}

// end ends a job and lets the next one with its key be leased.
func end(ctx context.Context, q querier, job Job, state string, result []byte) error {
	_, err := q.exec(ctx, "UPDATE jobs SET state = $2, result = $3, updated = $4 WHERE id = $1", job.ID, state, notNull(result), now())
	if err != nil {
		return err
	}
	return advance(ctx, q, job)
}

// advance lets the first job with the key of one that isn't running any more be
// leased. It comes behind those of other keys that are ready now: keys take
// turns.
func advance(ctx context.Context, q querier, job Job) error {
	if job.Key == "" {
		return nil
	}
	_, err := q.exec(ctx, `UPDATE jobs SET ready = $3 WHERE seq = (SELECT min(seq) FROM jobs WHERE queue = $1 AND key = $2 AND `+active+`)
		AND state = 'queued' AND (ready < $3 OR ready = $4)`, job.Queue, job.Key, now(), parkedUntil)
	return err
}

// CancelJob cancels a job: at once when it is queued; when it is running, its
// consumer learns of it by Extend, and if the consumer is gone the job ends when
// the lease does. What has ended stays as it is. It returns the job after that.
//
// Errors: ErrNotFound.
func (db *DB) CancelJob(ctx context.Context, id string) (Job, error) {
	job, err := db.Job(ctx, id)
	if err != nil {
		return job, err
	}
	err = db.engine.transact(ctx, func(ctx context.Context, q querier) error {
		if err := q.lock(ctx, queueLock(job.Queue)); err != nil {
			return err
		}
		found, err := collect(ctx, q, "SELECT "+jobColumns+" FROM jobs WHERE id = $1", scanJob, id)
		if err != nil {
			return err
		}
		switch {
		case len(found) == 0:
			return ErrNotFound
		case found[0].State == Queued:
			return end(ctx, q, found[0], Canceled, nil)
		case found[0].State == Running:
			_, err = q.exec(ctx, "UPDATE jobs SET canceling = 1, updated = $2 WHERE id = $1", id, now())
		}
		return err
	})
	if err != nil {
		return job, fmt.Errorf("index: cancel job %s: %w", id, err)
	}
	return db.Job(ctx, id)
}

// PruneJobs forgets jobs that ended before a time.
func (db *DB) PruneJobs(ctx context.Context, before time.Time) error {
	var tx Tx
	tx.add("DELETE FROM jobs WHERE NOT "+active+" AND updated < $1", micros(before))
	return db.send(ctx, &tx, "prune jobs")
}

// queueLock names what orders the changes of a queue, other than enqueueing.
func queueLock(queue string) string { return "queue " + queue }

// notNull keeps a nil slice from being a NULL.
func notNull(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}
