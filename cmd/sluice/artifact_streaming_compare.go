package main

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"sluice/internal/blob"
	"sluice/internal/layer"
	"sluice/oci"
)

// original is a file of an image, made of the image's layers by other code than
// a conversion uses: Go's tar reader, and whiteouts applied one by one.
type original struct {
	typ      byte // tar.TypeReg, TypeDir, …; 0 for a directory that no layer names
	mode     fs.FileMode
	uid, gid int
	size     int64
	sum      [sha256.Size]byte
	link     string
	time     time.Time
	children map[string]*original // of a directory
	inLayer  int                  // the layer that last gave it
}

// readOriginal reads the layers of an image.
func readOriginal(ctx context.Context, reg oci.Registry, repo string, s *streamed) (*original, error) {
	root := &original{children: map[string]*original{}}
	for i, desc := range s.manifest.Layers {
		src := blob.Retry(blob.FromRegistry(reg, repo, desc), blob.RetryOptions{Total: 24 * time.Hour})
		r, err := src.ReadRange(ctx, 0, desc.Size)
		if err != nil {
			return nil, err
		}
		err = root.addLayer(oci.VerifyReader(r, desc), i)
		r.Close()
		if err != nil {
			return nil, fmt.Errorf("original layer %d (%s): %w", i, desc.Digest, err)
		}
	}
	return root, nil
}

func (o *original) addLayer(r io.Reader, number int) error {
	plain, err := layer.Decompress(r)
	if err != nil {
		return err
	}
	defer plain.Close()
	t := tar.NewReader(plain)
	for {
		h, err := t.Next()
		if err == io.EOF {
			_, err := io.Copy(io.Discard, plain)
			return err
		}
		if err != nil {
			return err
		}
		if err := o.add(h, t, number); err != nil {
			return fmt.Errorf("%q: %w", h.Name, err)
		}
	}
}

// add applies one member of a layer.
func (o *original) add(h *tar.Header, content io.Reader, number int) error {
	name := path.Clean("/" + h.Name)
	if name == "/" {
		o.set(h, number)
		return nil
	}
	dir := o.directory(path.Dir(name), number)
	base := path.Base(name)
	if base == ".wh..wh..opq" {
		for name, c := range dir.children {
			if !c.prune(number) {
				delete(dir.children, name)
			}
		}
		return nil
	}
	if hidden, ok := strings.CutPrefix(base, ".wh."); ok {
		if c := dir.children[hidden]; c != nil && c.inLayer != number {
			delete(dir.children, hidden)
		}
		return nil
	}
	if h.Typeflag == tar.TypeLink {
		target := o.lookup(path.Clean("/" + h.Linkname))
		if target == nil {
			return fmt.Errorf("hard link to %q, which there isn't", h.Linkname)
		}
		// The entry's attributes become those of the file, as unpacking has it.
		target.mode = target.mode.Type() | h.FileInfo().Mode()&^fs.ModeType
		target.uid, target.gid, target.time = h.Uid, h.Gid, h.ModTime
		dir.children[base] = target
		return nil
	}
	file := dir.children[base]
	if file == nil || h.Typeflag != tar.TypeDir || file.children == nil {
		file = &original{}
		dir.children[base] = file
	}
	file.set(h, number)
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	sum := sha256.New()
	_, err := io.Copy(sum, content)
	sum.Sum(file.sum[:0])
	return err
}

// prune removes what layers below gave, and reports whether anything is left.
func (o *original) prune(number int) bool {
	for name, c := range o.children {
		if !c.prune(number) {
			delete(o.children, name)
		}
	}
	return o.inLayer == number || len(o.children) > 0
}

func (o *original) set(h *tar.Header, number int) {
	o.typ, o.mode, o.uid, o.gid, o.time, o.inLayer = h.Typeflag, h.FileInfo().Mode(), h.Uid, h.Gid, h.ModTime, number
	switch h.Typeflag {
	case tar.TypeDir:
		if o.children == nil {
			o.children = map[string]*original{}
		}
	case tar.TypeSymlink:
		o.link, o.mode = h.Linkname, o.mode.Type()|fs.ModePerm // as all symbolic links of Linux
	case tar.TypeReg:
		o.size = h.Size
	}
}

// directory returns the directory of a name, made if need be.
func (o *original) directory(name string, number int) *original {
	for part := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		if part == "" {
			continue
		}
		c := o.children[part]
		if c == nil || c.children == nil {
			c = &original{children: map[string]*original{}, inLayer: number}
			o.children[part] = c
		}
		o = c
	}
	return o
}

func (o *original) lookup(name string) *original {
	for part := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		if o = o.children[part]; o == nil {
			return nil
		}
	}
	return o
}

// maxDifferences is how many differences are told.
const maxDifferences = 5

// compare compares a mounted image with the original and returns how many files
// there are. The error tells the first differences.
func (o *original) compare(ctx context.Context, dir string) (files int, err error) {
	var differences []error
	o.walk("/", func(name string, want *original) bool {
		if err = ctx.Err(); err != nil || len(differences) >= maxDifferences {
			return false
		}
		files++
		if d := want.differs(filepath.Join(dir, name)); d != nil {
			differences = append(differences, fmt.Errorf("mounted %s: %w", name, d))
		}
		return true
	})
	return files, errors.Join(append(differences, err)...)
}

func (o *original) walk(name string, visit func(string, *original) bool) bool {
	if !visit(name, o) {
		return false
	}
	for base, c := range o.children {
		if !c.walk(path.Join(name, base), visit) {
			return false
		}
	}
	return true
}

// differs returns how a file differs from the original.
func (o *original) differs(name string) error {
	info, err := os.Lstat(name)
	if err != nil {
		return err
	}
	if o.children != nil {
		if err := o.differsInNames(name); err != nil {
			return err
		}
	}
	if o.typ == 0 {
		return nil // nothing says what a directory that no layer names is like
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case info.Mode() != o.mode:
		return fmt.Errorf("mode %v, want %v", info.Mode(), o.mode)
	case ok && (int(st.Uid) != o.uid || int(st.Gid) != o.gid):
		return fmt.Errorf("owner %d:%d, want %d:%d", st.Uid, st.Gid, o.uid, o.gid)
	case info.ModTime().Unix() != o.time.Unix():
		return fmt.Errorf("modified %v, want %v", info.ModTime(), o.time)
	}
	switch o.typ {
	case tar.TypeSymlink:
		if link, err := os.Readlink(name); err != nil || link != o.link {
			return fmt.Errorf("link to %q, want %q, error %w", link, o.link, err)
		}
	case tar.TypeReg:
		return o.differsInContent(name, info.Size())
	}
	return nil
}

func (o *original) differsInNames(name string) error {
	entries, err := os.ReadDir(name)
	if err != nil {
		return err
	}
	var got, want []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	for base := range o.children {
		want = append(want, base)
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		return fmt.Errorf("it has %d names, want %d", len(got), len(want))
	}
	return nil
}

func (o *original) differsInContent(name string, size int64) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return err
	}
	if size != o.size || [sha256.Size]byte(sum.Sum(nil)) != o.sum {
		return fmt.Errorf("content of %d bytes with SHA-256 %x, want %d bytes with %x", size, sum.Sum(nil), o.size, o.sum)
	}
	return nil
}
