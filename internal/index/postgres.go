package index

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/url"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
)

// What one process asks of PostgreSQL, whose default is 100 connections in all:
// three replicas have room.
const (
	postgresConns   = 16               // for queries and transactions
	postgresWaiters = 8                // for locks that somebody else has
	postgresTries   = 20               // of what failed through no fault of its own; more than connections
	postgresConnect = 10 * time.Second // to make a connection
)

// postgresSession is said at the beginning of every connection. A server learns
// within half a minute that a client, and with it its locks, is gone without a
// farewell, and no transaction is left open by one.
const postgresSession = `SET idle_in_transaction_session_timeout = '30s'; SET tcp_keepalives_idle = 10;
	SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3; SET client_connection_check_interval = '10s'`

func openPostgres(ctx context.Context, address string, log *slog.Logger) (*DB, error) {
	config, err := pgx.ParseConfig(address)
	if err != nil {
		return nil, fmt.Errorf("index database: %w", err) // has no password in it
	}
	config.ConnectTimeout = postgresConnect
	config.RuntimeParams["application_name"] = "sluice"
	begin := func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, postgresSession, pgx.QueryExecModeSimpleProtocol)
		return err
	}
	pool := stdlib.OpenDB(*config, stdlib.OptionAfterConnect(begin))
	pool.SetMaxOpenConns(postgresConns)
	pool.SetMaxIdleConns(postgresConns)
	pool.SetConnMaxIdleTime(5 * time.Minute)

	engine := &postgresEngine{pool: pool, dialect: postgresDialect(), name: nameOf(address)}
	err = engine.transact(ctx, func(ctx context.Context, q querier) error {
		if err := q.lock(ctx, "migrate"); err != nil {
			return err
		}
		return migrate(ctx, q)
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("index database %s: %w", engine.name, err), pool.Close())
	}
	locks := newPostgresLocks(func(ctx context.Context) (*pgx.Conn, error) {
		conn, err := pgx.ConnectConfig(ctx, config.Copy())
		if err != nil {
			return nil, err
		}
		if err := begin(ctx, conn); err != nil {
			return nil, errors.Join(err, conn.Close(ctx))
		}
		return conn, nil
	}, log)
	return &DB{engine: engine, locks: locks}, nil
}

func resetPostgres(ctx context.Context, address string) error {
	conn, err := pgx.Connect(ctx, address)
	if err == nil {
		_, err = conn.Exec(ctx, "DROP TABLE IF EXISTS "+tables)
		err = errors.Join(err, conn.Close(ctx))
	}
	if err != nil {
		return fmt.Errorf("index database %s: %w", nameOf(address), err)
	}
	return nil
}

// nameOf is an address without what is secret in it.
func nameOf(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return "postgres:…"
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// lockTransaction excludes other transactions that say the same with the same
// key, until the end of this one.
const lockTransaction = "SELECT pg_advisory_xact_lock($1)"

// postgresTx is the querier of a transaction. What it runs often, pgx has
// prepared.
type postgresTx struct {
	tx *sql.Tx
	d  dialect
}

func (t postgresTx) lock(ctx context.Context, name string) error {
	_, err := t.tx.ExecContext(ctx, lockTransaction, lockKey(name))
	return err
}

func (t postgresTx) query(ctx context.Context, statement string, args ...any) (*sql.Rows, error) {
	return t.tx.QueryContext(ctx, t.d.spell(statement), args...)
}

func (t postgresTx) exec(ctx context.Context, statement string, args ...any) (int64, error) {
	r, err := t.tx.ExecContext(ctx, t.d.spell(statement), args...)
	if err != nil {
		return 0, err
	}
	return r.RowsAffected()
}

// postgresEngine writes to PostgreSQL. Its transactions are READ COMMITTED:
// those that only write need no more, and the others lock what they decide by.
type postgresEngine struct {
	name    string
	pool    *sql.DB
	dialect dialect
}

// write sends all statements at once: one round trip, commit included, since
// what is sent together is one transaction.
func (e *postgresEngine) write(ctx context.Context, locks []int64, statements []statement) error {
	return e.retry(ctx, func() error {
		conn, err := e.pool.Conn(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		return conn.Raw(func(c any) error {
			var batch pgx.Batch
			for _, key := range locks {
				batch.Queue(lockTransaction, key)
			}
			for _, s := range statements {
				batch.Queue(e.dialect.spell(s.sql), s.args...)
			}
			return c.(*stdlib.Conn).Conn().SendBatch(ctx, &batch).Close()
		})
	})
}

func (e *postgresEngine) transact(ctx context.Context, f func(context.Context, querier) error) error {
	return e.retry(ctx, func() error {
		tx, err := e.pool.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		if err := f(ctx, postgresTx{tx, e.dialect}); err != nil {
			return errors.Join(err, ignoreDone(tx.Rollback()))
		}
		return tx.Commit()
	})
}

// ignoreDone: a transaction whose context has ended was rolled back already.
func ignoreDone(err error) error {
	if errors.Is(err, sql.ErrTxDone) {
		return nil
	}
	return err
}

// retry runs f again when other transactions got in its way, or its connection
// broke, as all do when the server restarts. That may have happened just after
// a commit; what is written is such that writing it twice makes no difference.
func (e *postgresEngine) retry(ctx context.Context, f func() error) error {
	for try := 1; ; try++ {
		err := f()
		if err == nil || try == postgresTries || ctx.Err() != nil || !isConflict(err) && !isBroken(err) {
			return e.explain(err)
		}
		select {
		case <-time.After(rand.N(time.Duration(try) * 5 * time.Millisecond)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (e *postgresEngine) read(ctx context.Context, f func() error) error { return e.retry(ctx, f) }

func (e *postgresEngine) query(ctx context.Context, statement string, args ...any) (*sql.Rows, error) {
	return e.pool.QueryContext(ctx, e.dialect.spell(statement), args...)
}

// isConflict reports errors that go away by doing the same again.
// Source: PostgreSQL, Appendix A, class 40.
func isConflict(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && (pg.Code == "40001" || pg.Code == "40P01")
}

// isBroken reports that a connection which had been made is gone: the server
// ended it (57P01 and 57P02), or the network did.
func isBroken(err error) bool {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code == "57P01" || pg.Code == "57P02"
	}
	var connecting *pgconn.ConnectError
	var network net.Error
	return !errors.As(err, &connecting) &&
		(errors.As(err, &network) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, driver.ErrBadConn))
}

// explain tells what to do about an index whose tables are not as this program
// left them (class 42: no such table or column).
func (e *postgresEngine) explain(err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) && (pg.Code == "42P01" || pg.Code == "42703") {
		return fmt.Errorf("%w: %s lacks tables (%w); make it anew with `sluice registry rebuild-index`", ErrCorrupt, e.name, err)
	}
	return err
}

func (e *postgresEngine) close() error { return e.pool.Close() }
