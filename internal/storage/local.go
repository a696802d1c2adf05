package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/durable"
)

// Local is a Store in a directory of a local disk. Each object is a file at
// its key's path. Everything else is out of reach of keys, below .sluice:
//
//	DIR/.sluice/lock              flock: one process uses DIR at a time
//	DIR/.sluice/temporary/        objects that are being Put
//	DIR/.sluice/uploads/ID        bytes of an upload, appended in place
//	DIR/.sluice/uploads/ID.json   its last checkpoint
//	DIR/.sluice/shared/…          further hard links of objects, by identity
//
// The directory must be in one file system that has hard links.
type Local struct {
	dir      string
	lock     *os.File
	identity func(key string) string

	// mkdir is held for reading while an object gets its name and for
	// writing while directories are made, so that no object is acknowledged
	// in a directory that isn't durable yet.
	mkdir sync.RWMutex

	uploads sessions
}

// LocalOptions says how a Local works. The zero value is useful.
type LocalOptions struct {
	// Identity returns, for the key of an object that an upload commits, a
	// relative path that objects of the same content share and others don't,
	// such as one made from a digest; or "" when that isn't known. Objects of
	// one identity are stored once. Nil: nothing is shared, except by Link.
	Identity func(key string) string
}

// The layout below Local.dir.
const (
	internalDir  = ".sluice"
	temporaryDir = internalDir + "/temporary"
	uploadsDir   = internalDir + "/uploads"
	sharedDir    = internalDir + "/shared"
	lockFile     = internalDir + "/lock"
)

// OpenLocal opens the store in dir, which is made, for this user alone, if it
// doesn't exist: what it keeps isn't for everybody on the machine. No other
// process may have it open: that is ErrLocked.
func OpenLocal(dir string, opts LocalOptions) (*Local, error) {
	s := &Local{dir: dir, identity: opts.Identity}
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory %s can't be used: %w", dir, err)
	}
	for _, d := range []string{temporaryDir, uploadsDir, sharedDir} {
		if err := durable.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, fmt.Errorf("data directory %s can't be used: %w", dir, err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), lockPatience)
	defer cancel()
	lock, err := durable.Lock(ctx, filepath.Join(dir, lockFile))
	if errors.Is(err, durable.ErrLocked) {
		return nil, fmt.Errorf("data directory %s: %w", dir, ErrLocked)
	}
	if err != nil {
		return nil, fmt.Errorf("data directory %s can't be used: %w", dir, err)
	}
	s.lock = lock
	return s, nil
}

// lockPatience is how long OpenLocal waits for another process to end.
const lockPatience = time.Second

// Close lets other processes open the directory. No method may be called
// afterwards, and uploads must be closed before.
func (s *Local) Close() error { return s.lock.Close() }

// Check tells whether the store can take objects now.
func (s *Local) Check(context.Context) error {
	f, err := durable.Create(filepath.Join(s.dir, temporaryDir), 0o644)
	if err != nil {
		return fmt.Errorf("data directory %s can't be written: %w", s.dir, err)
	}
	f.Discard()
	return nil
}

// Open implements Reader.
func (s *Local) Open(_ context.Context, key string, offset, length int64) (Object, error) {
	path, err := s.path(key)
	if err != nil {
		return nil, err
	}
	f, err := openFile(path)
	if err != nil {
		return nil, localError(key, err)
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = fs.ErrNotExist
	}
	if err != nil {
		f.Close()
		return nil, localError(key, err)
	}
	length, err = rangeOf(key, info.Size(), offset, length)
	if err == nil && offset > 0 {
		_, err = f.Seek(offset, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &localObject{file: f, rest: io.LimitedReader{R: f, N: length}, size: info.Size()}, nil
}

// openFile is os.Open for a regular file. That asks the kernel, by five more
// system calls, whether the file can be waited for, which none can; a read of a
// range of a blob has hardly more than those altogether.
func openFile(path string) (*os.File, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), path), nil
		case !errors.Is(err, unix.EINTR):
			return nil, &fs.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

// Stat implements Reader.
func (s *Local) Stat(_ context.Context, key string) (int64, error) {
	path, err := s.path(key)
	if err != nil {
		return 0, err
	}
	info, err := os.Stat(path)
	if err == nil && info.IsDir() {
		err = fs.ErrNotExist
	}
	if err != nil {
		return 0, localError(key, err)
	}
	return info.Size(), nil
}

// Put implements Writer.
func (s *Local) Put(_ context.Context, key string, data []byte) error {
	if len(data) > MaxPut {
		return fmt.Errorf("object %s of %d bytes: at most %d can be put at once", key, len(data), MaxPut)
	}
	return s.place(key, func(path string) error {
		f, err := durable.Create(filepath.Join(s.dir, temporaryDir), 0o644)
		if err != nil {
			return err
		}
		defer f.Discard()
		if _, err := f.Write(data); err != nil {
			return err
		}
		return f.Commit(path)
	})
}

// Link implements Writer. It is a hard link, if the file system has one left;
// objects are never written in place, so the two stay independent.
func (s *Local) Link(_ context.Context, from, to string) error {
	source, err := s.path(from)
	if err != nil {
		return err
	}
	return s.place(to, func(path string) error {
		err := durable.Link(source, path)
		if errors.Is(err, syscall.EMLINK) {
			err = s.copyFile(source, path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			// Which of the two names is missing?
			if _, serr := os.Stat(source); serr != nil {
				return localError(from, serr)
			}
		}
		return err
	})
}

// copyFile is for a file that has as many links as its file system allows:
// 65,000 in ext4.
func (s *Local) copyFile(source, path string) error {
	r, err := os.Open(source)
	if err != nil {
		return err
	}
	defer r.Close()
	f, err := durable.Create(filepath.Join(s.dir, temporaryDir), 0o644)
	if err != nil {
		return err
	}
	defer f.Discard()
	if _, err := f.ReadFrom(r); err != nil {
		return err
	}
	return f.CommitNew(path)
}

// Delete implements Writer.
func (s *Local) Delete(_ context.Context, key string) error {
	path, err := s.path(key)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err == nil && info.IsDir() {
		err = fs.ErrNotExist
	}
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil {
		return localError(key, err)
	}
	s.unshare(key)
	// A concurrent Delete may have removed the directory meanwhile; then that
	// has to be durable in the next one up.
	parent := filepath.Dir(path)
	for err = durable.SyncDir(parent); errors.Is(err, fs.ErrNotExist) && parent != filepath.Clean(s.dir); err = durable.SyncDir(parent) {
		parent = filepath.Dir(parent)
	}
	if err != nil {
		return fmt.Errorf("object %s: its removal may not last: %w", key, err)
	}
	// Remove directories that are empty now. place makes them anew if an
	// object arrives meanwhile.
	for ; parent != filepath.Clean(s.dir); parent = filepath.Dir(parent) {
		if err := durable.Remove(parent); err != nil {
			break // not empty
		}
	}
	return nil
}

// place calls link, which gives an object its name, path, and makes the
// directory that path is in when it is missing.
func (s *Local) place(key string, link func(path string) error) error {
	path, err := s.path(key)
	if err != nil {
		return err
	}
	// A concurrent Delete may remove the directory between the two steps, so
	// one repetition can be too few; that it happens every time is as good
	// as impossible.
	for range 100 {
		s.mkdir.RLock()
		err = link(path)
		s.mkdir.RUnlock()
		if !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrNotFound) {
			break
		}
		s.mkdir.Lock()
		err = durable.MkdirAll(filepath.Dir(path), 0o755)
		s.mkdir.Unlock()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	if errors.Is(err, fs.ErrNotExist) && !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("object %s: directories of the store are missing: %v", key, err) //nolint:errorlint // must not be taken for an object that does not exist
	}
	return localError(key, err)
}

func (s *Local) path(key string) (string, error) {
	if err := CheckKey(key); err != nil {
		return "", err
	}
	return filepath.Join(s.dir, key), nil
}

// Sweep removes what crashes and abandoned clients left behind: uploads that
// nobody touched for uploadAge, temporary files, and shared bytes without an
// object. It may run at any time, and should when the store was opened.
func (s *Local) Sweep(ctx context.Context, uploadAge time.Duration) (SweepResult, error) {
	var r SweepResult
	var err error
	if r.Temporary, err = durable.Sweep(filepath.Join(s.dir, temporaryDir), time.Hour); err != nil {
		return r, err
	}
	// durable.WriteFile has its temporary files where the file is.
	if _, err = durable.Sweep(filepath.Join(s.dir, uploadsDir), time.Hour); err != nil {
		return r, err
	}
	if r.Uploads, err = s.sweepUploads(ctx, uploadAge); err != nil {
		return r, err
	}
	r.Shared, err = s.sweepShared(ctx)
	return r, err
}

// SweepResult counts what Sweep removed.
type SweepResult struct {
	Uploads, Temporary, Shared int
}

// localObject is a range of an open file.
type localObject struct {
	file *os.File
	rest io.LimitedReader
	size int64
}

func (o *localObject) Read(p []byte) (int, error) {
	n, err := o.rest.Read(p)
	if err == io.EOF && o.rest.N > 0 {
		err = io.ErrUnexpectedEOF // somebody truncated the file behind our back
	}
	return n, err
}

// WriteTo offers the writer a LimitedReader of a file, which is what makes
// net.TCPConn use sendfile(2).
func (o *localObject) WriteTo(w io.Writer) (int64, error) {
	n, err := io.Copy(w, &o.rest)
	if err == nil && o.rest.N > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (o *localObject) Size() int64  { return o.size }
func (o *localObject) Close() error { return o.file.Close() }

// localError names the object and translates what the file system said.
func localError(key string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrNotFound), errors.Is(err, ErrExists):
		return err
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: %w", key, ErrNotFound)
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%s: %w", key, ErrExists)
	case errors.Is(err, syscall.ENOTDIR):
		// A leading part of the key is an object; then key isn't one.
		return fmt.Errorf("%s: a leading part of the key is an object: %w", key, ErrNotFound)
	}
	return fmt.Errorf("object %s: %w", key, err)
}
