package index

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"sluice/oci"
)

func openFile(t testing.TB, path string) *DB {
	t.Helper()
	db, err := Open(t.Context(), Options{URL: "sqlite:" + path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func TestFilesAreTheOwnersAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index.db")
	db := openFile(t, path)
	if _, err := db.Intend(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(files) < 2 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f.Name(), info.Mode(), err)
		}
	}
}

// TestIntentOfADeadProcess copies the files of an open database, as a crash
// would leave them, and opens the copy.
func TestIntentOfADeadProcess(t *testing.T) {
	alive := filepath.Join(t.TempDir(), "index.db")
	db := openFile(t, alive)
	if _, err := db.Intend(t.Context(), "a/b"); err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(t.TempDir(), "index.db")
	for _, suffix := range []string{"", "-wal"} {
		data, err := os.ReadFile(alive + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dead+suffix, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := openFile(t, dead).Stale(t.Context(), 0)
	if err != nil || len(got) != 1 || got[0] != "a/b" {
		t.Errorf("stale: %q, %v", got, err)
	}
}

func TestSyncedAtEveryCommit(t *testing.T) {
	db := openFile(t, filepath.Join(t.TempDir(), "index.db"))
	engine := db.engine.(*sqliteEngine)
	for pragma, want := range map[string]string{"synchronous": "2", "journal_mode": "wal"} {
		var got string
		if err := engine.writing.db.QueryRowContext(t.Context(), "PRAGMA "+pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %s, want %s (%v)", pragma, got, want, err)
		}
	}
}

func TestUnusableFile(t *testing.T) {
	dir := t.TempDir()
	made := func(name string, change func(path string)) string {
		path := filepath.Join(dir, name)
		db := openFile(t, path)
		for i := range 100 {
			if err := db.Update(t.Context(), func(tx *Tx) error {
				tx.PutTag(Tag{Repo: "a", Name: fmt.Sprint(i), Digest: oci.DigestOf(nil)})
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		change(path)
		return path
	}
	write := func(path, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, path := range map[string]string{
		"garbage": made("garbage", func(path string) { write(path, strings.Repeat("nonsense", 1000)) }),
		"newer": made("newer", func(path string) {
			db := openFile(t, path)
			if _, err := db.engine.(*sqliteEngine).writing.db.ExecContext(t.Context(), "UPDATE version SET version = 99"); err != nil {
				t.Fatal(err)
			}
			db.Close()
		}),
		"directory": dir,
		"damaged": made("damaged", func(path string) {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for i := 4096; i < len(data); i++ {
				data[i] ^= 0x5a
			}
			write(path, string(data))
		}),
	} {
		db, err := Open(t.Context(), Options{URL: "sqlite:" + path})
		if err == nil {
			_, err = db.Tags(t.Context(), TagQuery{Repo: "a", N: 1000})
			db.Close()
		}
		if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "sluice registry rebuild-index") {
			t.Errorf("%s: %v; want ErrCorrupt that says what to do", name, err)
		}
		if name == "directory" {
			continue
		}
		if err := Reset(t.Context(), Options{URL: "sqlite:" + path}); err != nil {
			t.Errorf("%s: reset: %v", name, err)
		}
		if got, err := openFile(t, path).Repositories(t.Context(), RepositoryQuery{N: 9, All: true}); err != nil || len(got) != 0 {
			t.Errorf("%s: after Reset: %v, %v", name, got, err)
		}
	}
}

func TestUnknownURL(t *testing.T) {
	for _, url := range []string{"", "sqlite:", "mysql://me:secret@host/db", "postgres://me:secret@host:bad/db", "/path", "sqlite:/no/such/directory/f.db"} {
		db, err := Open(t.Context(), Options{URL: url})
		if err == nil {
			db.Close()
			t.Errorf("opened %q", url)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("the error tells the password: %v", err)
		}
	}
}

// TestOneOfAGroupFails: transactions that share a commit don't share failure.
func TestOneOfAGroupFails(t *testing.T) {
	db := openFile(t, filepath.Join(t.TempDir(), "index.db"))
	first := make(chan struct{})
	failure := errors.New("no")
	var group sync.WaitGroup
	group.Go(func() { // holds the writer until the others have queued up
		_ = db.engine.transact(t.Context(), func(context.Context, querier) error { <-first; return nil })
	})
	const n = 20
	errs := make([]error, n)
	for i := range n {
		group.Go(func() {
			errs[i] = db.engine.transact(t.Context(), func(ctx context.Context, q querier) error {
				_, err := q.exec(ctx, "INSERT INTO intents (id, repo, created) VALUES ($1, $1, 0)", fmt.Sprint(i))
				if err == nil && i%2 == 0 {
					_, err = q.exec(ctx, "INSERT INTO intents (id, repo, created) VALUES ($1, $1, 0)", fmt.Sprint(i))
				}
				if err == nil && i == 5 {
					err = failure
				}
				return err
			})
		})
	}
	close(first)
	group.Wait()
	want := 0
	for i, err := range errs {
		switch {
		case i%2 == 0 && err == nil, i == 5 && err != failure, i%2 == 1 && i != 5 && err != nil:
			t.Errorf("transaction %d: %v", i, err)
		case i%2 == 1 && i != 5:
			want++
		}
	}
	got, err := db.Stale(t.Context(), 0)
	if err != nil || len(got) != want {
		t.Errorf("got %q, %v; want %d", got, err, want)
	}
}

func TestClosed(t *testing.T) {
	db := openFile(t, filepath.Join(t.TempDir(), "index.db"))
	for range 2 {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := db.Update(t.Context(), func(tx *Tx) error { tx.PutTag(Tag{Repo: "a"}); return nil }); err == nil {
		t.Error("wrote to a closed database")
	}
	if err := db.Check(t.Context()); err == nil {
		t.Error("a closed database is fine")
	}
}

// TestNoLockIsLeftOver: names that nobody locks take no memory.
func TestNoLockIsLeftOver(t *testing.T) {
	db := openFile(t, filepath.Join(t.TempDir(), "index.db"))
	unlock, err := db.Share(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := db.Exclude(ended, "a"); err == nil {
		t.Error("excluded who shares")
	}
	if _, ok, _ := db.TryExclude(t.Context(), "a"); ok {
		t.Error("excluded who shares")
	}
	unlock()
	if left := db.locks.(*localLocks).byName; len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

// TestQueriesUseIndexes asks SQLite how it would answer: nothing that a client
// can ask for may take longer the more there is.
func TestQueriesUseIndexes(t *testing.T) {
	db := openFile(t, filepath.Join(t.TempDir(), "index.db"))
	d := oci.DigestOf(nil)
	ctx := t.Context()
	for _, order := range []Order{ByName, TimeAscending, TimeDescending} {
		_, _ = db.Tags(ctx, TagQuery{Repo: "a", N: 1, Order: order})
		_, _ = db.Tags(ctx, TagQuery{Repo: "a", N: 1, Order: ByName, Digest: d})
		_, _ = db.Manifests(ctx, ManifestQuery{Repo: "a", N: 1, Order: order})
	}
	_, _ = db.Repositories(ctx, RepositoryQuery{N: 1})
	_, _ = db.Repository(ctx, "a")
	_, _ = db.Tag(ctx, "a", "b")
	_, _ = db.Manifest(ctx, "a", d)
	_, _ = db.Referrers(ctx, "a", d, "t", "", 1)
	_, _, _ = db.FindBlob(ctx, d)
	_ = db.Touch(ctx, "a", d)
	_, _ = db.Needed(ctx, "a", d)
	_, _ = db.Lease(ctx, "q", 1, 1)
	_, _ = db.Job(ctx, "x")
	_, _ = db.LatestJob(ctx, "q", "k")
	_, _ = db.DeletedManifests(ctx, "a", timeOf(0), "", 1)
	seen := 0
	db.engine.(*sqliteEngine).reading.dialect.cache.Range(func(_, spelled any) bool {
		statement := spelled.(string)
		if !strings.HasPrefix(statement, "SELECT") || strings.Contains(statement, "version") {
			return true
		}
		seen++
		for _, step := range plan(t, db, statement) {
			if strings.HasPrefix(step, "SCAN") && !strings.Contains(step, "VIRTUAL TABLE") && !strings.Contains(step, "CONSTANT") || strings.Contains(step, "TEMP B-TREE") {
				t.Errorf("%s\n\t%s", step, statement)
			}
		}
		return true
	})
	if seen < 15 {
		t.Errorf("looked at %d statements only", seen)
	}
}

// plan returns the steps in which SQLite would answer.
func plan(t *testing.T, db *DB, statement string) []string {
	t.Helper()
	var args []any
	for i := 1; strings.Contains(statement, fmt.Sprint("?", i)); i++ {
		args = append(args, "1")
	}
	rows, err := db.engine.(*sqliteEngine).reading.db.QueryContext(t.Context(), "EXPLAIN QUERY PLAN "+statement, args...)
	if err != nil {
		t.Fatalf("%v: %s", err, statement)
	}
	steps, err := rest(rows, func(scan scan) (string, error) {
		var id, parent, unused sql.NullInt64
		var detail string
		err := scan(&id, &parent, &unused, &detail)
		return detail, err
	})
	if err != nil {
		t.Fatal(err)
	}
	return steps
}
