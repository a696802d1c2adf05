package smb

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice/oci"
)

func TestKernelOptions(t *testing.T) {
	l := Login{Server: "127.0.0.1:1445", Share: "repository-0", Username: "user", Password: `a,b,seal=no,"c"`}
	options, err := cifsOptions(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []option{
		{"source", "//127.0.0.1/repository-0"}, {"ip", "127.0.0.1"}, {"port", "1445"}, {"vers", "3.1.1"},
		{"seal", ""}, {"sign", ""}, {"ro", ""}, {"username", "user"}, {"password", l.Password},
	} {
		if n := slices.Index(options, want); n < 0 {
			t.Errorf("no %v in %v", want, options)
		}
	}
	for server, want := range map[string]string{"localhost": "445", "[::1]:99": "99", "::1": "445", "[::1]": "445"} {
		l.Server = server
		if options, err := cifsOptions(t.Context(), l); err != nil || !slices.Contains(options, option{"port", want}) {
			t.Errorf("%s: %v, %v", server, options, err)
		}
	}
	l.Server, l.Username = "127.0.0.1", `Azure\account`
	if options, err := cifsOptions(t.Context(), l); err != nil || !slices.Contains(options, option{"domain", "Azure"}) || !slices.Contains(options, option{"username", "account"}) {
		t.Errorf("%v, %v", options, err)
	}
	for _, wrong := range []Login{
		{Server: "127.0.0.1:port", Share: "x"}, {Server: "127.0.0.1:99999", Share: "x"}, {Server: "127.0.0.1"},
		{Server: "127.0.0.1", Share: "a/b"}, {Server: "127.0.0.1", Share: "x", Password: strings.Repeat("x", 256)},
	} {
		if options, err := cifsOptions(t.Context(), wrong); err == nil {
			t.Errorf("%+v: %v", wrong, options)
		}
	}
}

// mounted returns a directory with a file system at dir/name that isn't CIFS, but
// mounted like it.
func mounted(t *testing.T, name string) (dir, mount string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir = t.TempDir()
	mount = filepath.Join(dir, name)
	if err := os.Mkdir(mount, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mount, unix.MNT_DETACH) })
	return dir, mount
}

func TestKernelTakesLeftoversAway(t *testing.T) {
	dir, mount := mounted(t, "share-1")
	if err := os.WriteFile(filepath.Join(mount, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	left, err := os.Open(filepath.Join(mount, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer left.Close() // also where it's in use
	k := NewKernel(dir, Options{})
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("%v, %v are left", entries, err)
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
}

func TestKernelFiles(t *testing.T) {
	_, mount := mounted(t, "share-1")
	root, err := os.Open(mount)
	if err != nil {
		t.Fatal(err)
	}
	k := &kernel{}
	c := &kernelConnection{kernel: k, dir: mount, root: root, closed: make(chan struct{})}
	outside := filepath.Join(t.TempDir(), "outside")
	for _, err := range []error{
		os.WriteFile(outside, []byte("secret"), 0o600),
		os.Mkdir(filepath.Join(mount, "dir"), 0o700),
		os.WriteFile(filepath.Join(mount, "dir/file"), []byte("content"), 0o600),
		os.Symlink(outside, filepath.Join(mount, "link")),
		os.Symlink("dir", filepath.Join(mount, "other")),
		unix.Mkfifo(filepath.Join(mount, "fifo"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	f, err := c.Open("dir/file")
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 10)
	if n, err := f.ReadAt(p, 2); n != 5 || err != io.EOF || string(p[:n]) != "ntent" || f.Size() != 7 {
		t.Errorf("%d, %v, %q, %d", n, err, p[:n], f.Size())
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	for _, path := range []string{"link", "other/file", "nothing", "dir/file/x", "../" + filepath.Base(mount)} {
		if _, err := c.Open(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, path := range []string{"fifo", "dir"} {
		if _, err := c.Open(path); !errors.Is(err, oci.ErrUnsupported) {
			t.Errorf("%s: %v", path, err)
		}
	}
	for range 2 {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	k.wg.Wait()
	if _, err := os.Stat(mount); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
	if _, err := c.Open("dir/file"); !errors.Is(err, ErrUnreachable) {
		t.Errorf("after Close: %v", err)
	}
}

func TestMountErrors(t *testing.T) {
	for errno, want := range map[unix.Errno]error{
		unix.EACCES: ErrRefused, unix.EKEYEXPIRED: ErrRefused, unix.ENOENT: fs.ErrNotExist,
		unix.ECONNREFUSED: ErrUnreachable, unix.EHOSTDOWN: ErrUnreachable, unix.EOPNOTSUPP: ErrUnreachable,
	} {
		if err := mountError(errno, Login{Share: "share"}); !errors.Is(err, want) {
			t.Errorf("%v: %v", errno, err)
		}
	}
}

// Without CIFS, connecting says why.
func TestKernelWithoutCIFS(t *testing.T) {
	why := KernelSupported()
	if why == nil {
		t.Skip("this kernel has CIFS: test/teleport tests it")
	}
	k := &kernel{dir: t.TempDir()}
	if _, err := k.Connect(t.Context(), Login{Server: "127.0.0.1:1", Share: "share", Username: "user", Password: "password"}); !errors.Is(err, ErrUnreachable) {
		t.Errorf("%v", err)
	}
	t.Logf("KernelSupported: %v", why)
}
