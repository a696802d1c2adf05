package index

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// postgresLocks are locks across replicas. A name is locked in this process
// first (local), in order; whoever has it there contends with other processes
// for two of PostgreSQL's advisory locks:
//
//	         lock       gate
//	share    shared     shared, only while taking the lock
//	exclude  exclusive  exclusive, taken first, given back last
//
// A process that excludes waits for the lock with the gate in its hand, so that
// those who come to share wait at the gate: a stream of them in other replicas
// doesn't keep it waiting.
//
// # Connections
//
// Advisory locks belong to a connection. What is free when asked for is taken
// on one connection, the session, by one round trip that never waits. Whoever
// has to wait does so on a connection of its own, out of a bounded number, and
// keeps the lock there. Since who has such a connection waits for nothing else
// (see Share), waiting for one is no deadlock.
//
// # When a connection breaks
//
// PostgreSQL frees the locks of a broken connection, and their holders, who may
// be anywhere, don't learn of it: for a moment two may be inside. So what locks
// guard must stand that: every transaction is whole by itself, intents tell of
// trees that were being changed, and garbage collection spares what was touched
// lately. The next lock is taken on a new connection. A pooler between Sluice
// and PostgreSQL must give every client a connection of its own (session
// pooling).
type postgresLocks struct {
	local   *localLocks
	connect func(context.Context) (*pgx.Conn, error)
	log     *slog.Logger
	done    chan struct{}  // closed by close
	waiters chan *pgx.Conn // connections to wait on that are idle; nil is one not yet made

	turn    chan struct{} // holds a token while nobody uses what is below
	session *session      // nil when there is none; guarded by turn
}

// session is the connection that many locks are held on.
type session struct {
	conn *pgx.Conn
	held int // locks; guarded by turn
}

const (
	// roundTrip bounds a statement that doesn't wait for a lock. It doesn't
	// end with the context of a caller, since that breaks a connection and
	// others may have locks on it.
	roundTrip = 10 * time.Second

	trySharing   = "SELECT CASE WHEN pg_try_advisory_xact_lock_shared($2) THEN pg_try_advisory_lock_shared($1) ELSE false END"
	tryExcluding = `SELECT CASE WHEN NOT pg_try_advisory_lock($2) THEN false WHEN pg_try_advisory_lock($1) THEN true
		ELSE NOT pg_advisory_unlock($2) END`
	waitSharing     = "SELECT true FROM (SELECT pg_advisory_xact_lock_shared($2), pg_advisory_lock_shared($1)) AS locks"
	waitExcluding   = "SELECT true FROM (SELECT pg_advisory_lock($2), pg_advisory_lock($1)) AS locks"
	unlockSharing   = "SELECT pg_advisory_unlock_shared($1) AND $2::bigint IS NOT NULL"
	unlockExcluding = "SELECT pg_advisory_unlock($1) AND pg_advisory_unlock($2)"
)

// mode is a way to hold a lock: the statements that take and release it, given
// the keys of lock and gate.
type mode struct{ try, wait, unlock string }

func sharing() mode   { return mode{trySharing, waitSharing, unlockSharing} }
func excluding() mode { return mode{tryExcluding, waitExcluding, unlockExcluding} }

func newPostgresLocks(connect func(context.Context) (*pgx.Conn, error), log *slog.Logger) *postgresLocks {
	l := &postgresLocks{
		local: newLocalLocks(), connect: connect, log: log, done: make(chan struct{}),
		waiters: make(chan *pgx.Conn, postgresWaiters), turn: make(chan struct{}, 1),
	}
	for range postgresWaiters {
		l.waiters <- nil
	}
	l.turn <- struct{}{}
	return l
}

func (l *postgresLocks) share(ctx context.Context, name string) (func(), error) {
	release, err := l.local.share(ctx, name)
	if err != nil {
		return nil, err
	}
	return l.acquire(ctx, name, sharing(), release)
}

func (l *postgresLocks) exclude(ctx context.Context, name string) (func(), error) {
	release, err := l.local.exclude(ctx, name)
	if err != nil {
		return nil, err
	}
	return l.acquire(ctx, name, excluding(), release)
}

func (l *postgresLocks) tryExclude(ctx context.Context, name string) (func(), bool, error) {
	release, ok, err := l.local.tryExclude(ctx, name)
	if err != nil || !ok {
		return nil, false, err
	}
	unlock, err := l.try(ctx, name, excluding())
	if err != nil || unlock == nil {
		release()
		return nil, false, err
	}
	return sync.OnceFunc(func() { unlock(); release() }), true, nil
}

// acquire takes, among processes, the lock that this process holds locally.
func (l *postgresLocks) acquire(ctx context.Context, name string, m mode, release func()) (func(), error) {
	unlock, err := l.try(ctx, name, m)
	if err == nil && unlock == nil {
		unlock, err = l.wait(ctx, name, m)
	}
	if err != nil {
		release()
		return nil, fmt.Errorf("index: lock %s: %w", name, err)
	}
	return sync.OnceFunc(func() { unlock(); release() }), nil
}

// try takes a lock on the session if it is free; otherwise unlock is nil.
func (l *postgresLocks) try(ctx context.Context, name string, m mode) (unlock func(), err error) {
	select {
	case <-l.turn:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { l.turn <- struct{}{} }()
	fresh := l.session == nil
	ok, err := l.trySession(ctx, name, m)
	if err != nil && !fresh && ctx.Err() == nil {
		ok, err = l.trySession(ctx, name, m) // the session had broken, perhaps long ago
	}
	if err != nil || !ok {
		return nil, err
	}
	s := l.session
	s.held++
	return func() { l.release(context.WithoutCancel(ctx), s, name, m) }, nil
}

// trySession is try, for who has the turn.
func (l *postgresLocks) trySession(ctx context.Context, name string, m mode) (bool, error) {
	if l.session == nil {
		conn, err := l.connect(ctx)
		if err != nil {
			return false, err
		}
		l.session = &session{conn: conn}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), roundTrip)
	defer cancel()
	ok, err := statementTrue(ctx, l.session.conn, m.try, name)
	if err != nil {
		l.drop(ctx, err)
	}
	return ok, err
}

// release gives back a lock that was taken on s.
func (l *postgresLocks) release(ctx context.Context, s *session, name string, m mode) {
	<-l.turn // whose holder has no more than two round trips to make
	defer func() { l.turn <- struct{}{} }()
	s.held--
	if l.session != s {
		return // broken since, and the lock with it
	}
	ctx, cancel := context.WithTimeout(ctx, roundTrip)
	defer cancel()
	if _, err := statementTrue(ctx, s.conn, m.unlock, name); err != nil {
		l.drop(ctx, err)
	}
}

// drop gives up the session and all locks on it.
func (l *postgresLocks) drop(ctx context.Context, why error) {
	if l.session.held > 0 {
		l.log.Warn("the connection to PostgreSQL that holds locks broke; what holds them goes on without", "locks", l.session.held, "error", why)
	}
	l.session.conn.Close(ctx)
	l.session = nil
}

// wait takes a lock that isn't free, on a connection of its own.
func (l *postgresLocks) wait(ctx context.Context, name string, m mode) (func(), error) {
	var conn *pgx.Conn
	select {
	case conn = <-l.waiters:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	reused := conn != nil
	conn, err := l.waitOn(ctx, conn, name, m)
	if err != nil && reused && ctx.Err() == nil {
		conn, err = l.waitOn(ctx, nil, name, m) // it had broken while idle
	}
	if err != nil {
		l.waiters <- nil
		return nil, err
	}
	ctx = context.WithoutCancel(ctx)
	return func() {
		ctx, cancel := context.WithTimeout(ctx, roundTrip)
		defer cancel()
		l.giveBack(ctx, conn, name, m)
	}, nil
}

// waitOn waits on conn, or a new connection if it is nil. When ctx ends, pgx
// breaks the connection and tells the server to stop waiting.
func (l *postgresLocks) waitOn(ctx context.Context, conn *pgx.Conn, name string, m mode) (*pgx.Conn, error) {
	if conn == nil {
		var err error
		if conn, err = l.connect(ctx); err != nil {
			return nil, err
		}
	}
	if _, err := statementTrue(ctx, conn, m.wait, name); err != nil {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), roundTrip)
		defer cancel()
		return nil, errors.Join(err, conn.Close(closing))
	}
	return conn, nil
}

// giveBack unlocks what conn was waited on for, and keeps conn for the next.
func (l *postgresLocks) giveBack(ctx context.Context, conn *pgx.Conn, name string, m mode) {
	_, err := statementTrue(ctx, conn, m.unlock, name)
	closed := false
	select {
	case <-l.done:
		closed = true
	default:
	}
	if err != nil || closed {
		conn.Close(ctx)
		conn = nil
	}
	l.waiters <- conn
}

// close breaks the session and the connections that are idle. The others are
// closed when their locks are given back.
func (l *postgresLocks) close() {
	ctx, cancel := context.WithTimeout(context.Background(), roundTrip)
	defer cancel()
	close(l.done)
	<-l.turn
	if l.session != nil {
		l.drop(ctx, errors.New("the index is being closed"))
	}
	l.turn <- struct{}{}
	for range postgresWaiters {
		select {
		case conn := <-l.waiters:
			if conn != nil {
				conn.Close(ctx)
			}
		default:
		}
	}
}

// statementTrue runs a statement on the keys of a name's lock and gate.
func statementTrue(ctx context.Context, conn *pgx.Conn, sql, name string) (ok bool, err error) {
	return ok, conn.QueryRow(ctx, sql, lockKey(name), lockKey("gate of "+name)).Scan(&ok)
}
