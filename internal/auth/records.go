package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"sluice/internal/storage"
)

// The errors of managing accounts and scope maps that callers tell apart; those
// returned wrap them and say what, and what to do.
var (
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("exists already")
	ErrInUse    = errors.New("in use")
	ErrInvalid  = errors.New("not allowed")
)

const (
	// recordTTL is how long what another replica changed may go unnoticed.
	recordTTL = 5 * time.Second

	// readTimeout bounds a read, which may be on behalf of several callers.
	readTimeout = 10 * time.Second

	maxRecord       = 1 << 20 // bytes of a stored account or scope map
	maxCachedTokens = 4096    // few bytes each, or that there is none
	maxCachedMaps   = 256
)

// record is what a table keeps.
type record[T any] interface {
	*T
	check(name string) error // that it is well-formed and belongs under name
}

// table is the objects of one kind in the storage, one for each name. Reads are
// cached for recordTTL, also that there is none; changes through this table are
// seen at once.
type table[T any, R record[T]] struct {
	store   storage.Store
	prefix  string // "registry/tokens/"
	what    string // "token"
	now     func() time.Time
	exclude func(ctx context.Context, name string) (unlock func(), err error)

	changing sync.Mutex // held while one record is changed; taken before exclude
	recent   cache[string, R]
	reads    singleflight.Group
}

// get returns a record, which is shared and must not be changed.
func (t *table[T, R]) get(ctx context.Context, name string) (R, error) {
	r, ok, _ := t.recent.get(name, t.now())
	if !ok {
		result := t.reads.DoChan(name, func() (any, error) {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readTimeout)
			defer cancel()
			now := t.now()
			_, _, sets := t.recent.get(name, now)
			r, err := t.read(ctx, name)
			if err == nil {
				t.recent.fill(name, r, now.Add(recordTTL), sets)
			}
			return r, err
		})
		select {
		case done := <-result:
			if done.Err != nil {
				return nil, done.Err
			}
			r = done.Val.(R)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if r == nil {
		return nil, fmt.Errorf("%s %s: %w", t.what, name, ErrNotFound)
	}
	return r, nil
}

// read reads a record from the storage; nil if there is none.
func (t *table[T, R]) read(ctx context.Context, name string) (R, error) {
	data, err := storage.ReadAll(ctx, t.store, t.prefix+name, maxRecord)
	if errors.Is(err, storage.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", t.what, name, err)
	}
	r := R(new(T))
	if err = json.Unmarshal(data, r); err == nil {
		err = r.check(name)
	}
	if err != nil {
		// Not wrapped: nobody may take it for a fault of what they asked.
		return nil, fmt.Errorf("object %s%s in the storage is damaged: %v", t.prefix, name, err) //nolint:errorlint // see above
	}
	return r, nil
}

// change replaces a record by what edit makes of it: old is nil if there is
// none, and a nil result deletes it. Without Options.Exclude two replicas can
// change one record at the same time, and the last one wins.
func (t *table[T, R]) change(ctx context.Context, name string, edit func(old R) (R, error)) (R, error) {
	t.changing.Lock()
	defer t.changing.Unlock()
	if t.exclude != nil {
		unlock, err := t.exclude(ctx, "auth/"+t.prefix+name)
		if err != nil {
			return nil, fmt.Errorf("%s %s can't be locked: %w", t.what, name, err)
		}
		defer unlock()
	}
	old, err := t.read(ctx, name)
	if err != nil {
		return nil, err
	}
	existed := old != nil
	r, err := edit(old)
	if err != nil {
		return nil, err
	}
	// Whatever comes of it, what is cached or being read is old.
	defer t.reads.Forget(name)
	defer t.recent.drop(name)
	if r == nil {
		if existed {
			err = t.store.Delete(ctx, t.prefix+name)
		}
		if err != nil && !errors.Is(err, storage.ErrNotFound) {
			return nil, fmt.Errorf("%s %s can't be deleted: %w", t.what, name, err)
		}
		return nil, nil
	}
	if err := r.check(name); err != nil {
		return nil, err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", t.what, name, err)
	}
	if err := t.store.Put(ctx, t.prefix+name, data); err != nil {
		return nil, fmt.Errorf("%s %s can't be stored: %w", t.what, name, err)
	}
	return r, nil
}

// list reads at most n records whose names sort after last.
func (t *table[T, R]) list(ctx context.Context, last string, n int) ([]R, error) {
	after := t.prefix
	if last != "" {
		after += last
	}
	var all []R
	for key, err := range t.store.List(ctx, t.prefix, after) {
		if err != nil {
			return nil, fmt.Errorf("list of each %s: %w", t.what, err)
		}
		if len(all) == n {
			break
		}
		name := strings.TrimPrefix(key, t.prefix)
		if strings.HasSuffix(name, "/") {
			continue // not ours
		}
		r, err := t.read(ctx, name)
		if err != nil {
			return nil, err
		}
		if r != nil { // not deleted meanwhile
			all = append(all, r)
		}
	}
	return all, nil
}

// clip bounds what a message repeats.
func clip(s string) string { return s[:min(len(s), 200)] }
