package storage_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"sluice/internal/storage"
)

// The protocol of shared bytes under every order of requests that rapid comes
// up with: replicas push, link, delete, overwrite, read and sweep, each request
// is let through one at a time, some never get through because their process
// dies, and time passes in between.

// gate is a bucket whose requests wait for the scheduler.
type gate struct {
	*memoryBucket
	requests chan<- *request
	dead     atomic.Bool // no request gets through any more
}

// request is one that waits. The answer is nil, or the error instead of it.
type request struct {
	gate  *gate
	since time.Time
	let   chan error
}

var errDead = errors.New("process died")

func (g *gate) wait() error {
	if g.dead.Load() {
		return errDead
	}
	r := &request{g, g.now(), make(chan error)}
	g.requests <- r
	return <-r.let
}

func (g *gate) Get(ctx context.Context, name string, offset, length int64) (io.ReadCloser, storage.BucketInfo, error) {
	if err := g.wait(); err != nil {
		return nil, storage.BucketInfo{}, err
	}
	return g.memoryBucket.Get(ctx, name, offset, length)
}

func (g *gate) Head(ctx context.Context, name string) (storage.BucketInfo, error) {
	if err := g.wait(); err != nil {
		return storage.BucketInfo{}, err
	}
	return g.memoryBucket.Head(ctx, name)
}

func (g *gate) Put(ctx context.Context, name string, data []byte, opts storage.BucketPut) error {
	if err := g.wait(); err != nil {
		return err
	}
	return g.memoryBucket.Put(ctx, name, data, opts)
}

func (g *gate) Delete(ctx context.Context, name string) error {
	if err := g.wait(); err != nil {
		return err
	}
	return g.memoryBucket.Delete(ctx, name)
}

// List lets other requests in after each two entries, as pages do.
func (g *gate) List(_ context.Context, prefix, after, delimiter string) iter.Seq2[storage.BucketEntry, error] {
	return func(yield func(storage.BucketEntry, error) bool) {
		for {
			if err := g.wait(); err != nil {
				yield(storage.BucketEntry{}, err)
				return
			}
			page := g.list(prefix, after, delimiter)
			for i, e := range page {
				if i == 2 {
					break
				}
				if !yield(e, nil) {
					return
				}
				after = e.Name
			}
			if len(page) <= 2 {
				return
			}
		}
	}
}

// actor is a process with one thing to do.
type actor struct {
	gate *gate
}

// world runs actors on one bucket.
type world struct {
	t        *rapid.T
	clock    *clock
	bucket   *memoryBucket
	requests chan *request
	finished chan *actor
	running  int
	waiting  []*request
}

func (w *world) open(b storage.Bucket) *storage.Objects {
	o, err := storage.NewObjects(b, storage.ObjectsOptions{Identity: identity})
	if err != nil {
		w.t.Fatal(err)
	}
	o.SetLimits(testPart, 0, w.clock.Now)
	return o
}

func (w *world) start(do func(o *storage.Objects)) {
	a := &actor{gate: &gate{memoryBucket: w.bucket, requests: w.requests}}
	w.running++
	go func() {
		do(w.open(a.gate))
		w.finished <- a
	}()
}

// gather waits until every actor waits for a request or has finished.
func (w *world) gather() {
	for len(w.waiting) < w.running {
		select {
		case r := <-w.requests:
			w.waiting = append(w.waiting, r)
		case <-w.finished:
			w.running--
		case <-time.After(2 * time.Minute):
			w.t.Fatal("an actor does neither wait nor finish")
		}
	}
}

// step lets one request through, or not.
func (w *world) step(die bool) {
	i := 0
	if len(w.waiting) > 1 {
		i = rapid.IntRange(0, len(w.waiting)-1).Draw(w.t, "who")
	}
	r := w.waiting[i]
	w.waiting = append(w.waiting[:i], w.waiting[i+1:]...)
	switch {
	case die:
		r.gate.dead.Store(true)
		r.let <- errDead
	case w.clock.Now().Sub(r.since) > time.Minute:
		r.let <- context.DeadlineExceeded // as requestTimeout has it
	default:
		r.let <- nil
	}
}

// run lets requests through until every actor has finished.
func (w *world) run(want func(string) string, keys []string) {
	for w.gather(); w.running > 0; w.gather() {
		die := false
		switch rapid.IntRange(0, 59).Draw(w.t, "event") {
		case 58:
			die = true
		case 59:
			w.clock.Advance(time.Duration(rapid.IntRange(1, 100).Draw(w.t, "seconds")) * time.Second)
		}
		w.step(die)
		w.live(want, keys)
	}
}

// prepare brings a blob to a stage of its life, so that what happens then is met
// in every order.
func (w *world) prepare(stage int, want func(string) string) {
	o := w.open(w.bucket)
	for i, do := range []func() error{
		func() error { return tryUpload(o, "a/same-1", want("a/same-1")) },
		func() error { return o.Delete(context.Background(), "a/same-1") },
		func() error { w.clock.Advance(61 * time.Minute); return nil },
		func() error { _, err := o.Sweep(context.Background(), 24*time.Hour); return err },
		func() error { w.clock.Advance(61 * time.Minute); return nil },
	} {
		if i == stage {
			return
		}
		if err := do(); err != nil {
			w.t.Fatal(err)
		}
	}
}

// expected reports whether an actor may be told so.
func expected(err error) bool {
	return errors.Is(err, storage.ErrExists) || errors.Is(err, errDead) || errors.Is(err, context.DeadlineExceeded)
}

func TestObjectsModel(t *testing.T) {
	// Leaving out a step of the protocol is found within some 300 runs.
	if f := flag.Lookup("rapid.checks"); f.Value.String() == f.DefValue {
		if err := f.Value.Set("1000"); err != nil {
			t.Fatal(err)
		}
		defer f.Value.Set(f.DefValue)
	}
	rapid.Check(t, func(t *rapid.T) {
		c := newClock()
		w := &world{
			t: t, clock: c, bucket: newMemoryBucket(c.Now),
			requests: make(chan *request), finished: make(chan *actor),
		}
		// Three repositories that share a blob, and another blob.
		keys := []string{"a/same-1", "b/same-1", "c/same-1", "a/same-2"}
		want := func(key string) string { return content(key[2:], testPart/2) }
		key := rapid.SampledFrom(keys)
		deleted := map[string]bool{} // some actor may delete it

		acked := make(chan string, 1000) // keys whose storing was acknowledged
		bad := make(chan string, 1000)
		w.prepare(rapid.IntRange(0, 5).Draw(t, "stage"), want)
		// Rounds of actors at the same time, and then some time without any:
		// what is to be found unused and freed takes two sweeps an hour apart.
		for range rapid.IntRange(1, 8).Draw(t, "rounds") {
			for range rapid.IntRange(1, 4).Draw(t, "actors") {
				k := key.Draw(t, "key")
				switch rapid.IntRange(0, 9).Draw(t, "what") {
				case 0, 1:
					w.start(func(o *storage.Objects) {
						if err := tryUpload(o, k, want(k)); err == nil {
							acked <- k
						} else if !expected(err) {
							bad <- fmt.Sprintf("push %s: %v", k, err)
						}
					})
				case 2:
					to := map[string]string{keys[0]: keys[1], keys[1]: keys[2], keys[2]: keys[0]}[k]
					w.start(func(o *storage.Objects) {
						if o.Link(context.Background(), k, to) == nil {
							acked <- to
						}
					})
				case 3, 4:
					deleted[k] = true
					w.start(func(o *storage.Objects) { _ = o.Delete(context.Background(), k) })
				case 5:
					w.start(func(o *storage.Objects) {
						got, err := storage.ReadAll(context.Background(), o, k, 1<<20)
						if err == nil && string(got) != want(k) || err != nil && strings.Contains(err.Error(), "damaged") {
							bad <- fmt.Sprintf("read %s: %.30q, %v", k, got, err)
						}
					})
				default:
					w.start(func(o *storage.Objects) {
						if _, err := o.Sweep(context.Background(), 24*time.Hour); err != nil && !expected(err) {
							bad <- fmt.Sprintf("sweep: %v", err)
						}
					})
				}
			}
			w.run(want, keys)
			c.Advance(time.Duration(rapid.SampledFrom([]int{0, 5, 61, 61, 61, 130}).Draw(t, "minutes")) * time.Minute)
		}
		close(acked)
		close(bad)
		for s := range bad {
			t.Error(s)
		}
		o := w.open(w.bucket)
		for k := range acked {
			if _, err := o.Stat(context.Background(), k); err != nil && !deleted[k] {
				t.Errorf("%s was stored and never deleted: %v", k, err)
			}
		}
		w.settles(o, want, keys)
	})
}

// live fails unless every pointer that is there has its bytes: it is looked at
// between requests, without disturbing any.
func (w *world) live(want func(string) string, keys []string) {
	o := w.open(w.bucket)
	for _, k := range keys {
		got, err := storage.ReadAll(context.Background(), o, k, 1<<20)
		if err != nil && !errors.Is(err, storage.ErrNotFound) || err == nil && string(got) != want(k) {
			w.t.Fatalf("%s: %.30q, %v", k, got, err)
		}
	}
}

// settles fails unless sweeping leaves what is needed and nothing else.
func (w *world) settles(o *storage.Objects, want func(string) string, keys []string) {
	for range 6 {
		w.clock.Advance(25 * time.Hour)
		if _, err := o.Sweep(context.Background(), 24*time.Hour); err != nil {
			w.t.Fatal(err)
		}
		w.live(want, keys)
	}
	refs, data, pointers := 0, 0, 0
	for _, name := range w.bucket.names("") {
		switch {
		case strings.Contains(name, "/refs/"):
			refs++
		case strings.HasSuffix(name, "/data"):
			data++
		case !strings.HasPrefix(name, "."):
			pointers++
		}
	}
	if refs != pointers || data > pointers {
		w.t.Errorf("%d pointers, %d refs, %d times bytes: %q", pointers, refs, data, w.bucket.names(""))
	}
	for _, k := range keys {
		if err := o.Delete(context.Background(), k); err != nil && !errors.Is(err, storage.ErrNotFound) {
			w.t.Fatal(err)
		}
	}
	for range 6 {
		w.clock.Advance(25 * time.Hour)
		if _, err := o.Sweep(context.Background(), 24*time.Hour); err != nil {
			w.t.Fatal(err)
		}
	}
	if left := w.bucket.names(""); len(left) > 0 {
		w.t.Errorf("left when all is deleted: %q", left)
	}
}

func tryUpload(o *storage.Objects, key, content string) error {
	ctx := context.Background()
	u, err := o.StartUpload(ctx)
	if err != nil {
		return err
	}
	defer u.Close()
	if _, err := io.WriteString(u, content); err != nil {
		return err
	}
	return u.Commit(ctx, key)
}
