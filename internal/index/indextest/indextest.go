// Package indextest is the suite that an index.DB passes on every database:
// random changes, after which every query is compared with a naive model of
// the tables in memory (model.go, compare.go); transactions and intents
// (changes.go); locks (locks.go); the queue (queue.go).
package indextest

import (
	"context"
	"testing"
	"time"

	"sluice/internal/index"
)

// Run runs the suite. open returns a DB on a fresh database; the suite closes
// it.
func Run(t *testing.T, open func(t *testing.T) *index.DB) {
	for _, group := range []struct {
		name  string
		tests map[string]func(*testing.T, *index.DB)
	}{
		{"Queries", map[string]func(*testing.T, *index.DB){"Model": testModel}},
		{"Changes", changes()},
		{"Locks", locks()},
		{"Queue", queue()},
	} {
		for name, test := range group.tests {
			t.Run(group.name+"/"+name, func(t *testing.T) {
				db := open(t)
				defer func() {
					if err := db.Close(); err != nil {
						t.Error(err)
					}
				}()
				test(t, db)
			})
		}
	}
}

// soon bounds what must not take for ever.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
