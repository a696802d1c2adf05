package bed

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Dir returns the directory of everything that outlives a run:
// $SLUICE_CACHE, or ~/.cache/sluice.
func Dir() (string, error) {
	if d := os.Getenv("SLUICE_CACHE"); d != "" {
		return d, nil
	}
	c, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("finding a cache directory (set SLUICE_CACHE): %w", err)
	}
	return filepath.Join(c, "sluice"), nil
}

// cached returns the directory name below Dir, made by make if it is not
// there. make gets an empty temporary directory that becomes name when it
// returns nil, so that a directory under its final name is always whole.
func cached(name string, make func(tmp string) error) (string, error) {
	root, err := Dir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, name)
	if isThere(dir) {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(dir)
	if err != nil {
		return "", err
	}
	defer unlock()
	if isThere(dir) {
		return dir, nil // another process has made it in the meantime
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "."+filepath.Base(dir)+"-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := make(tmp); err != nil {
		return "", fmt.Errorf("making %s: %w", name, err)
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	return dir, os.Rename(tmp, dir)
}

// lock waits until no other process has the lock of that name: tests of several
// packages run at the same time, and want the same things on a new machine. The
// kernel takes it from a process that dies.
func lock(name string) (unlock func(), err error) {
	f, err := os.OpenFile(name+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

func isThere(dir string) bool {
	_, err := os.Stat(dir)
	return err == nil
}
