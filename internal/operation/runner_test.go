package operation

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/index"
	"sluice/oci"
)

const repo = "team/app"

var (
	errPassing = errors.New("it may pass")
	errForever = &oci.Error{Code: "FOREVER", Message: "it is so"}
	subject    = oci.DigestOf([]byte("an image"))
)

// bench is a runner whose work is do.
type bench struct {
	*Runner
	db *index.DB
}

func newBench(t *testing.T, do func(context.Context, *Work) (string, error), gone bool) *bench {
	t.Helper()
	db, err := index.Open(t.Context(), index.Options{URL: "sqlite::memory:"})
	if err != nil {
		t.Fatal(err)
	}
	r := New(db, Options{
		Queues: "test/", Noun: "Test", Workers: 1, Do: do, Log: slog.New(slog.DiscardHandler),
		Permanent: func(err error) string {
			if errors.Is(err, errForever) {
				return errForever.Code
			}
			return ""
		},
		Gone:   func(context.Context, string, oci.Digest) bool { return gone },
		Timing: Timing{Lease: time.Minute, Beat: 10 * time.Millisecond, Poll: 5 * time.Millisecond, Pause: time.Millisecond},
	})
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait(); db.Close() })
	return &bench{r, db}
}

func (b *bench) enqueue(t *testing.T) (id string) {
	t.Helper()
	err := b.db.Update(t.Context(), func(tx *index.Tx) error { id = tx.Enqueue(b.Queue(repo), subject.String(), nil); return nil })
	if err != nil {
		t.Fatal(err)
	}
	b.Wake()
	return id
}

// until waits until an operation is in a state.
func (b *bench) until(t *testing.T, id, what string, is func(Operation) bool) Operation {
	t.Helper()
	var op Operation
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		var err error
		if op, err = b.Operation(t.Context(), repo, id); err != nil {
			t.Fatal(err)
		}
		if is(op) {
			return op
		}
	}
	t.Fatalf("waiting for %s: %+v", what, op)
	return op
}

func final(op Operation) bool { return op.Status != StatusNotStarted && op.Status != StatusRunning }

func TestWhatBecomesOfOperations(t *testing.T) {
	for what, c := range map[string]struct {
		do                    func(attempt int) (string, error)
		gone                  bool
		status, code, details string
		attempts              int
	}{
		"success":           {func(int) (string, error) { return "well done", nil }, false, StatusSucceeded, "", "Test succeeded for resource team/app@" + subject.String() + ": well done", 1},
		"permanent":         {func(int) (string, error) { return "", fmt.Errorf("wrapped: %w", errForever) }, false, StatusFailed, "FOREVER", "it is so", 1},
		"passing, and over": {func(n int) (string, error) { return "", map[bool]error{true: errPassing}[n < 3] }, false, StatusSucceeded, "", "succeeded", 3},
		"passing, for ever": {func(int) (string, error) { return "", errPassing }, false, StatusFailed, CodeUnknown, "6 attempts failed, the last because: it may pass", MaxFailures},
		"deleted meanwhile": {func(int) (string, error) { return "", errForever }, true, StatusCanceled, "", "the image was deleted", 1},
	} {
		t.Run(what, func(t *testing.T) {
			attempts := make(chan int, 1)
			attempts <- 0
			b := newBench(t, func(context.Context, *Work) (string, error) {
				n := <-attempts + 1
				attempts <- n
				return c.do(n)
			}, c.gone)
			op := b.until(t, b.enqueue(t), "the end", final)
			if n := <-attempts; op.Status != c.status || op.ErrorCode != c.code || !strings.Contains(op.Details, c.details) || n != c.attempts || op.Subject != subject {
				t.Errorf("after %d attempts: %+v", n, op)
			}
			if latest, err := b.Latest(t.Context(), repo, subject); err != nil || latest != op {
				t.Errorf("the latest is %+v, %v", latest, err)
			}
		})
	}
}

func TestProgressAndCancel(t *testing.T) {
	stopped := make(chan error, 1)
	b := newBench(t, func(ctx context.Context, w *Work) (string, error) {
		w.Advance(1, 2)
		w.Advance(1, 4) // never back
		w.Advance(1, 0) // of what isn't known
		<-ctx.Done()
		stopped <- w.Hold(context.WithoutCancel(ctx))
		return "", ctx.Err()
	}, false)
	id := b.enqueue(t)
	b.until(t, id, "progress", func(op Operation) bool { return op.Progress == 49 && strings.Contains(op.Details, "ongoing") })
	if op, err := b.Cancel(t.Context(), repo, id); err != nil || op.Status != StatusCanceled {
		t.Errorf("%+v, %v", op, err)
	}
	if err := <-stopped; !errors.Is(err, index.ErrCanceled) {
		t.Errorf("the worker may go on: %v", err)
	}
	b.until(t, id, "the end", func(op Operation) bool {
		job, err := b.db.Job(t.Context(), id)
		return err == nil && job.State == index.Canceled
	})
	for what, err := range map[string]error{
		"none":               second(b.Operation(t.Context(), repo, "none")),
		"another repository": second(b.Operation(t.Context(), "other", id)),
		"cancel elsewhere":   second(b.Cancel(t.Context(), "other", id)),
		"another image":      second(b.Latest(t.Context(), repo, oci.DigestOf(nil))),
	} {
		if !errors.Is(err, ErrUnknown) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestExport has the numbers of an operation that succeeded at its second try.
func TestExport(t *testing.T) {
	failed := false
	b := newBench(t, func(context.Context, *Work) (string, error) {
		if !failed {
			failed = true
			return "", errPassing
		}
		return "", nil
	}, false)
	b.until(t, b.enqueue(t), "the end, counted", func(Operation) bool { return b.Counts.Succeeded.Load() == 1 })
	got := map[string]float64{}
	collect := func(name, help string, value func() float64) {
		if !strings.HasPrefix(help, "Tests ") {
			t.Errorf("%s: %s", name, help)
		}
		got[name] = value()
	}
	b.Export(collect, collect)
	want := map[string]float64{
		"sluice_tests_queued": 0, "sluice_tests_running": 0, "sluice_tests_succeeded_total": 1,
		"sluice_tests_failed_total": 0, "sluice_tests_canceled_total": 0, "sluice_tests_retried_total": 1,
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
