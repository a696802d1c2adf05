package indextest

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/index"
)

func locks() map[string]func(*testing.T, *index.DB) {
	return map[string]func(*testing.T, *index.DB){
		"SharedTogether": testSharedTogether,
		"Excluding":      func(t *testing.T, db *index.DB) { Excluding(t, db) },
		"NotStarved":     func(t *testing.T, db *index.DB) { NotStarved(t, db, db) },
		"Bounded":        func(t *testing.T, db *index.DB) { Bounded(t, db, db) },
		"Try":            func(t *testing.T, db *index.DB) { Try(t, db, db) },
	}
}

func testSharedTogether(t *testing.T, db *index.DB) {
	ctx := soon(t)
	var unlocks []func()
	for range 50 { // more than any number of connections
		unlock, err := db.Share(ctx, "a")
		must(t, err)
		unlocks = append(unlocks, unlock)
	}
	unlock, err := db.Exclude(ctx, "b")
	must(t, err)
	unlock()
	for _, unlock := range unlocks {
		unlock()
	}
	unlock, err = db.Exclude(ctx, "a")
	must(t, err)
	unlock()
}

// Excluding has many callers, of all the handles of one database, share and
// exclude, and looks that nobody is inside with one who excludes.
func Excluding(t *testing.T, handles ...*index.DB) {
	ctx := soon(t)
	names := []string{"a", "b"}
	var inside [2]atomic.Int64
	var group sync.WaitGroup
	for client := range 12 {
		db, i := handles[client%len(handles)], client/2%len(names)
		group.Go(func() {
			for round := range 25 {
				lock, weight := db.Share, int64(1)
				if (client+round)%3 == 0 {
					lock, weight = db.Exclude, 1000
				}
				unlock, err := lock(ctx, names[i])
				if err != nil {
					t.Error(err)
					return
				}
				if n := inside[i].Add(weight); weight == 1000 && n != 1000 || n > 1000 {
					t.Errorf("%d inside", n)
				}
				time.Sleep(time.Duration(round%3) * 100 * time.Microsecond)
				inside[i].Add(-weight)
				unlock()
				unlock() // is harmless
			}
		})
	}
	group.Wait()
}

// NotStarved has callers of one handle share a lock without a gap, and one of
// another handle exclude them.
func NotStarved(t *testing.T, sharing, excluding *index.DB) {
	ctx, stop := context.WithCancel(soon(t))
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for ctx.Err() == nil {
				unlock, err := sharing.Share(ctx, "a")
				if err != nil {
					if ctx.Err() == nil {
						t.Error(err)
					}
					return
				}
				time.Sleep(3 * time.Millisecond)
				unlock()
			}
		})
	}
	time.Sleep(10 * time.Millisecond)
	for range 5 {
		unlock, err := excluding.Exclude(ctx, "a")
		if err != nil {
			t.Errorf("excluding: %v", err)
			break
		}
		unlock()
	}
	stop()
	group.Wait()
}

// Bounded waits for a lock that another handle holds only as long as the
// context allows, and leaves nothing behind then.
func Bounded(t *testing.T, holding, waiting *index.DB) {
	ctx := soon(t)
	unlock, err := holding.Exclude(ctx, "a")
	must(t, err)
	for _, lock := range []func(context.Context, string) (func(), error){waiting.Share, waiting.Exclude} {
		short, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
		_, err := lock(short, "a")
		if cancel(); !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			t.Errorf("%v; want the deadline of the one who waits", err)
		}
	}
	unlock()
	unlock, err = holding.Share(ctx, "a")
	must(t, err)
	second, err := waiting.Share(ctx, "a")
	must(t, err)
	second()
	unlock()
}

// Try tries to exclude what another handle shares, excludes, and has left.
func Try(t *testing.T, holding, trying *index.DB) {
	ctx := soon(t)
	for _, lock := range []func(context.Context, string) (func(), error){holding.Share, holding.Exclude} {
		unlock, err := lock(ctx, "a")
		must(t, err)
		if _, ok, err := trying.TryExclude(ctx, "a"); ok || err != nil {
			t.Errorf("of a lock in use: %v, %v", ok, err)
		}
		unlock()
	}
	unlock, ok, err := trying.TryExclude(ctx, "a")
	if !ok || err != nil {
		t.Fatalf("of a lock not in use: %v, %v", ok, err)
	}
	short, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
	defer cancel()
	if _, err := holding.Share(short, "a"); err == nil {
		t.Error("shared what is excluded")
	}
	unlock()
	unlock, err = holding.Share(ctx, "a")
	must(t, err)
	unlock()
}
