package bed

import (
	"fmt"
	"os"
	"path/filepath"
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
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
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
	if err := os.Rename(tmp, dir); err != nil && !isThere(dir) {
		return "", err
	}
	return dir, nil
}

// isThere reports whether another process has made dir in the meantime.
func isThere(dir string) bool {
	_, err := os.Stat(dir)
	return err == nil
}
