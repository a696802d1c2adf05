package transfer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
)

// Bounds of archives.
const (
	maxEntries  = 200_000
	maxNameSize = 512 // bytes of a file's name; longer ones are none of an image's
	maxLinks    = 8   // that are followed from one name
)

// files are the regular files of a directory or tar, by slash-separated names
// relative to it. Concurrent use is allowed.
type files interface {
	// open opens a file; fs.ErrNotExist.
	open(name string) (*file, error)

	// find returns the name under which a file has its content: one that two
	// links have in common.
	find(name string) (string, error)

	Close() error
}

// file is an open file, or a part of one.
type file struct {
	*io.SectionReader
	io.Closer
}

// dirFiles are those of a directory. Links that lead out of it aren't followed.
type dirFiles struct{ *os.Root }

func (d dirFiles) find(name string) (string, error) { return path.Clean(name), nil }

func (d dirFiles) open(name string) (*file, error) {
	f, err := d.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would wait for its writer
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &file{io.NewSectionReader(f, 0, info.Size()), f}, nil
}

// tarFiles are those of a tar, which stay where they are in it.
type tarFiles struct {
	f       *os.File
	entries map[string]entry // by cleaned name
}

// entry is where a file's content is, or which file has it.
type entry struct {
	offset, size int64
	link         string // cleaned; "" if this is the file
}

// readTar reads a tar's table of contents, without the contents.
func readTar(ctx context.Context, f *os.File) (*tarFiles, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	t := &tarFiles{f: f, entries: make(map[string]entry)}
	r := tar.NewReader(f) // which seeks over contents, and reads nothing ahead
	for count := 0; ; count++ {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, err := r.Next()
		if err == io.EOF {
			return t, nil
		}
		if err != nil {
			return nil, fmt.Errorf("it isn't a whole tar: %w", err)
		}
		if count >= maxEntries {
			return nil, fmt.Errorf("it has more than %d files", maxEntries)
		}
		offset, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		if err := t.add(h, offset, info.Size()); err != nil {
			return nil, err
		}
	}
}

// add adds the entry of a header whose content begins at offset.
func (t *tarFiles) add(h *tar.Header, offset, end int64) error {
	name := cleanName(h.Name)
	if len(name) > maxNameSize {
		return nil
	}
	e := entry{offset: offset, size: h.Size}
	switch h.Typeflag {
	case tar.TypeReg:
		for key := range h.PAXRecords {
			if strings.HasPrefix(key, "GNU.sparse.") {
				return fmt.Errorf("file %.100q in it is sparse, which images are not", name)
			}
		}
		if h.Size > end-offset {
			return fmt.Errorf("file %.100q in it has %d bytes, and the tar ends after %d: it was cut off", name, h.Size, end-offset)
		}
	case tar.TypeSymlink:
		if path.IsAbs(h.Linkname) || len(h.Linkname) > maxNameSize {
			return nil // it leads elsewhere
		}
		e = entry{link: cleanName(path.Join(path.Dir(name), h.Linkname))}
	case tar.TypeLink:
		e = entry{link: cleanName(h.Linkname)}
	default:
		return nil
	}
	if !fs.ValidPath(name) {
		return fmt.Errorf("file %.100q in it has a name that leads out of it", h.Name)
	}
	if _, ok := t.entries[name]; ok {
		return fmt.Errorf("file %.100q is in it twice", name)
	}
	t.entries[name] = e
	return nil
}

// cleanName makes "./a", "/a" and "a" the same.
func cleanName(name string) string { return path.Clean(strings.TrimLeft(name, "/")) }

func (t *tarFiles) find(name string) (string, error) {
	name = cleanName(name)
	for range maxLinks {
		e, ok := t.entries[name]
		if !ok {
			return "", fmt.Errorf("file %.100q: %w", name, fs.ErrNotExist)
		}
		if e.link == "" {
			return name, nil
		}
		name = e.link
	}
	return "", fmt.Errorf("file %.100q is a link to a link to a link", name)
}

func (t *tarFiles) open(name string) (*file, error) {
	name, err := t.find(name)
	if err != nil {
		return nil, err
	}
	e := t.entries[name]
	return &file{io.NewSectionReader(t.f, e.offset, e.size), io.NopCloser(nil)}, nil
}

func (t *tarFiles) Close() error { return t.f.Close() }

// readFile returns a file's content, if that has at most limit bytes.
func readFile(in files, name string, limit int64) ([]byte, error) {
	f, err := in.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := readBounded(f, f.Size(), limit)
	if err == nil && int64(len(b)) != f.Size() {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("file %.100q: %w", name, err)
	}
	return b, nil
}

// has reports whether there is a file of that name.
func has(in files, name string) (bool, error) {
	f, err := in.open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, f.Close()
}
