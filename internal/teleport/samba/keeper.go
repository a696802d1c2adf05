package samba

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"sluice/internal/durable"
	"sluice/internal/index"
	"sluice/internal/storage"
)

// Keeper keeps what smbd reads in step with the repositories that take part and
// with the time. Use Open. Several processes may keep one directory.
type Keeper struct {
	dir, disks string
	user       string
	accounts   Accounts
	enabled    func(context.Context) ([]string, error)
	log        *slog.Logger
	now        func() time.Time

	mu     sync.Mutex // held while the files are written
	repos  []string   // that the files have
	period int64      // at which they were written
}

// Options says what a Keeper keeps.
type Options struct {
	// Dir is where its files are; made if it isn't there. Disks is the directory
	// of teleport.Service.
	Dir, Disks string

	// Enabled returns the repositories that take part: teleport.Service.Enabled.
	Enabled func(context.Context) ([]string, error)

	// Lifetime is how long credentials are good at least.
	Lifetime time.Duration

	// Log gets what goes wrong in Run.
	Log *slog.Logger
}

// keyObject is the secret that passwords are made from.
const (
	keyObject = "registry/teleport/key"
	keySize   = 32
)

// Open returns a keeper whose secret is in store, where it is made if there is none.
func Open(ctx context.Context, store storage.Store, db *index.DB, opts Options) (*Keeper, error) {
	key, err := secret(ctx, store, db)
	if err != nil {
		return nil, fmt.Errorf("the secret of Teleport's credentials: %w", err)
	}
	if err := durable.MkdirAll(opts.Dir, 0o700); err != nil {
		return nil, err
	}
	me, err := user.Current()
	if err != nil {
		return nil, fmt.Errorf("whose Teleport's disks are: %w", err)
	}
	return &Keeper{
		dir: opts.Dir, disks: opts.Disks, user: me.Username, enabled: opts.Enabled, log: opts.Log, now: time.Now,
		accounts: Accounts{Key: key, Lifetime: opts.Lifetime}, period: -1,
	}, nil
}

func secret(ctx context.Context, store storage.Store, db *index.DB) ([]byte, error) {
	unlock, err := db.PollExclude(ctx, "teleport key", 100*time.Millisecond)
	if err != nil {
		return nil, err
	}
	defer unlock()
	key, err := storage.ReadAll(ctx, store, keyObject, keySize)
	if errors.Is(err, storage.ErrNotFound) {
		key = make([]byte, keySize)
		_, _ = rand.Read(key) // never fails
		err = store.Put(ctx, keyObject, key)
	}
	if err == nil && len(key) != keySize {
		err = fmt.Errorf("%s has %d bytes, not %d: remove it, and another is made", keyObject, len(key), keySize)
	}
	return key, err
}

// Credential returns a credential for a repository that takes part. When it
// returns, smbd's files have it. They have the next period's before that begins, so a
// disk that is full or a database that is away is no matter at once.
func (k *Keeper) Credential(ctx context.Context, repo string) (Credential, error) {
	now := k.now()
	k.mu.Lock()
	known := k.period == k.accounts.period(now) && slices.Contains(k.repos, repo)
	k.mu.Unlock()
	if !known {
		if err := k.Write(ctx); err != nil && !k.written(repo, now) {
			return Credential{}, err
		}
	}
	return k.accounts.Credential(repo, now), nil
}

// written reports whether smbd's files have a repository's credential of a time,
// though they may be those of the period before.
func (k *Keeper) written(repo string, at time.Time) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	ahead := k.accounts.period(at) - k.period
	return k.period >= 0 && ahead >= 0 && ahead <= 1 && slices.Contains(k.repos, repo)
}

// Write writes smbd's files as they are to be now.
func (k *Keeper) Write(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	repos, err := k.enabled(ctx)
	if err != nil {
		return err
	}
	now := k.now()
	names, err := accounts(repos)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name, content string
		perm          fs.FileMode
	}{
		// Whom a share is for exists before the share does.
		{AccountsFile, names, 0o644},
		{PasswordsFile, k.accounts.passwords(repos, now), 0o600},
		{SharesFile, shares(k.disks, k.user, repos), 0o644},
	} {
		name := filepath.Join(k.dir, f.name)
		if old, err := os.ReadFile(name); err == nil && bytes.Equal(old, []byte(f.content)) {
			continue
		}
		if err := durable.WriteFile(name, []byte(f.content), f.perm); err != nil {
			return err
		}
	}
	k.repos, k.period = repos, k.accounts.period(now)
	return nil
}

// Run writes the files whenever they are to be others, until ctx ends.
func (k *Keeper) Run(ctx context.Context) {
	tick := time.NewTicker(min(10*time.Second, k.accounts.Lifetime/4))
	defer tick.Stop()
	for {
		if err := k.Write(ctx); err != nil && ctx.Err() == nil {
			k.log.Error("what the file server is to know can't be written; it is tried again", "directory", k.dir, "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
