package index

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"modernc.org/sqlite"

	"sluice/internal/durable"
)

const (
	memory        = ":memory:"
	sqliteReaders = 8   // connections; more than cores, since some wait for the disk
	groupMax      = 256 // transactions that share one fsync
)

func openSQLite(ctx context.Context, path string) (*DB, error) {
	if path == "" {
		return nil, errors.New("index database sqlite: lacks a path; say sqlite:/path/file.db, or sqlite::memory: for one that is gone at the end")
	}
	e := &sqliteEngine{path: path, queue: make(chan *write), done: make(chan struct{}), ended: make(chan struct{})}
	d := sqliteDialect()
	var err error
	if e.writing.db, e.reading.db, err = sqlitePools(path); err != nil {
		return nil, fmt.Errorf("index database %s: %w", path, err)
	}
	e.writing.dialect, e.reading.dialect = d, d
	if err := e.transactNow(ctx, func(q querier) error { return migrate(ctx, q) }); err != nil {
		return nil, errors.Join(e.explain(fmt.Errorf("index database %s: %w", path, err)), e.reading.close(), e.writing.close())
	}
	go e.run(context.WithoutCancel(ctx))
	return &DB{engine: e, locks: newLocalLocks()}, nil
}

// sqlitePools returns the one connection that writes and those that read.
func sqlitePools(path string) (writer, reader *sql.DB, err error) {
	// FULL: the log is fsynced at every commit, so that an acknowledged
	// intent is still there after loss of power.
	pragmas := url.Values{"_pragma": {"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)", "journal_size_limit(67108864)"}}
	if path != memory {
		if err := createSQLite(path); err != nil {
			return nil, nil, err
		}
	}
	name := "file:" + (&url.URL{Path: path}).EscapedPath()
	writer, err = sql.Open("sqlite", name+"?"+pragmas.Encode())
	if err != nil {
		return nil, nil, err
	}
	writer.SetMaxOpenConns(1)
	if path == memory {
		return writer, writer, nil
	}
	reading := url.Values{"_pragma": {"busy_timeout(5000)", "query_only(1)"}}
	reader, err = sql.Open("sqlite", name+"?"+reading.Encode())
	if err != nil {
		return nil, nil, errors.Join(err, writer.Close())
	}
	reader.SetMaxOpenConns(sqliteReaders)
	reader.SetMaxIdleConns(sqliteReaders)
	return writer, reader, nil
}

// createSQLite makes the empty file, for its owner only; SQLite gives the files
// beside it the same mode.
func createSQLite(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

func resetSQLite(path string) error {
	if path == memory {
		return nil
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := durable.Remove(path + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("index database %s: %w", path, err)
		}
	}
	return nil
}

// sqliteEngine writes to SQLite through one goroutine, which commits all
// transactions that came while it was at the last ones as one: with 200
// clients pushing, none waits for 200 fsyncs. Each has a savepoint, so that
// one that fails leaves the others alone.
type sqliteEngine struct {
	path    string
	writing prepared // on the one connection that writes; of run, after Open
	reading prepared

	// In memory, both are the same connection: whoever uses it, for a whole
	// transaction or query, holds shared. In a file it is left alone.
	shared sync.Mutex

	queue chan *write
	done  chan struct{} // closed by close: no more writes
	ended chan struct{} // closed by run
}

// write is one transaction on its way.
type write struct {
	run   func(context.Context, querier) error
	taken atomic.Bool // by run, or by the caller when it gave up
	err   error       // valid once ready is closed
	ready chan struct{}
}

func (e *sqliteEngine) write(ctx context.Context, _ []int64, statements []statement) error {
	return e.transact(ctx, func(ctx context.Context, q querier) error {
		for _, s := range statements {
			if _, err := q.exec(ctx, s.sql, s.args...); err != nil {
				return err
			}
		}
		return nil
	})
}

// transact honours ctx until the transaction begins; from then on it is a
// matter of the disk.
func (e *sqliteEngine) transact(ctx context.Context, f func(context.Context, querier) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	w := &write{run: f, ready: make(chan struct{})}
	select {
	case e.queue <- w:
	case <-ctx.Done():
		return ctx.Err()
	case <-e.done:
		return fmt.Errorf("index database %s: closed", e.path)
	}
	select {
	case <-w.ready:
	case <-ctx.Done():
		if w.taken.CompareAndSwap(false, true) {
			return ctx.Err()
		}
		<-w.ready
	}
	return e.explain(w.err)
}

// run commits what comes until the engine is closed.
func (e *sqliteEngine) run(ctx context.Context) {
	defer close(e.ended)
	for {
		select {
		case w := <-e.queue:
			e.commit(ctx, e.gather(w))
		case <-e.done:
			return
		}
	}
}

// gather returns w and what else is waiting.
func (e *sqliteEngine) gather(w *write) []*write {
	group := []*write{w}
	for len(group) < groupMax {
		select {
		case w := <-e.queue:
			group = append(group, w)
		default:
			return group
		}
	}
	return group
}

// commit runs a group in one transaction and tells each how it ended.
func (e *sqliteEngine) commit(ctx context.Context, group []*write) {
	taken := group[:0]
	for _, w := range group {
		if w.taken.CompareAndSwap(false, true) {
			taken = append(taken, w)
		}
	}
	err := e.transactNow(ctx, func(q querier) error {
		for _, w := range taken {
			if err := e.one(ctx, q, w); err != nil {
				return err
			}
		}
		return nil
	})
	for _, w := range taken {
		if w.err == nil {
			w.err = err
		}
		close(w.ready)
	}
}

// one runs one transaction of a group. Its own failure is in w; what it
// returns spoils the whole group.
func (e *sqliteEngine) one(ctx context.Context, q querier, w *write) error {
	if _, err := q.exec(ctx, "SAVEPOINT one"); err != nil {
		return err
	}
	w.err = w.run(ctx, q)
	if w.err != nil {
		if _, err := q.exec(ctx, "ROLLBACK TO one"); err != nil {
			return errors.Join(w.err, err) // such as a full disk, which ends the whole transaction
		}
	}
	_, err := q.exec(ctx, "RELEASE one")
	return err
}

func (e *sqliteEngine) read(_ context.Context, f func() error) error {
	defer e.use()()
	return e.explain(f())
}

func (e *sqliteEngine) use() (done func()) {
	if e.path != memory {
		return func() {}
	}
	e.shared.Lock()
	return e.shared.Unlock
}

func (e *sqliteEngine) query(ctx context.Context, statement string, args ...any) (*sql.Rows, error) {
	return e.reading.query(ctx, statement, args...)
}

// transactNow is not database/sql's transaction, because that would prepare
// every statement anew. There is one connection to run statements on, and one
// caller at a time.
func (e *sqliteEngine) transactNow(ctx context.Context, f func(querier) error) error {
	defer e.use()()
	q := &e.writing
	if _, err := q.exec(ctx, "BEGIN IMMEDIATE"); err != nil {
		return err
	}
	err := f(q)
	if err == nil {
		_, err = q.exec(ctx, "COMMIT")
	}
	if err != nil {
		_, rerr := q.exec(ctx, "ROLLBACK")
		if rerr != nil && strings.Contains(rerr.Error(), "no transaction is active") {
			rerr = nil // some failures, such as a full disk, have ended it already
		}
		return errors.Join(err, rerr)
	}
	return nil
}

func (e *sqliteEngine) close() error {
	close(e.done)
	<-e.ended
	return errors.Join(e.reading.close(), e.writing.close())
}

// The result codes of SQLite that mean that the file is beyond use.
const (
	sqliteCorrupt  = 11
	sqliteCantOpen = 14
	sqliteNotADB   = 26
)

func (e *sqliteEngine) explain(err error) error {
	var serr *sqlite.Error
	if !errors.As(err, &serr) {
		return err
	}
	switch serr.Code() & 0xff {
	case sqliteCorrupt, sqliteNotADB:
		return fmt.Errorf("%w: %s is damaged (%w); make it anew with `sluice registry rebuild-index`", ErrCorrupt, e.path, err)
	case sqliteCantOpen:
		return fmt.Errorf("%w: %s can't be opened (%w); see that the file and its directory can be written, or make it anew with `sluice registry rebuild-index`", ErrCorrupt, e.path, err)
	}
	return err
}
