package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// File is a file that has no name yet. Write to it as to any *os.File, then
// call Commit or CommitNew; until then nobody finds it. Always defer Discard.
//
// Its methods must not be called concurrently, except those of *os.File.
type File struct {
	*os.File
	done bool // committed or discarded: the file is closed
}

// Create begins a file in dir, which must be in the same file system as the
// name that it is committed to.
//
// A named temporary file is used, not O_TMPFILE: an unnamed file can't replace
// a name, and can't be made at all on some file systems, so the named way would
// be needed besides.
func Create(dir string, perm os.FileMode) (*File, error) {
	f, err := os.CreateTemp(dir, TempPrefix)
	if err != nil {
		return nil, err
	}
	// CreateTemp makes the file 0600 and knows no other way.
	if err := f.Chmod(perm); err != nil {
		f.Close()
		os.Remove(f.Name())
		return nil, err
	}
	return &File{File: f}, nil
}

// Commit gives the file its name, replacing what has it, and closes it.
//
//	fsync(file); rename(temporary, name); fsync(directory of name)
//
// When it fails the file is discarded. Only if the last step failed, name may
// have its new content nevertheless.
func (f *File) Commit(name string) error {
	if err := f.sync(); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return f.finish(err)
	}
	// The directory that the temporary name was in needs no fsync: if that
	// name comes back after a crash, it is swept.
	return f.finish(SyncDir(filepath.Dir(name)))
}

// CommitNew is Commit for a name that must not exist: it fails with
// fs.ErrExist when it does, and of concurrent callers exactly one succeeds. When
// it fails so, the name that exists is durable too, and the file discarded.
//
//	fsync(file); link(temporary, name); fsync(directory of name); unlink(temporary)
func (f *File) CommitNew(name string) error {
	if err := f.sync(); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return f.finish(errors.Join(Link(f.Name(), name), ignoreNotExist(os.Remove(f.Name()))))
}

// Discard closes the file and removes it, unless it was committed. It may be
// called any number of times.
func (f *File) Discard() {
	if f.done {
		return
	}
	f.done = true
	f.Close()
	os.Remove(f.Name())
}

// sync makes the content durable; a file that can't be is discarded.
func (f *File) sync() error {
	if f.done {
		return fs.ErrClosed
	}
	if err := f.Sync(); err != nil {
		f.Discard()
		return err
	}
	return nil
}

// finish closes the file after an attempt to give it its name.
func (f *File) finish(err error) error {
	if err != nil {
		f.Discard()
		return err
	}
	f.done = true
	return f.Close()
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
