package storage

import (
	"context"
	"errors"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// List implements Reader. It reads the directory whole, since the order of
// names is the file system's secret.
func (s *Local) List(ctx context.Context, prefix, after string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if err := checkPrefix(prefix); err != nil {
			yield("", err)
			return
		}
		dir := filepath.Join(s.dir, prefix)
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
			yield("", localError(prefix, err))
			return
		}
		names := make([]string, 0, len(entries))
		for _, e := range entries {
			name := prefix + e.Name()
			if strings.HasPrefix(e.Name(), ".") {
				continue // ours, or somebody's lost+found of a kind
			}
			if e.IsDir() {
				name += "/" // before sorting: "a-b/" is before "a/"
			}
			if name > after {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		for _, name := range names {
			if err := ctx.Err(); err != nil {
				yield("", err)
				return
			}
			if strings.HasSuffix(name, "/") {
				some, err := hasObject(filepath.Join(s.dir, name))
				if err != nil {
					yield("", localError(name, err))
					return
				}
				if !some {
					continue
				}
			}
			if !yield(name, nil) {
				return
			}
		}
	}
}

// hasObject reports whether there is a file anywhere below dir. Deletions remove
// directories that become empty, but not atomically.
func hasObject(dir string) (bool, error) {
	d, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer d.Close()
	for {
		entries, err := d.ReadDir(64)
		for _, e := range entries {
			if !e.IsDir() {
				return true, nil
			}
			if some, err := hasObject(filepath.Join(dir, e.Name())); some || err != nil {
				return some, err
			}
		}
		if err != nil || len(entries) == 0 {
			return false, nil // io.EOF, or removed while we read
		}
	}
}
