package transfer

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"sluice/internal/durable"
	"sluice/oci"
)

const (
	// stateAge is for how long unfinished uploads are remembered. Registries
	// drop them after a day to a week.
	stateAge = 7 * 24 * time.Hour

	maxUploadID = 64 << 10 // bytes
)

// state is the memory of unfinished uploads to one repository: a directory with
// a file for each blob, which holds the upload's ID. Losing it costs only time,
// so its errors are logged and nothing else. A nil state remembers nothing.
//
// Its methods may be called concurrently for different blobs.
type state struct {
	dir  string
	lock *os.File // held while this process uses dir
	log  *slog.Logger
}

// openState returns the state of a repository, or nil if there is none: dir or
// the target has no name, the directory can't be written, or another process
// uses it.
func openState(dir string, dst Target, log *slog.Logger) *state {
	if dir == "" || dst.Name == "" {
		return nil
	}
	sum := oci.DigestOf([]byte(dst.Name + "\n" + dst.Repo))
	s := &state{dir: filepath.Join(dir, sum.Encoded()), log: log}
	err := durable.MkdirAll(s.dir, 0o700)
	if err == nil {
		s.lock, err = os.OpenFile(filepath.Join(s.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	}
	if err == nil {
		if err = syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			s.lock.Close()
		}
	}
	if err != nil {
		log.Warn("unfinished uploads will not be remembered", "dir", s.dir, "error", err)
		return nil
	}
	s.sweep()
	return s
}

// sweep removes what has been forgotten by the registry, too.
func (s *state) sweep() {
	_, _ = durable.Sweep(s.dir, 0) // ours alone
	entries, _ := os.ReadDir(s.dir)
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && e.Name() != "lock" && time.Since(info.ModTime()) > stateAge {
			os.Remove(filepath.Join(s.dir, e.Name()))
		}
	}
}

func (s *state) file(digest oci.Digest) string {
	return filepath.Join(s.dir, strings.Replace(digest.String(), ":", "-", 1))
}

// recall returns the ID of a blob's upload, or "".
func (s *state) recall(digest oci.Digest) string {
	if s == nil {
		return ""
	}
	id, err := os.ReadFile(s.file(digest))
	if err != nil || len(id) > maxUploadID {
		return ""
	}
	return string(id)
}

// remember notes the ID of a blob's upload.
func (s *state) remember(digest oci.Digest, id string) {
	if s == nil || len(id) > maxUploadID || s.recall(digest) == id {
		return
	}
	if err := durable.WriteFile(s.file(digest), []byte(id), 0o600); err != nil {
		s.log.Warn("an upload can't be remembered", "digest", digest, "error", err)
	}
}

// forget forgets a blob's upload.
func (s *state) forget(digest oci.Digest) {
	if s == nil {
		return
	}
	if err := os.Remove(s.file(digest)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("an upload can't be forgotten", "digest", digest, "error", err)
	}
}

func (s *state) close() {
	if s != nil {
		s.lock.Close()
	}
}
