package indexpg

import (
	"context"
	"database/sql"
	"flag"
	"fmt"
	"net/url"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/index"
	"sluice/internal/index/indextest"
	"sluice/test/bed"
)

var (
	server    *bed.Postgres // of TestMain
	databases atomic.Int64
)

func TestMain(m *testing.M) {
	os.Exit(func() int {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		var err error
		if server, err = bed.StartPostgres(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer server.Stop()
		flag.Parse()
		if err := flag.Set("rapid.checks", "30"); err != nil { // the model is for the statements; SQLite has had more
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// fresh returns the URL of a fresh database.
func fresh(t *testing.T) string {
	t.Helper()
	address, err := server.NewDatabase(t.Context(), fmt.Sprint("d", databases.Add(1)))
	if err != nil {
		t.Fatal(err)
	}
	return address
}

func open(t *testing.T, address string) *index.DB {
	t.Helper()
	db, err := index.Open(t.Context(), index.Options{URL: address})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func TestSuite(t *testing.T) {
	indextest.Run(t, func(t *testing.T) *index.DB { return open(t, fresh(t)) })
}

// replicas returns two handles on one fresh database.
func replicas(t *testing.T) (a, b *index.DB, address string) {
	address = fresh(t)
	a, b = open(t, address), open(t, address)
	t.Cleanup(func() {
		for _, db := range []*index.DB{a, b} {
			if err := db.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return a, b, address
}

func TestReplicas(t *testing.T) {
	for name, test := range map[string]func(*testing.T, *index.DB, *index.DB){
		"Excluding":  func(t *testing.T, a, b *index.DB) { indextest.Excluding(t, a, b) },
		"NotStarved": indextest.NotStarved,
		"Bounded":    indextest.Bounded,
		"Try":        indextest.Try,
		"Consumers":  func(t *testing.T, a, b *index.DB) { indextest.Consumers(t, a, b) },
	} {
		t.Run(name, func(t *testing.T) {
			a, b, _ := replicas(t)
			test(t, a, b)
		})
	}
}

// TestOpenAtOnce has many replicas find an empty database.
func TestOpenAtOnce(t *testing.T) {
	address := fresh(t)
	errs := make(chan error)
	const replicas = 5
	for range replicas {
		go func() {
			db, err := index.Open(t.Context(), index.Options{URL: address})
			if err == nil {
				err = db.Close()
			}
			errs <- err
		}()
	}
	for range replicas {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// TestManyWaiters has more callers wait for locks that another replica holds
// than there are connections to wait on.
func TestManyWaiters(t *testing.T) {
	a, b, _ := replicas(t)
	const waiters = 30
	held := make([]func(), waiters)
	for i := range held {
		var err error
		if held[i], err = a.Exclude(t.Context(), fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	errs := make(chan error)
	for i := range held {
		go func() {
			unlock, err := b.Share(t.Context(), fmt.Sprint(i))
			if err == nil {
				unlock()
			}
			errs <- err
		}()
	}
	time.Sleep(200 * time.Millisecond)
	for _, unlock := range held {
		unlock()
	}
	for range held {
		select {
		case err := <-errs:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Fatal("still waiting")
		}
	}
}

// admin is a connection to look at the server with.
func admin(t *testing.T, address string) *sql.DB {
	t.Helper()
	db, err := sql.Open("pgx", address) // the driver that package index registers
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// breakAll breaks all connections of a database but admin's own.
func breakAll(t *testing.T, db *sql.DB, address string) {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.ExecContext(t.Context(), "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()", u.Path[1:])
	if err != nil {
		t.Fatal(err)
	}
}

// TestBrokenConnections breaks every connection while locks are held, both
// kinds: taken at once and after waiting. Everybody goes on, and nothing stays
// locked.
func TestBrokenConnections(t *testing.T) {
	a, b, address := replicas(t)
	server := admin(t, address)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	intent, err := a.Intend(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	first, err := b.Exclude(ctx, "waited for")
	if err != nil {
		t.Fatal(err)
	}
	waited := make(chan func(), 1)
	go func() {
		unlock, err := a.Exclude(ctx, "waited for")
		if err != nil {
			t.Error(err)
			unlock = func() {}
		}
		waited <- unlock
	}()
	time.Sleep(100 * time.Millisecond)
	first()
	unlockWaited := <-waited
	unlock, err := a.Exclude(ctx, "at once")
	if err != nil {
		t.Fatal(err)
	}
	breakAll(t, server, address)

	for _, name := range []string{"at once", "waited for"} {
		second, err := b.Exclude(ctx, name)
		if err != nil {
			t.Fatalf("after the connections broke: %v", err)
		}
		second()
	}
	unlock()
	unlockWaited()
	if err := intent.Commit(ctx, func(tx *index.Tx) error {
		tx.PutRepository(index.Repository{Name: "a"})
		return nil
	}); err != nil {
		t.Fatalf("after the connections broke: %v", err)
	}
	for _, db := range []*index.DB{a, b} {
		for _, name := range []string{"at once", "waited for"} {
			unlock, ok, err := db.TryExclude(ctx, name)
			if err != nil || !ok {
				t.Fatalf("%s is locked by nobody: %v", name, err)
			}
			unlock()
		}
	}
	if _, err := b.Repository(ctx, "a"); err != nil {
		t.Error(err)
	}
}

// TestNothingStaysLocked looks into the server for locks and transactions that
// somebody forgot.
func TestNothingStaysLocked(t *testing.T) {
	a, b, address := replicas(t)
	indextest.Excluding(t, a, b)
	indextest.Bounded(t, a, b)
	server := admin(t, address)
	var locks, open int
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) { // for who was canceled to be gone
		err := server.QueryRowContext(t.Context(), `SELECT
			(SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database WHERE locktype = 'advisory' AND datname = current_database()),
			(SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%')`).Scan(&locks, &open)
		if err != nil {
			t.Fatal(err)
		}
		if locks+open == 0 {
			return
		}
	}
	t.Errorf("%d locks and %d transactions are left over", locks, open)
}
