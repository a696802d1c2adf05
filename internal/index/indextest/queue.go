package indextest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"sluice/internal/index"
)

func queue() map[string]func(*testing.T, *index.DB) {
	return map[string]func(*testing.T, *index.DB){
		"Life":          testJobLife,
		"InOrderByKey":  testInOrderByKey,
		"KeysTakeTurns": testKeysTakeTurns,
		"LeaseRunsOut":  testLeaseRunsOut,
		"Retry":         testRetry,
		"Cancel":        testCancel,
		"Once":          testOnce,
		"Anew":          testAnew,
		"Prune":         testPrune,
		"Jobs":          testJobs,
		"Queues":        testQueues,
		"Consumers":     func(t *testing.T, db *index.DB) { Consumers(t, db) },
	}
}

func enqueue(t *testing.T, db *index.DB, key string, payloads ...string) {
	t.Helper()
	for _, p := range payloads {
		must(t, db.Update(soon(t), func(tx *index.Tx) error { tx.Enqueue("q", key, []byte(p)); return nil }))
	}
}

// lease leases and looks at the payloads.
func lease(t *testing.T, db *index.DB, n int, d time.Duration, want ...string) []index.Job {
	t.Helper()
	jobs, err := db.Lease(soon(t), "q", n, d)
	must(t, err)
	var got []string
	for _, j := range jobs {
		got = append(got, string(j.Payload))
	}
	if !slices.Equal(got, want) {
		t.Fatalf("leased %q, want %q", got, want)
	}
	return jobs
}

func testJobLife(t *testing.T, db *index.DB) {
	ctx := soon(t)
	lease(t, db, 1, time.Hour)
	enqueue(t, db, "k", "payload")
	if jobs, err := db.Lease(ctx, "other", 1, time.Hour); err != nil || len(jobs) != 0 {
		t.Fatalf("leased of another queue: %v, %v", jobs, err)
	}
	job := lease(t, db, 5, time.Hour, "payload")[0]
	if job.State != index.Running || job.Attempts != 1 || job.Queue != "q" || job.Key != "k" {
		t.Errorf("leased %+v", job)
	}
	lease(t, db, 1, time.Hour)
	must(t, db.Extend(ctx, job, time.Hour, []byte("half")))
	must(t, db.Extend(ctx, job, time.Hour, nil))
	if got, err := db.Job(ctx, job.ID); err != nil || got.State != index.Running || string(got.Progress) != "half" {
		t.Errorf("running: %+v, %v", got, err)
	}
	if err := db.Finish(ctx, job, index.Queued, nil); err == nil {
		t.Error("finished as queued")
	}
	must(t, db.Finish(ctx, job, index.Succeeded, []byte("done")))
	got, err := db.LatestJob(ctx, "q", "k")
	if err != nil || got.ID != job.ID || got.State != index.Succeeded || string(got.Result) != "done" || got.Updated.Before(got.Created) {
		t.Errorf("ended: %+v, %v", got, err)
	}
	for what, err := range map[string]error{
		"Finish": db.Finish(ctx, job, index.Failed, nil), "Extend": db.Extend(ctx, job, time.Hour, nil), "Retry": db.Retry(ctx, job, 0),
	} {
		if !errors.Is(err, index.ErrLeaseLost) {
			t.Errorf("%s of an ended job: %v, want ErrLeaseLost", what, err)
		}
	}
	if _, err := db.Job(ctx, "nobody"); !errors.Is(err, index.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	if _, err := db.LatestJob(ctx, "q", "nobody"); !errors.Is(err, index.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
}

func testInOrderByKey(t *testing.T, db *index.DB) {
	enqueue(t, db, "a", "a1", "a2", "a3")
	enqueue(t, db, "", "x1", "x2")
	jobs := lease(t, db, 9, time.Hour, "a1", "x1", "x2")
	lease(t, db, 9, time.Hour)
	must(t, db.Finish(soon(t), jobs[0], index.Failed, nil))
	jobs = lease(t, db, 9, time.Hour, "a2")
	must(t, db.Finish(soon(t), jobs[0], index.Succeeded, nil))
	lease(t, db, 9, time.Hour, "a3")
}

func testKeysTakeTurns(t *testing.T, db *index.DB) {
	enqueue(t, db, "a", "a1", "a2", "a3")
	enqueue(t, db, "b", "b1", "b2")
	for _, want := range []string{"a1", "b1", "a2", "b2", "a3"} {
		must(t, db.Finish(soon(t), lease(t, db, 1, time.Hour, want)[0], index.Succeeded, nil))
	}
}

func testLeaseRunsOut(t *testing.T, db *index.DB) {
	ctx := soon(t)
	enqueue(t, db, "a", "a1", "a2")
	first := lease(t, db, 9, time.Hour, "a1")[0]
	lease(t, db, 9, time.Hour)
	must(t, db.Extend(ctx, first, time.Millisecond, nil)) // which shortens it
	time.Sleep(20 * time.Millisecond)
	first = lease(t, db, 9, 10*time.Millisecond, "a1")[0]
	time.Sleep(20 * time.Millisecond)
	second := lease(t, db, 9, time.Hour, "a1")[0]
	if second.Attempts != 3 || second.ID != first.ID {
		t.Errorf("leased again: %+v", second)
	}
	if err := db.Finish(ctx, first, index.Succeeded, nil); !errors.Is(err, index.ErrLeaseLost) {
		t.Errorf("finished with a lost lease: %v", err)
	}
	must(t, db.Extend(ctx, second, time.Hour, nil))
	must(t, db.Finish(ctx, second, index.Succeeded, nil))

	third := lease(t, db, 9, 40*time.Millisecond, "a2")[0]
	must(t, db.Extend(ctx, third, time.Hour, nil))
	time.Sleep(60 * time.Millisecond)
	lease(t, db, 9, time.Hour)
}

func testRetry(t *testing.T, db *index.DB) {
	ctx := soon(t)
	enqueue(t, db, "a", "a1", "a2")
	must(t, db.Retry(ctx, lease(t, db, 9, time.Hour, "a1")[0], time.Hour))
	lease(t, db, 9, time.Hour) // a2 stays behind a1
	enqueue(t, db, "b", "b1", "b2")
	must(t, db.Retry(ctx, lease(t, db, 9, time.Hour, "b1")[0], 10*time.Millisecond))
	time.Sleep(20 * time.Millisecond)
	job := lease(t, db, 9, time.Hour, "b1")[0]
	must(t, db.Retry(ctx, job, 0))
	job = lease(t, db, 9, time.Hour, "b1")[0]
	if job.Attempts != 3 {
		t.Errorf("attempt %d, want 3", job.Attempts)
	}
	must(t, db.Finish(ctx, job, index.Succeeded, nil))
	lease(t, db, 9, time.Hour, "b2")
}

func testCancel(t *testing.T, db *index.DB) {
	ctx := soon(t)
	enqueue(t, db, "a", "a1", "a2", "a3", "a4", "a5")
	cancel := func(j index.Job, want string) {
		t.Helper()
		if got, err := db.CancelJob(ctx, j.ID); err != nil || got.State != want {
			t.Fatalf("cancel: %+v, %v; want it %s", got, err, want)
		}
	}
	running := lease(t, db, 9, time.Hour, "a1")[0]
	cancel(running, index.Running)
	if err := db.Extend(ctx, running, time.Hour, nil); !errors.Is(err, index.ErrCanceled) {
		t.Errorf("got %v, want ErrCanceled", err)
	}
	must(t, db.Finish(ctx, running, index.Canceled, nil))
	cancel(running, index.Canceled)

	retried := lease(t, db, 9, time.Hour, "a2")[0] // instead of being retried, it ends
	cancel(retried, index.Running)
	must(t, db.Retry(ctx, retried, 0))
	dead := lease(t, db, 9, 20*time.Millisecond, "a3")[0] // its consumer dies
	cancel(dead, index.Running)
	time.Sleep(30 * time.Millisecond)
	lease(t, db, 9, time.Hour)
	if got, err := db.Job(ctx, dead.ID); err != nil || got.State != index.Canceled {
		t.Errorf("left behind: %+v, %v", got, err)
	}
	waiting := lease(t, db, 9, time.Hour, "a4")[0]
	must(t, db.Retry(ctx, waiting, time.Hour))
	lease(t, db, 9, time.Hour)
	cancel(waiting, index.Canceled)
	last := lease(t, db, 9, time.Hour, "a5")[0]
	must(t, db.Finish(ctx, last, index.Succeeded, nil))
	cancel(last, index.Succeeded)
	if _, err := db.CancelJob(ctx, "nobody"); !errors.Is(err, index.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
}

func testOnce(t *testing.T, db *index.DB) {
	ctx := soon(t)
	once := func(key, payload string) {
		must(t, db.Update(ctx, func(tx *index.Tx) error { tx.EnqueueOnce("q", key, []byte(payload)); return nil }))
	}
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() { once("a", "1") })
	}
	group.Wait()
	once("b", "2")
	jobs := lease(t, db, 9, time.Hour, "1", "2")
	once("a", "3") // the first one is running still
	must(t, db.Finish(ctx, jobs[0], index.Succeeded, nil))
	lease(t, db, 9, time.Hour)
	once("a", "4")
	lease(t, db, 9, time.Hour, "4")
}

func testPrune(t *testing.T, db *index.DB) {
	ctx := soon(t)
	enqueue(t, db, "", "1", "2", "3")
	jobs := lease(t, db, 2, time.Hour, "1", "2")
	must(t, db.Finish(ctx, jobs[0], index.Failed, nil))
	must(t, db.PruneJobs(ctx, time.Now().Add(-time.Hour)))
	_, err := db.Job(ctx, jobs[0].ID)
	must(t, err)
	must(t, db.PruneJobs(ctx, time.Now().Add(time.Hour)))
	if _, err := db.Job(ctx, jobs[0].ID); !errors.Is(err, index.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	_, err = db.Job(ctx, jobs[1].ID)
	must(t, err)
	lease(t, db, 9, time.Hour, "3")
}

// turn is the time that a consumer had a job.
type turn struct {
	job        byte // number in its key
	start, end time.Time
}

// Consumers has producers and consumers of all handles at one queue, some of
// whom die with a job in hand, and looks that every job is done, those of a key
// in the order they were enqueued and one at a time.
func Consumers(t *testing.T, handles ...*index.DB) {
	ctx := soon(t)
	const keys, each, life = 4, 12, 500 * time.Millisecond
	var producers, consumers sync.WaitGroup
	for key := range keys {
		producers.Go(func() {
			for i := range each {
				db := handles[i%len(handles)]
				err := db.Update(ctx, func(tx *index.Tx) error { tx.Enqueue("q", fmt.Sprint(key), []byte{byte(i)}); return nil })
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	var mu sync.Mutex
	turns := map[string][]turn{} // by key
	done := map[string]bool{}    // by ID
	consume := func(db *index.DB) error {
		jobs, err := db.Lease(ctx, "q", 2, life)
		if err != nil {
			return err
		}
		for _, j := range jobs {
			had := turn{j.Payload[0], j.Updated, j.Updated.Add(life)}
			if rand.N(15) > 0 { // lives
				ends := time.Now()
				err := db.Finish(ctx, j, index.Succeeded, nil)
				if err != nil && !errors.Is(err, index.ErrLeaseLost) {
					return err
				}
				if err == nil && ends.Before(had.end) {
					had.end = ends
				}
			}
			got, err := db.Job(ctx, j.ID)
			if err != nil {
				return err
			}
			mu.Lock()
			turns[j.Key] = append(turns[j.Key], had)
			done[j.ID] = got.State == index.Succeeded || done[j.ID]
			mu.Unlock()
		}
		return nil
	}
	all := func() bool {
		mu.Lock()
		defer mu.Unlock()
		n := 0
		for _, ended := range done {
			if ended {
				n++
			}
		}
		return n == keys*each
	}
	for i := range 6 {
		consumers.Go(func() {
			for ctx.Err() == nil && !all() {
				if err := consume(handles[i%len(handles)]); err != nil {
					t.Error(err)
					return
				}
				sleep(ctx, time.Duration(1+rand.N(4))*time.Millisecond)
			}
		})
	}
	producers.Wait()
	consumers.Wait()
	if !all() {
		t.Errorf("not all is done: %v", done)
	}
	for key, turns := range turns {
		slices.SortFunc(turns, func(a, b turn) int { return a.start.Compare(b.start) })
		before := turn{}
		for i, now := range turns {
			if i == 0 && now.job != 0 || now.job != before.job && now.job != before.job+1 || now.start.Before(before.end.Truncate(time.Microsecond)) {
				t.Errorf("key %s: %+v came after %+v", key, now, before)
			}
			before = now
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// Of jobs that come by EnqueueAnew one waits, and another may be under way.
func testAnew(t *testing.T, db *index.DB) {
	ctx := soon(t)
	anew := func(key, payload string) {
		t.Helper()
		must(t, db.Update(ctx, func(tx *index.Tx) error { tx.EnqueueAnew("q", key, []byte(payload)); return nil }))
	}
	anew("k", "1")
	anew("k", "waits already")
	anew("other", "other")
	first := lease(t, db, 2, time.Hour, "1", "other")
	anew("k", "2")
	anew("k", "waits already")
	must(t, db.Finish(ctx, first[0], index.Succeeded, nil))
	second := lease(t, db, 2, time.Hour, "2")
	must(t, db.Finish(ctx, second[0], index.Succeeded, nil))
	anew("k", "3")
	lease(t, db, 2, time.Hour, "3")
}

func testJobs(t *testing.T, db *index.DB) {
	enqueue(t, db, "a", "1", "2")
	enqueue(t, db, "", "without a key")
	enqueue(t, db, "b", "3")
	for n, want := range map[int][]string{-1: nil, 0: nil, 2: {"3", "2"}, 9: {"3", "2", "1"}} {
		jobs, err := db.Jobs(soon(t), "q", n)
		must(t, err)
		var got []string
		for _, j := range jobs {
			got = append(got, string(j.Payload))
		}
		if !slices.Equal(got, want) {
			t.Errorf("the last %d are %q, want %q", n, got, want)
		}
	}
}

func testQueues(t *testing.T, db *index.DB) {
	ctx := soon(t)
	must(t, db.Update(ctx, func(tx *index.Tx) error {
		for _, queue := range []string{"c/b/c", "c/a", "c/a", "c/é", "d/x", "c", "b/z"} {
			tx.Enqueue(queue, "", nil)
		}
		return nil
	}))
	next := func(after, want string) {
		t.Helper()
		if got, err := db.NextQueue(ctx, "c/", after); err != nil || got != want {
			t.Errorf("after %q comes %q, %v, want %q", after, got, err, want)
		}
	}
	next("", "c/a")
	next("c/a", "c/b/c")
	next("c/b/c", "c/é")
	next("c/é", "")
	next("d", "")
	count := func(wantQueued, wantRunning int) {
		t.Helper()
		if queued, running, err := db.CountJobs(ctx, "c/"); err != nil || queued != wantQueued || running != wantRunning {
			t.Errorf("%d queued and %d running, %v, want %d and %d", queued, running, err, wantQueued, wantRunning)
		}
	}
	count(4, 0)
	jobs, err := db.Lease(ctx, "c/a", 2, time.Hour)
	must(t, err)
	next("", "c/b/c")
	count(2, 2)
	must(t, db.Finish(ctx, jobs[0], index.Succeeded, nil))
	must(t, db.Retry(ctx, jobs[1], 0))
	next("", "c/a")
	count(3, 0)
}
