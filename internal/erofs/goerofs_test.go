package erofs

import (
	"bytes"
	"io"
	"io/fs"
	"strings"
	"testing"

	goerofs "github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// walkGoErofs reads an image by a reader that has nothing in common with ours.
func walkGoErofs(image []byte, contents [][]byte) (files, error) {
	img, err := goerofs.Open(bytes.NewReader(image), goerofs.WithExtraDevices(readersAt(contents)...))
	if err != nil {
		return nil, err
	}
	found, key := make(files), make(map[string]int64)
	err = fs.WalkDir(img, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := fs.Lstat(img, path)
		if err != nil {
			return err
		}
		st := info.Sys().(*goerofs.Stat)
		f := &file{
			Mode: unixMode(st.Mode), UID: st.UID, GID: st.GID, Mtime: int64(st.Mtime), MtimeNsec: st.MtimeNs,
			Nlink: uint32(st.Nlink), Xattrs: make(map[string]string),
		}
		for name, value := range st.Xattrs {
			// go-erofs v0.3.1 puts a dot behind the names of ACLs.
			if strings.HasPrefix(name, "system.") {
				name = strings.TrimSuffix(name, ".")
			}
			f.Xattrs[name] = value
		}
		name := "/" + path
		if path == "." {
			name = "/"
		}
		found[name], key[name] = f, st.Ino
		switch f.Mode & modeType {
		case modeRegular:
			r, err := img.Open(path)
			if err != nil {
				return err
			}
			defer r.Close()
			p, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			f.Size, f.Content = st.Size, string(p)
		case modeSymlink:
			f.Target, err = fs.ReadLink(img, path)
		case modeChar, modeBlock:
			f.Major, f.Minor = decodeDevice(st.Rdev)
		}
		return err
	})
	link(found, key)
	return found, err
}

func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for bit, u := range map[fs.FileMode]uint32{
		fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000,
		fs.ModeDir: modeDir, fs.ModeSymlink: modeSymlink, fs.ModeNamedPipe: modeFIFO, fs.ModeSocket: modeSocket,
	} {
		if m&bit != 0 {
			mode |= u
		}
	}
	switch {
	case m&fs.ModeCharDevice != 0:
		mode |= modeChar
	case m&fs.ModeDevice != 0:
		mode |= modeBlock
	case m.IsRegular():
		mode |= modeRegular
	}
	return mode
}

func TestGoErofsSpecimen(t *testing.T) {
	img := specimen()
	contents := deviceContents(img.Devices)
	got, err := walkGoErofs(write(t, img), contents)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(expect(img, contents), got); diff != "" {
		t.Error(diff)
	}
}

func TestGoErofsRandom(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		img := drawImage(r)
		contents := deviceContents(img.Devices)
		got, err := walkGoErofs(write(t, img), contents)
		if err != nil {
			r.Fatal(err)
		}
		if diff := cmp.Diff(expect(img, contents), got); diff != "" {
			r.Fatal(diff)
		}
	})
}
