package index

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// Options says which database to open.
type Options struct {
	// URL is one of
	//
	//	sqlite:/path/file.db   a file, made with mode 0600 if it isn't there;
	//	                       for one process at a time
	//	sqlite::memory:        gone with the DB; all calls share one connection
	//	postgres://…           as of libpq, see postgres.go
	URL string

	// Log gets what happens without anybody asking. Nil discards it.
	Log *slog.Logger
}

// DB is an index database. Its methods may be called concurrently.
type DB struct {
	engine  engine
	locks   locker
	closing sync.Once
	closed  error // of Close, once closing is done
}

// engine is how a database is written to.
type engine interface {
	// write runs the statements in one transaction, whose effect is durable
	// when it returns nil. An error means that there is none, unless it is
	// of a broken connection. Statements may run twice: they must be such
	// that this has no other effect. Transactions with a lock in common run
	// one after the other.
	write(ctx context.Context, locks []int64, statements []statement) error

	// transact runs f in one transaction that other writers of the same
	// rows can't interfere with. f may run more than once.
	transact(ctx context.Context, f func(context.Context, querier) error) error

	// read runs f, which reads by query, outside of transactions, and may
	// run more than once. To the errors of the database all three add what
	// to do.
	read(ctx context.Context, f func() error) error
	query(ctx context.Context, statement string, args ...any) (*sql.Rows, error)

	close() error
}

// statement is one to be run, with its arguments.
type statement struct {
	sql  string
	args []any
}

// querier is what sql.DB and sql.Tx have in common, with statements spelled
// for the database.
type querier interface {
	// lock excludes other transactions that lock the same name, until the
	// end of this one.
	lock(ctx context.Context, name string) error
	query(ctx context.Context, statement string, args ...any) (*sql.Rows, error)
	exec(ctx context.Context, statement string, args ...any) (int64, error)
}

// locker is how names are locked.
type locker interface {
	share(ctx context.Context, name string) (func(), error)
	exclude(ctx context.Context, name string) (func(), error)
	tryExclude(ctx context.Context, name string) (func(), bool, error)
	close()
}

// Open opens the database and brings its schema to what this program knows. It
// is for the caller to close it.
//
// Errors: ErrCorrupt when the database is there but can't be used.
func Open(ctx context.Context, opts Options) (*DB, error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	scheme, rest, _ := strings.Cut(opts.URL, ":")
	switch scheme {
	case "sqlite":
		return openSQLite(ctx, rest)
	case "postgres", "postgresql":
		return openPostgres(ctx, opts.URL, opts.Log)
	}
	return nil, errScheme(opts.URL)
}

// Reset removes all that a database holds, the queue included, also when it
// can't be opened any more. It is for when nobody has it open; Open makes it
// anew, and ReplaceRepository fills it.
func Reset(ctx context.Context, opts Options) error {
	switch scheme, rest, _ := strings.Cut(opts.URL, ":"); scheme {
	case "sqlite":
		return resetSQLite(rest)
	case "postgres", "postgresql":
		return resetPostgres(ctx, opts.URL)
	}
	return errScheme(opts.URL)
}

func errScheme(address string) error {
	scheme, _, _ := strings.Cut(address, ":") // what follows may be secret
	return fmt.Errorf("index database %q: the URL must begin with sqlite: or postgres:, to name a file or a server", scheme+":…")
}

// Close ends what is running and releases the database and all locks. Further
// calls do nothing.
func (db *DB) Close() error {
	db.closing.Do(func() {
		db.locks.close()
		db.closed = db.engine.close()
	})
	return db.closed
}

// Check asks the database for something small: whether it can serve.
func (db *DB) Check(ctx context.Context) error {
	_, err := one(ctx, db, "SELECT version FROM version", func(scan scan) (version int, err error) {
		return version, scan(&version)
	})
	return err
}

// now is the time as the database has it.
func now() int64 { return time.Now().UnixMicro() }

// scan copies the columns of a row, as sql.Rows.Scan does.
type scan func(dest ...any) error

// all runs a query and collects what row makes of every row.
func all[T any](ctx context.Context, db *DB, query string, row func(scan) (T, error), args ...any) ([]T, error) {
	var list []T
	err := db.engine.read(ctx, func() error {
		rows, err := db.engine.query(ctx, query, args...)
		if err == nil {
			list, err = rest(rows, row)
		}
		return err
	})
	return list, err
}

// one runs a query of one row at most; none is ErrNotFound.
func one[T any](ctx context.Context, db *DB, query string, row func(scan) (T, error), args ...any) (T, error) {
	list, err := all(ctx, db, query, row, args...)
	if err != nil || len(list) == 0 {
		var none T
		if err == nil {
			err = ErrNotFound
		}
		return none, err
	}
	return list[0], nil
}

// collect is all inside a transaction.
func collect[T any](ctx context.Context, q querier, query string, row func(scan) (T, error), args ...any) ([]T, error) {
	rows, err := q.query(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	return rest(rows, row)
}

// rest collects the rows that are left, and closes rows.
func rest[T any](rows *sql.Rows, row func(scan) (T, error)) ([]T, error) {
	defer rows.Close()
	var list []T
	for rows.Next() {
		item, err := row(rows.Scan)
		if err != nil {
			return nil, err
		}
		list = append(list, item)
	}
	return list, rows.Err()
}
