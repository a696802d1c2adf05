package index

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// Share takes the lock called name together with others who Share it, and waits
// for those who Exclude it, as long as ctx allows. unlock must be called, once.
//
// Whoever waits for a lock holds none of this DB, and so there is no deadlock;
// the exception is a lock that nobody ever waits for, because everybody comes
// by it with TryExclude. Waiters are served in order: a stream of Shares doesn't
// keep an Exclude waiting.
//
// On PostgreSQL locks hold across all replicas, on SQLite in this process. What
// becomes of a lock whose connection to PostgreSQL breaks is in postgres.go.
func (db *DB) Share(ctx context.Context, name string) (unlock func(), err error) {
	return db.locks.share(ctx, name)
}

// Exclude takes the lock called name alone. See Share.
func (db *DB) Exclude(ctx context.Context, name string) (unlock func(), err error) {
	return db.locks.exclude(ctx, name)
}

// TryExclude is Exclude without waiting for others: ok is false, and unlock nil,
// when somebody else holds the lock or waits for it.
func (db *DB) TryExclude(ctx context.Context, name string) (unlock func(), ok bool, err error) {
	return db.locks.tryExclude(ctx, name)
}

// PollExclude is Exclude by TryExclude, with a look every now and then: for locks
// whose holders take others meanwhile, and must not be waited for by who holds
// one. Nobody may ask for such a lock by Share or Exclude.
func (db *DB) PollExclude(ctx context.Context, name string, every time.Duration) (unlock func(), err error) {
	for {
		unlock, ok, err := db.TryExclude(ctx, name)
		if err != nil || ok {
			return unlock, err
		}
		select {
		case <-time.After(every):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// localLocks are fair shared and exclusive locks in this process.
type localLocks struct {
	mu     sync.Mutex
	byName map[string]*localLock // guarded by mu; only those held or waited for
}

// localLock is a lock: a holder that shares it has 1 of its weight, one that
// excludes others all. The semaphore serves its waiters in order.
type localLock struct {
	weight *semaphore.Weighted
	users  int // holders and waiters, guarded by localLocks.mu
}

const wholeLock = 1 << 30

func newLocalLocks() *localLocks { return &localLocks{byName: map[string]*localLock{}} }

func (l *localLocks) share(ctx context.Context, name string) (func(), error) {
	return l.acquire(ctx, name, 1)
}

func (l *localLocks) exclude(ctx context.Context, name string) (func(), error) {
	return l.acquire(ctx, name, wholeLock)
}

func (l *localLocks) tryExclude(_ context.Context, name string) (func(), bool, error) {
	lock := l.use(name)
	if !lock.weight.TryAcquire(wholeLock) {
		l.leave(name, lock)
		return nil, false, nil
	}
	return l.unlocker(name, lock, wholeLock), true, nil
}

func (l *localLocks) close() {}

func (l *localLocks) acquire(ctx context.Context, name string, n int64) (func(), error) {
	lock := l.use(name)
	if err := lock.weight.Acquire(ctx, n); err != nil {
		l.leave(name, lock)
		return nil, err
	}
	return l.unlocker(name, lock, n), nil
}

func (l *localLocks) unlocker(name string, lock *localLock, n int64) func() {
	return sync.OnceFunc(func() {
		lock.weight.Release(n)
		l.leave(name, lock)
	})
}

func (l *localLocks) use(name string) *localLock {
	l.mu.Lock()
	defer l.mu.Unlock()
	lock := l.byName[name]
	if lock == nil {
		lock = &localLock{weight: semaphore.NewWeighted(wholeLock)}
		l.byName[name] = lock
	}
	lock.users++
	return lock
}

func (l *localLocks) leave(name string, lock *localLock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if lock.users--; lock.users == 0 {
		delete(l.byName, name)
	}
}

// lockKey is a name as PostgreSQL's advisory locks have it, which is 64 bits.
func lockKey(name string) int64 {
	sum := sha256.Sum256([]byte("sluice " + name))
	return int64(binary.BigEndian.Uint64(sum[:]))
}
