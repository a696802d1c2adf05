package storage

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"sluice/internal/durable"
)

// checkpointSuffix tells the checkpoint of an upload from its bytes.
const checkpointSuffix = ".json"

var uploadPattern = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// newUploadID returns a random UUID (RFC 9562, version 4), which is what the
// distribution specification wants of upload locations.
func newUploadID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// localUpload is a file that grows, and beside it a checkpoint that says how
// much of it counts. The bytes are always synced before the checkpoint that
// counts them is written.
type localUpload struct {
	store *Local
	id    string
	file  *os.File
	size  int64  // bytes written
	state []byte // as of the last checkpoint
	dirty bool   // bytes were written after the last sync
	final bool   // Commit began: the file may have a name that readers know
	done  func() // gives up the session; nil when closed
}

// checkpoint is the content of ID.json.
type checkpoint struct {
	Size  int64  `json:"size"`
	State []byte `json:"state,omitempty"`
}

// StartUpload implements Uploader.
func (s *Local) StartUpload(ctx context.Context) (Upload, error) {
	id := newUploadID()
	done, err := s.uploads.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(s.uploadPath(id), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		done()
		return nil, fmt.Errorf("start upload: %w", err)
	}
	return &localUpload{store: s, id: id, file: f, done: done}, nil
}

// ResumeUpload implements Uploader.
func (s *Local) ResumeUpload(ctx context.Context, id string) (Upload, error) {
	if !uploadPattern.MatchString(id) {
		return nil, fmt.Errorf("upload %.100q: %w", id, ErrUploadUnknown)
	}
	done, err := s.uploads.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	u, err := s.resume(id)
	if err != nil {
		done()
		return nil, err
	}
	u.done = done
	return u, nil
}

func (s *Local) resume(id string) (*localUpload, error) {
	f, err := os.OpenFile(s.uploadPath(id), os.O_RDWR, 0)
	if err != nil {
		return nil, uploadError(id, err)
	}
	if committed(f) {
		// A crash came between the two last steps of Commit. The bytes are
		// an object now and must not change any more.
		f.Close()
		os.Remove(s.uploadPath(id))
		return nil, uploadError(id, fs.ErrNotExist)
	}
	cp, err := s.readCheckpoint(id)
	if err == nil {
		// What follows the checkpoint may be the unsynced rest of a crash.
		err = f.Truncate(cp.Size)
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekEnd)
	}
	if err != nil {
		f.Close()
		return nil, uploadError(id, err)
	}
	return &localUpload{store: s, id: id, file: f, size: cp.Size, state: cp.State}, nil
}

// committed reports whether an upload's file has the name of an object too.
func committed(f *os.File) bool {
	info, err := f.Stat()
	if err != nil {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && st.Nlink > 1
}

// readCheckpoint returns the last checkpoint of an upload, the zero one if
// there was none.
func (s *Local) readCheckpoint(id string) (checkpoint, error) {
	data, err := os.ReadFile(s.uploadPath(id) + checkpointSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		return checkpoint{}, nil
	}
	if err != nil {
		return checkpoint{}, err
	}
	var cp checkpoint
	if err := json.Unmarshal(data, &cp); err != nil {
		return checkpoint{}, fmt.Errorf("its checkpoint: %w", err)
	}
	info, err := os.Stat(s.uploadPath(id))
	if err != nil {
		return checkpoint{}, err
	}
	if cp.Size < 0 || cp.Size > info.Size() {
		return checkpoint{}, fmt.Errorf("its checkpoint counts %d bytes of %d", cp.Size, info.Size())
	}
	return cp, nil
}

// StatUpload implements Uploader.
func (s *Local) StatUpload(_ context.Context, id string) (int64, []byte, error) {
	if !uploadPattern.MatchString(id) {
		return 0, nil, fmt.Errorf("upload %.100q: %w", id, ErrUploadUnknown)
	}
	if _, err := os.Stat(s.uploadPath(id)); err != nil {
		return 0, nil, uploadError(id, err)
	}
	cp, err := s.readCheckpoint(id)
	return cp.Size, cp.State, uploadError(id, err)
}

// CancelUpload implements Uploader. It takes the names away; a process that has
// the upload open notices when it next needs one.
func (s *Local) CancelUpload(_ context.Context, id string) error {
	if !uploadPattern.MatchString(id) {
		return fmt.Errorf("upload %.100q: %w", id, ErrUploadUnknown)
	}
	if err := os.Remove(s.uploadPath(id)); err != nil {
		return uploadError(id, err)
	}
	err := os.Remove(s.uploadPath(id) + checkpointSuffix)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return uploadError(id, err)
	}
	return uploadError(id, durable.SyncDir(filepath.Join(s.dir, uploadsDir)))
}

func (u *localUpload) ID() string { return u.id }

func (u *localUpload) Position() (int64, []byte) { return u.size, u.state }

func (u *localUpload) Write(p []byte) (int, error) {
	if u.final {
		return 0, fmt.Errorf("upload %s: its commit has begun", u.id)
	}
	n, err := u.file.Write(p)
	u.size += int64(n)
	u.dirty = u.dirty || n > 0
	if err != nil {
		return n, uploadError(u.id, err)
	}
	return n, nil
}

func (u *localUpload) Checkpoint(_ context.Context, state []byte) error {
	if len(state) > maxState {
		return fmt.Errorf("upload %s: state of %d bytes: %d are allowed", u.id, len(state), maxState)
	}
	if err := u.sync(); err != nil {
		return err
	}
	data, err := json.Marshal(checkpoint{Size: u.size, State: state})
	if err != nil {
		return err
	}
	if err := u.writeCheckpoint(data); err != nil {
		return uploadError(u.id, err)
	}
	// Canceled in the meantime? Looking after writing leaves no gap.
	if _, err := os.Stat(u.path()); err != nil {
		os.Remove(u.path() + checkpointSuffix)
		return uploadError(u.id, err)
	}
	u.state = state
	return nil
}

// writeCheckpoint replaces the file of the last checkpoint. Without bytes there
// is nothing that a loss of power could take, so nobody waits for the disk.
func (u *localUpload) writeCheckpoint(data []byte) error {
	if u.size > 0 {
		// The fsync of the directory covers the name of the bytes too.
		return durable.WriteFile(u.path()+checkpointSuffix, data, 0o644)
	}
	f, err := durable.Create(filepath.Dir(u.path()), 0o644)
	if err != nil {
		return err
	}
	defer f.Discard()
	if _, err := f.Write(data); err != nil {
		return err
	}
	return os.Rename(f.Name(), u.path()+checkpointSuffix)
}

func (u *localUpload) Content(context.Context) (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(u.file, 0, u.size)), nil
}

// Commit gives the file its name in the tree:
//
//	fsync(upload); link(upload or shared, object); fsync(directory of object)
//	unlink(upload)
func (u *localUpload) Commit(_ context.Context, key string) error {
	if err := u.sync(); err != nil {
		return err
	}
	u.final = true
	err := u.store.place(key, func(path string) error {
		// Also the shared object must not appear if this one was canceled.
		if _, err := os.Stat(u.path()); err != nil {
			return uploadError(u.id, err)
		}
		if err := u.linkShared(key, path); !errors.Is(err, errNotShared) {
			return err
		}
		err := durable.Link(u.path(), path)
		if err == nil {
			u.share(key, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, ErrExists) {
		return err
	}
	// Before Close: whoever resumes must not find what has become an object.
	os.Remove(u.path())
	os.Remove(u.path() + checkpointSuffix)
	u.Close()
	return err
}

func (u *localUpload) Close() error {
	if u.done == nil {
		return nil
	}
	err := u.file.Close()
	u.done()
	u.done = nil
	return err
}

// sync makes the bytes durable, and their name not: Checkpoint and Commit see
// to that.
func (u *localUpload) sync() error {
	if !u.dirty {
		return nil
	}
	if err := u.file.Sync(); err != nil {
		// The kernel may have dropped the pages; nothing of this upload can
		// be trusted any more.
		os.Remove(u.path())
		return uploadError(u.id, err)
	}
	u.dirty = false
	return nil
}

func (u *localUpload) path() string { return u.store.uploadPath(u.id) }

func (s *Local) uploadPath(id string) string { return filepath.Join(s.dir, uploadsDir, id) }

// sweepUploads removes uploads whose last write is older than age, and
// checkpoints of uploads that are gone.
func (s *Local) sweepUploads(ctx context.Context, age time.Duration) (int, error) {
	dir := filepath.Join(s.dir, uploadsDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	n := 0
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		id, isCheckpoint := strings.CutSuffix(e.Name(), checkpointSuffix)
		if isCheckpoint {
			if _, err := os.Stat(filepath.Join(dir, id)); errors.Is(err, fs.ErrNotExist) {
				os.Remove(filepath.Join(dir, e.Name()))
			}
			continue
		}
		info, err := e.Info()
		if err != nil || time.Since(info.ModTime()) < age {
			continue
		}
		if err := s.CancelUpload(ctx, id); err == nil {
			n++
		}
	}
	return n, nil
}

// uploadError names the upload and translates what the file system said.
func uploadError(id string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("upload %s: %w", id, ErrUploadUnknown)
	}
	return fmt.Errorf("upload %s: %w", id, err)
}
