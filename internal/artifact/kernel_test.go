package artifact

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// mountEROFS mounts metadata with its devices, all of them files.
func mountEROFS(t testing.TB, metadata string, devices []string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Skipf("the kernel has no EROFS: %v", err)
	}
	defer unix.Close(fd)
	if err := unix.FsconfigSetString(fd, "source", metadata); err != nil {
		t.Fatal(err)
	}
	for _, d := range devices {
		if err := unix.FsconfigSetString(fd, "device", d); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.FsconfigCreate(fd); errors.Is(err, unix.ENOTBLK) {
		t.Skip("the kernel mounts EROFS from block devices only (file-backed mounts came with Linux 6.12)")
	} else if err != nil {
		t.Fatalf("mounting %s: %v", metadata, err)
	}
	mount, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(mount)
	dir := t.TempDir()
	if err := unix.MoveMount(mount, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	unmountLater(t, dir)
	return dir
}

func unmountLater(t testing.TB, dir string) {
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmounting %s: %v", dir, err)
		}
	})
}

// mount mounts one of the artifact's metadata images on its decoded devices.
func (b *builtStack) mount(t testing.TB, ref MetadataRef, devices []string) string {
	t.Helper()
	var own []string
	for _, d := range ref.Devices {
		own = append(own, devices[d])
	}
	return mountEROFS(t, b.unpack(t, ref).Name(), own)
}

// deviceFiles writes all decoded devices to files.
func (b *builtStack) deviceFiles(t testing.TB) []string {
	t.Helper()
	dir := t.TempDir()
	var names []string
	for i, content := range b.devices(t) {
		name := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	return names
}

// node is what stat, readlink, listxattr and read say of a file.
type node struct {
	Mode, UID, GID uint32
	Rdev           uint64
	Mtime          [2]int64
	Size           int64
	Target         string
	Xattrs         map[string]string
	Content        string
	Links          []string // the first of the names that are the same file
}

// walkTree reads all there is below root.
func walkTree(t testing.TB, root string) map[string]node {
	t.Helper()
	nodes := make(map[string]node)
	first := make(map[[2]uint64]string)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		n := node{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Rdev: st.Rdev, Mtime: [2]int64{st.Mtim.Sec, st.Mtim.Nsec}, Xattrs: xattrs(t, path)}
		name, _ := filepath.Rel(root, path)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			if n.Target, err = os.Readlink(path); err != nil {
				return err
			}
		case unix.S_IFREG:
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			n.Size, n.Content = st.Size, string(content)
			id := [2]uint64{st.Dev, st.Ino}
			if first[id] == "" {
				first[id] = name
			}
			n.Links = []string{first[id]}
		}
		nodes[name] = n
		return nil
	})
	if err != nil {
		t.Fatalf("%s: %v", root, err)
	}
	return nodes
}

func xattrs(t testing.TB, path string) map[string]string {
	t.Helper()
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]string)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 4096)
		k, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			t.Fatal(err)
		}
		all[name] = string(value[:k])
	}
	return all
}

// The kernel shows what was in the directory that the tar was made of.
func TestKernelShowsWhatWasArchived(t *testing.T) {
	src := t.TempDir()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(src, name) }
	do(os.Mkdir(at("dir"), 0o750))
	for i, n := range []int{0, 1, 511, 512, 513, 4096, 100_001, 1 << 20, 1_300_007} {
		do(os.WriteFile(at(fmt.Sprintf("dir/file%d", i)), words(uint64(n), n), 0o640))
	}
	do(os.Link(at("dir/file6"), at("hard")))
	do(os.Symlink("dir/file6", at("symbolic")))
	do(os.WriteFile(at(strings.Repeat("n", 255)), []byte("long name"), 0o600))
	do(os.WriteFile(at("not\xffutf8"), []byte("name"), 0o4755))
	sparse, err := os.Create(at("sparse"))
	do(err)
	_, err = sparse.WriteAt(words(1, 70_000), 3<<20)
	do(err)
	_, err = sparse.WriteAt([]byte("end"), 9<<20)
	do(err)
	do(sparse.Close())
	if os.Geteuid() != 0 {
		t.Skip("needs root to make device nodes and to mount")
	}
	do(unix.Mknod(at("char"), unix.S_IFCHR|0o600, int(unix.Mkdev(5, 1))))
	do(unix.Mknod(at("block"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 70_000))))
	do(unix.Mkfifo(at("fifo"), 0o600))
	do(os.Chown(at("fifo"), 3_000_000_000, 100_000))
	if err := unix.Setxattr(at("dir/file1"), "user.note", []byte("a\x00note"), 0); err != nil {
		t.Logf("no user xattrs here: %v", err)
	}
	do(unix.Setxattr(at("dir/file2"), "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	do(os.Chtimes(at("dir"), time.Unix(1, 5), time.Unix(1_234_567_890, 987_654_321)))
	do(os.Chmod(src, 0o755)) // what layers' roots always are

	content, err := exec.CommandContext(t.Context(), "tar", "-C", src, "--sparse", "--xattrs", "--xattrs-include=*", "--format=posix", "--sort=name", "-cf", "-", ".").Output()
	if err != nil {
		t.Skipf("needs GNU tar: %v", err)
	}
	b := buildStack(t, [][]byte{content}, EncodeOptions{})
	if b.Manifest.Layers[0].Sparse == nil {
		t.Error("tar wrote no sparse member, so the test doesn't test it")
	}
	devices := b.deviceFiles(t)
	want := walkTree(t, src)
	for what, ref := range map[string]MetadataRef{"merged": b.Manifest.Metadata, "own": b.Manifest.Layers[0].Metadata} {
		if diff := cmp.Diff(want, walkTree(t, b.mount(t, ref, devices))); diff != "" {
			t.Errorf("%s (-archived +mounted): %.3000s", what, diff)
		}
	}
}

// The kernel shows the same in the one mount of the merged metadata as in an
// overlayfs of one mount per layer.
func TestKernelShowsMergedAsStacked(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			b := buildStack(t, randomStack(t, seed), EncodeOptions{})
			devices := b.deviceFiles(t)
			merged := b.mount(t, b.Manifest.Metadata, devices)
			lower := []string{t.TempDir()} // overlayfs wants two
			for _, l := range b.Manifest.Layers {
				lower = append(lower, b.mount(t, l.Metadata, devices))
			}
			slices.Reverse(lower) // the topmost comes first
			stacked := t.TempDir()
			if err := unix.Mount("overlay", stacked, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")); err != nil {
				t.Skipf("the kernel has no overlayfs: %v", err)
			}
			unmountLater(t, stacked)
			want, got := walkTree(t, stacked), walkTree(t, merged)
			for _, nodes := range []map[string]node{want, got} {
				for name, n := range nodes {
					n.Links = nil // overlayfs keeps links within one layer only
					nodes[name] = n
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-stacked +merged): %.3000s", diff)
			}
		})
	}
}

// randomStack makes up layers that add, replace, hide and link.
func randomStack(t testing.TB, seed uint64) [][]byte {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 3))
	dirs := []string{"", "a/", "a/b/", "c/"}
	pick := func() string { return dirs[r.IntN(len(dirs))] + string(rune('m'+r.IntN(6))) }
	files := make(map[string]bool) // that exist in the layers so far, and are regular
	var tars [][]byte
	for range 2 + r.IntN(4) {
		entries := []entry{dir("a"), dir("a/b"), dir("c")}
		used := make(map[string]bool)
		for range 3 + r.IntN(12) {
			name := pick()
			if used[name] {
				continue
			}
			used[name] = true
			base, parent := filepath.Base(name), strings.TrimSuffix(name, filepath.Base(name))
			switch r.IntN(10) {
			case 0:
				entries = append(entries, link(name, "a/b", tar.TypeSymlink))
				delete(files, name)
			case 1:
				entries = append(entries, dir(name), file(name+"/in", "in a directory"))
				delete(files, name)
			case 2, 3:
				entries = append(entries, file(parent+".wh."+base, ""))
				delete(files, name)
			case 4:
				for _, target := range slices.Sorted(maps.Keys(files)) { // of a lower layer or of this one
					if !used[target] {
						entries = append(entries, link(name, target, tar.TypeLink))
						files[name] = true
						break
					}
				}
			default:
				e := file(name, string(words(r.Uint64N(50), r.IntN(70_000))))
				e.Uid, e.Gid, e.Mode = r.IntN(1<<20), r.IntN(1<<20), int64(r.IntN(0o10000))
				entries = append(entries, e)
				files[name] = true
			}
		}
		tars = append(tars, layerTar(t, entries...))
	}
	return append(tars, sparseTar(t))
}

// Reading back through a context that is done must not hang or panic.
func TestDecodingStopsWithTheContext(t *testing.T) {
	b := buildStack(t, stack(t), EncodeOptions{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Verify(ctx, b.Manifest, bytes.Clone(b.config), b.sink.source); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
