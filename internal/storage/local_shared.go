package storage

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"sluice/internal/durable"
)

// Objects of the same content are stored once: each has, besides its name in
// the tree, a hard link in the shared directory, and a later object of the same
// identity becomes one more link of that file. The number of links is the
// reference count, kept by the file system. The links in the shared directory
// are a convenience: losing them in a crash costs space, never an object, so
// they are not synced, and every race about them ends in storing bytes twice.

// errNotShared says that an object must be linked from its upload.
var errNotShared = errors.New("not shared")

// linkShared links path to an object of the same content that is there already,
// or returns errNotShared.
func (u *localUpload) linkShared(key, path string) error {
	shared := u.store.sharedPath(key)
	if shared == "" {
		return errNotShared
	}
	info, err := os.Stat(shared)
	if err != nil || info.Size() != u.size {
		return errNotShared // none, or damaged: don't spread it
	}
	err = durable.Link(shared, path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.EMLINK) {
		return errNotShared // unshared meanwhile, or no directory, or no link left
	}
	return err
}

// share lets later objects be linked to the one that path has become. That
// comes after path, so that an upload with two links is always committed.
func (u *localUpload) share(key, path string) {
	if shared := u.store.sharedPath(key); shared != "" {
		// Without the link a later upload of the same blob costs a copy, no more.
		_ = os.MkdirAll(filepath.Dir(shared), 0o755)
		_ = os.Link(path, shared)
	}
}

// unshare removes the shared link of a key that was deleted, if it is the last.
func (s *Local) unshare(key string) {
	if shared := s.sharedPath(key); shared != "" {
		removeUnlinked(shared)
	}
}

// removeUnlinked removes a shared link that no object uses. An object that is
// being linked to it at this moment keeps the bytes, since it has a link then.
func removeUnlinked(shared string) bool {
	info, err := os.Lstat(shared)
	if err != nil || !info.Mode().IsRegular() {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && st.Nlink == 1 && os.Remove(shared) == nil
}

func (s *Local) sharedPath(key string) string {
	if s.identity == nil {
		return ""
	}
	id := s.identity(key)
	if id == "" || CheckKey(id) != nil {
		return ""
	}
	return filepath.Join(s.dir, sharedDir, id)
}

// sweepShared removes the shared links that a crash left without an object.
func (s *Local) sweepShared(ctx context.Context) (int, error) {
	n := 0
	err := filepath.WalkDir(filepath.Join(s.dir, sharedDir), func(path string, e fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil || e.IsDir() {
			return nil // gone meanwhile
		}
		if removeUnlinked(path) {
			n++
		}
		return nil
	})
	return n, err
}
