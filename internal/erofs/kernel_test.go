//go:build linux

package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// mountImage mounts an image by the kernel's own EROFS, the metadata and the
// devices being plain files, and returns where. It skips the test if that cannot
// be done here.
func mountImage(t testing.TB, meta string, devices []string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	at := t.TempDir()
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Skipf("this kernel has no EROFS: %v", err)
	}
	defer unix.Close(fd)
	set := func(key, value string) {
		if err := unix.FsconfigSetString(fd, key, value); err != nil {
			t.Fatalf("fsconfig %s=%s: %v", key, value, err)
		}
	}
	set("source", meta)
	for _, d := range devices {
		set("device", d)
	}
	if err := unix.FsconfigCreate(fd); errors.Is(err, unix.ENOTBLK) {
		t.Skip("this kernel cannot mount EROFS from plain files (Linux 6.12 can)")
	} else if err != nil {
		var log [4096]byte
		n, _ := unix.Read(fd, log[:])
		t.Fatalf("the kernel refuses the image: %v: %s", err, log[:max(n, 0)])
	}
	mnt, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		t.Fatal("fsmount:", err)
	}
	defer unix.Close(mnt)
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal("move_mount:", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Error("umount:", err)
		}
	})
	return at
}

// walkKernel reads a mounted tree through system calls.
func walkKernel(t testing.TB, root string) files {
	t.Helper()
	found, key := make(files), make(map[string]uint64)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		f := &file{
			Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: st.Mtim.Sec, MtimeNsec: uint32(st.Mtim.Nsec),
			Nlink: uint32(st.Nlink), Xattrs: make(map[string]string),
		}
		rel := "/" + strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		found[rel], key[rel] = f, st.Ino
		switch st.Mode & modeType {
		case modeRegular:
			f.Size, f.Content = st.Size, "large"
			if st.Size <= 16<<20 {
				p, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				f.Content = string(p)
			}
		case modeSymlink:
			if f.Target, err = os.Readlink(path); err != nil {
				return err
			}
		case modeChar, modeBlock:
			f.Major, f.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
		}
		return kernelXattrs(path, f.Xattrs)
	})
	if err != nil {
		t.Fatal(err)
	}
	link(found, key)
	return found
}

func kernelXattrs(path string, attrs map[string]string) error {
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, list)
	if err != nil {
		return fmt.Errorf("listxattr: %w", err)
	}
	value := make([]byte, 64<<10)
	for name := range bytes.SplitSeq(bytes.TrimSuffix(list[:n], []byte{0}), []byte{0}) {
		if len(name) == 0 {
			continue
		}
		n, err := unix.Lgetxattr(path, string(name), value)
		if err != nil {
			return fmt.Errorf("getxattr %q: %w", name, err)
		}
		attrs[string(name)] = string(value[:n])
	}
	return nil
}

// compareWithKernel mounts img and compares everything.
func compareWithKernel(t testing.TB, img Image) {
	t.Helper()
	contents := deviceContents(img.Devices)
	meta, devices := writeFiles(t, t.TempDir(), write(t, img), contents)
	if diff := cmp.Diff(expect(img, contents), walkKernel(t, mountImage(t, meta, devices))); diff != "" {
		t.Error(diff)
	}
}

func TestKernelSpecimen(t *testing.T) { compareWithKernel(t, specimen()) }

func TestKernelManySharedXattrs(t *testing.T) { compareWithKernel(t, manyShared()) }

func TestKernelNoDevices(t *testing.T) {
	compareWithKernel(t, Image{Root: dir(name("empty", &Inode{Mode: modeRegular}), name("hole", &Inode{Mode: modeRegular, Size: 5000}))})
	compareWithKernel(t, Image{Root: dir()})
}

func TestKernelRandom(t *testing.T) {
	if testing.Short() {
		t.Skip("many mounts")
	}
	rapid.Check(t, func(r *rapid.T) {
		img := drawImage(r)
		t.Run("image", func(t *testing.T) { compareWithKernel(t, img) })
		if t.Failed() {
			r.Fatal("differs from what the kernel shows")
		}
	})
}

func TestKernelManyDevices(t *testing.T) {
	img := Image{Root: dir()}
	for i := range 300 {
		size := int64(512 + 700*(i%5))
		img.Devices = append(img.Devices, Device{Size: roundUp(size, BlockSize), Tag: fmt.Sprint(i)})
		img.Root.Entries = append(img.Root.Entries, name(fmt.Sprint(i), &Inode{
			Mode: modeRegular | 0o444, Size: size, Extents: []Extent{{i, 0, size, 0}},
		}))
	}
	compareWithKernel(t, img)
}

func TestKernelLargeDirectory(t *testing.T) {
	img := Image{Root: dir()}
	for i := range 100_000 {
		img.Root.Entries = append(img.Root.Entries, name(fmt.Sprintf("entry-%d", i), &Inode{Mode: modeRegular | 0o644}))
	}
	meta, _ := writeFiles(t, t.TempDir(), write(t, img), nil)
	at := mountImage(t, meta, nil)
	entries, err := os.ReadDir(at)
	if err != nil || len(entries) != 100_000 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	for i := range 100_000 {
		if _, err := os.Lstat(fmt.Sprintf("%s/entry-%d", at, i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(at + "/entry-100000"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a name that is not there:", err)
	}
}

// A file may be larger than 4 GiB, lie beyond 4 GiB, and have holes.
func TestKernelLargeFile(t *testing.T) {
	const gib = int64(1 << 30)
	tmp := t.TempDir()
	device := filepath.Join(tmp, "device")
	f, err := os.Create(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	marks := map[int64]string{512: "start", 5 * gib: "five", 7*gib + 512 - 3: "end", 9 * gib: "beyond"}
	for off, s := range marks {
		if _, err := f.WriteAt([]byte(s), off); err != nil {
			t.Fatal(err)
		}
	}
	size := 10 * gib
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	img := Image{Devices: []Device{{Size: size}}, Root: dir(
		name("large", &Inode{Mode: modeRegular, Size: 7 * gib, Extents: []Extent{{0, 512, 7 * gib, 0}}}),
		name("sparse", &Inode{Mode: modeRegular, Size: 6*gib + 6, Extents: []Extent{{0, 9 * gib, 6, 6 * gib}}}),
	)}
	meta, _ := writeFiles(t, tmp, write(t, img), nil)
	at := mountImage(t, meta, []string{device})
	for _, c := range []struct {
		file string
		off  int64
		want string
	}{
		{"large", 0, "start"}, {"large", 5*gib - 512, "five"}, {"large", 7*gib - 3, "end"},
		{"sparse", 0, "\x00\x00\x00"}, {"sparse", 5 * gib, "\x00\x00\x00"}, {"sparse", 6 * gib, "beyond"},
	} {
		r, err := os.Open(filepath.Join(at, c.file))
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(c.want))
		if _, err := r.ReadAt(got, c.off); err != nil || string(got) != c.want {
			t.Errorf("%s at %d: %q, %v; want %q", c.file, c.off, got, err, c.want)
		}
		r.Close()
	}
}

// The image and its devices in one file mount without device= options.
func TestKernelUnifiedAddresses(t *testing.T) {
	img := specimen()
	contents := deviceContents(img.Devices)
	whole := write(t, img)
	for _, c := range contents {
		whole = append(whole, c...)
		whole = append(whole, make([]byte, roundUp(int64(len(c)), BlockSize)-int64(len(c)))...)
	}
	meta, _ := writeFiles(t, t.TempDir(), whole, nil)
	if diff := cmp.Diff(expect(img, contents), walkKernel(t, mountImage(t, meta, nil))); diff != "" {
		t.Error(diff)
	}
}

// Where a page goes on behind a file's last block, a mapping shows zeros and not what
// follows on the device. The rest of the last block itself can be seen; in a tar
// it is padding, which every writer of tars makes of zeros.
func TestKernelPageTails(t *testing.T) {
	img := specimen()
	contents := deviceContents(img.Devices)
	meta, devices := writeFiles(t, t.TempDir(), write(t, img), contents)
	at := mountImage(t, meta, devices)
	for path, want := range expect(img, contents) {
		if want.Size == 0 {
			continue
		}
		f, err := os.Open(filepath.Join(at, path))
		if err != nil {
			t.Fatal(err)
		}
		m, err := unix.Mmap(int(f.Fd()), 0, int(roundUp(want.Size, int64(os.Getpagesize()))), unix.PROT_READ, unix.MAP_SHARED)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		if string(m[:want.Size]) != want.Content {
			t.Errorf("%q: the mapping differs from the content", path)
		}
		if !isZero(m[roundUp(want.Size, BlockSize):]) {
			t.Errorf("%q: bytes behind the last block of the file can be seen in memory", path)
		}
		if err := unix.Munmap(m); err != nil {
			t.Error(err)
		}
	}
}

// An image that Check accepts must be one that the kernel mounts and reads to
// the end without an error, however it came about.
func TestKernelReadsWhatCheckAccepts(t *testing.T) {
	if testing.Short() {
		t.Skip("many mounts")
	}
	img := small()
	image := write(t, img)
	_, devices := writeFiles(t, t.TempDir(), image, deviceContents(img.Devices))
	r := rand.New(rand.NewPCG(6, 18))
	mounted := 0
	for mounted < 150 {
		p := slices.Clone(image)
		for range 1 + r.IntN(3) {
			p[superOff+r.IntN(len(p)-superOff)] ^= byte(1 + r.UintN(255))
		}
		if !checkBytes(t, seal(p)) {
			continue
		}
		mounted++
		t.Run("image", func(t *testing.T) {
			meta, _ := writeFiles(t, t.TempDir(), p, nil)
			got := walkKernel(t, mountImage(t, meta, devices))
			want := readAll(t, p, deviceContents(img.Devices))
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
		if t.Failed() {
			return
		}
	}
}
