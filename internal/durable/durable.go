// Package durable changes files and directories so that, when a call has
// returned nil, its effect survives a crash of the process, of the kernel, and
// loss of power. The functions look like those of package os and differ in two
// promises:
//
//   - whole or not at all: nobody, not even after a crash, sees a file that is
//     half written;
//   - durable: content was fsynced before the name appeared, and the directory
//     that holds the name was fsynced before the call returned.
//
// The rules behind it, as fsync(2), open(2) and rename(2) have them: fsync of
// a file says nothing of its directory entry, that takes an fsync of the
// directory; rename(2) replaces a name atomically, but without an earlier fsync
// of the file the new name may be found pointing at zeros; and after a failed
// fsync the dirty pages may already be dropped, so a second fsync that succeeds
// proves nothing. A failed fsync here therefore always discards the file.
//
// Files under way have names that begin with TempPrefix. A crash can leave some
// behind: an owner of a directory (Directory, Lock) calls Sweep when it starts,
// skips such names (IsTemp) when it lists, and believes no file's length
// (ReadFile).
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// TempPrefix begins the names of files that are not committed.
const TempPrefix = ".tmp-"

// IsTemp reports whether name, without directories, is that of a file which is
// being written or which a crash left behind.
func IsTemp(name string) bool { return strings.HasPrefix(name, TempPrefix) }

// WriteFile makes the file name hold data, whether or not it existed. Concurrent
// writers are allowed, the last one wins whole; readers see the old content or
// the new. The directory must exist.
//
//	open("DIR/.tmp-N", O_CREAT|O_EXCL); write; fchmod; fsync
//	rename("DIR/.tmp-N", name)
//	fsync(DIR)
func WriteFile(name string, data []byte, perm os.FileMode) error {
	f, err := Create(filepath.Dir(name), perm)
	if err != nil {
		return err
	}
	defer f.Discard()
	if _, err := f.Write(data); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return f.Commit(name)
}

// MkdirAll makes dir and what is missing above it.
//
// It works from the top down and fsyncs a directory's parent before making
// anything inside, so that a directory which exists has durable ancestors. A
// dir that exists already may have been made by somebody who hasn't come to
// the fsync yet, so its parent is synced in any case; that costs nothing when
// it is clean.
func MkdirAll(dir string, perm os.FileMode) error {
	dir = filepath.Clean(dir)
	parent := filepath.Dir(dir)
	err := os.Mkdir(dir, perm)
	if errors.Is(err, fs.ErrNotExist) && parent != dir {
		if err := MkdirAll(parent, perm); err != nil {
			return err
		}
		err = os.Mkdir(dir, perm)
	}
	if errors.Is(err, fs.ErrExist) {
		info, serr := os.Stat(dir)
		if serr != nil {
			return serr
		}
		if !info.IsDir() {
			return &os.PathError{Op: "mkdir", Path: dir, Err: unix.ENOTDIR}
		}
		err = nil
	}
	if err != nil {
		return err
	}
	return SyncDir(parent)
}

// Remove removes a file or an empty directory.
func Remove(name string) error {
	if err := os.Remove(name); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(name))
}

// Link gives the file oldname, whose content must be durable already, the
// further name newname. It fails with fs.ErrExist when newname exists, and
// exactly one of concurrent callers doesn't; also that answer means that the
// name is durable.
func Link(oldname, newname string) error {
	err := os.Link(oldname, newname)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	// Whoever made the name may not have synced it yet, and the caller will
	// take "exists" for "safe".
	if serr := SyncDir(filepath.Dir(newname)); serr != nil {
		return serr
	}
	return err
}

// Rename moves the file oldname, whose content must be durable already, to
// newname, replacing what is there. Both names must be in one file system. The
// new name is durable before the old one can be found gone after a crash.
func Rename(oldname, newname string) error {
	if err := os.Rename(oldname, newname); err != nil {
		return err
	}
	newdir, olddir := filepath.Dir(newname), filepath.Dir(oldname)
	if err := SyncDir(newdir); err != nil {
		return err
	}
	if olddir == newdir {
		return nil
	}
	return SyncDir(olddir)
}

// SyncDir makes what was created, renamed and removed in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	err = d.Sync()
	// File systems without an fsync of directories (some FUSE and network
	// ones) say so with EINVAL; there is nothing more that we could do.
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	return err
}

// Sweep removes files from dir, but not from directories in it, that were begun
// and not committed, and that nobody wrote to for minAge. It returns how many
// it removed. A dir that doesn't exist has none.
func Sweep(dir string, minAge time.Duration) (int, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	n := 0
	for _, e := range entries {
		if !IsTemp(e.Name()) || e.IsDir() {
			continue
		}
		info, err := e.Info()
		if err != nil || time.Since(info.ModTime()) < minAge {
			continue // gone, or young enough to have an owner
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err == nil {
			n++
		}
	}
	return n, nil
}
