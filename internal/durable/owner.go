package durable

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// ErrLocked: another process has the lock.
var ErrLocked = errors.New("another process has it")

// lockPause is between two attempts to get a lock.
const lockPause = 20 * time.Millisecond

// Lock takes the file name, which it makes, for this process, until the file is
// closed or the process ends, however it does. It waits for who has it until ctx
// ends, then the error is ErrLocked. That may be a child of this process that was
// forked and has yet to begin its program. The file must never be removed: a
// process might have it open and lock a file that has no name any more.
func Lock(ctx context.Context, name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return f, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock %s: %w; stop it first: %w", name, ErrLocked, ctx.Err()), f.Close())
		case <-time.After(lockPause):
		}
	}
}

// Directory makes a directory that only this process's user may enter, with others
// in it, and returns its name as the mount table has it: absolute and without
// symbolic links.
func Directory(name string, within ...string) (string, error) {
	if err := MkdirAll(name, 0o700); err != nil {
		return "", err
	}
	name, err := filepath.Abs(name)
	if err == nil {
		name, err = filepath.EvalSymlinks(name)
	}
	if err != nil {
		return "", err
	}
	for _, child := range within {
		if err := MkdirAll(filepath.Join(name, child), 0o700); err != nil {
			return "", err
		}
	}
	return name, nil
}

// ReadFile reads a file that is expected to have at most limit bytes. One that has
// more, because it's damaged or somebody else's, is an error, and isn't read.
func ReadFile(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(content)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", name, limit)
	}
	return content, nil
}
