package smb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"sluice/oci"
)

// NewKernel returns a share that the kernel's CIFS mounts in directories of dir, one
// for each connection, and whose files are read there: SMB 3.1.1, signed and encrypted,
// or not at all. Nothing else may be in dir; mounts that another process left there are
// taken away. It needs root, and KernelSupported.
func NewKernel(dir string, o Options) *Client {
	k := &kernel{dir: dir}
	k.clear()
	return New(k, o)
}

// KernelSupported returns nil, or why the kernel can't mount shares.
func KernelSupported() error {
	fs, err := unix.Fsopen(cifs, unix.FSOPEN_CLOEXEC) // loads the module
	switch {
	case err == nil:
		return unix.Close(fs)
	case errors.Is(err, unix.ENODEV):
		return errors.New("the kernel has no CIFS: neither is it built in nor is there a module cifs to load")
	case errors.Is(err, unix.EPERM):
		return errors.New("mounting a share with the kernel's CIFS needs root")
	}
	return fmt.Errorf("the kernel can't mount shares: %w", err)
}

const cifs = "cifs"

// kernel is the Transport that is the kernel's CIFS. Options are set one by one, by
// fsconfig(2), so that passwords may have commas in them; nobody but the kernel sees
// them.
type kernel struct {
	dir string
	wg  sync.WaitGroup // calls that nobody may wait for any more
}

// clear takes away what is in the directory.
func (k *kernel) clear() {
	entries, err := os.ReadDir(k.dir)
	if err != nil {
		return // there's nothing
	}
	for _, e := range entries {
		_ = unmount(filepath.Join(k.dir, e.Name())) // what can't be is in nobody's way
	}
}

// unmount takes a mount away, with what is under way, and its directory.
func unmount(dir string) error {
	err := unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		err = nil // it isn't mounted
	}
	if rerr := os.Remove(dir); err == nil && !errors.Is(rerr, os.ErrNotExist) {
		err = rerr
	}
	return err
}

// Close waits for calls that nobody waited for, as long as the kernel takes to give
// them up.
func (k *kernel) Close() error {
	k.wg.Wait()
	k.clear()
	return nil
}

func (k *kernel) Connect(ctx context.Context, l Login) (Connection, error) {
	options, err := cifsOptions(ctx, l)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	mount, err := abandon(k, ctx.Done(), func() (int, error) { return openCIFS(options) }, func(mount int) { unix.Close(mount) })
	switch {
	case errors.Is(err, errAbandoned):
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, context.Cause(ctx))
	case err != nil:
		return nil, mountError(err, l)
	}
	defer unix.Close(mount) // which undoes it unless it has a place
	return k.place(mount)
}

// errAbandoned is that nobody waits any more.
var errAbandoned = fmt.Errorf("%w: the kernel hasn't answered", ErrUnreachable)

// abandon makes a call that the kernel may hang in, and waits for it until done is
// closed. What comes of it after that is undone.
func abandon[T any](k *kernel, done <-chan struct{}, call func() (T, error), undo func(T)) (T, error) {
	type result struct {
		v   T
		err error
	}
	results := make(chan result)
	k.wg.Go(func() {
		v, err := call()
		select {
		case results <- result{v, err}:
		case <-done:
			if err == nil {
				undo(v)
			}
		}
	})
	select {
	case r := <-results:
		return r.v, r.err
	case <-done:
		var none T
		return none, errAbandoned
	}
}

// place gives a mount its place in the tree.
func (k *kernel) place(mount int) (Connection, error) {
	if err := os.MkdirAll(k.dir, 0o700); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(k.dir, "share-")
	if err != nil {
		return nil, err
	}
	err = unix.MoveMount(mount, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mounting the share at %s: %w", dir, err), os.Remove(dir))
	}
	root, err := os.Open(dir)
	if err != nil {
		return nil, errors.Join(err, unmount(dir))
	}
	return &kernelConnection{kernel: k, dir: dir, root: root, closed: make(chan struct{})}, nil
}

// option is one of a mount; without a value, it is a flag.
type option struct{ key, value string }

// cifsOptions returns the options of a mount (mount.cifs(8)). It asks where the server
// is, which the kernel can't.
func cifsOptions(ctx context.Context, l Login) ([]option, error) {
	host, port := serverOf(l)
	ip, err := netip.ParseAddr(host)
	if err != nil {
		found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			return nil, err
		}
		ip = found[0].Unmap()
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return nil, fmt.Errorf("the port of %q is no number", l.Server)
	}
	if l.Share == "" || strings.ContainsAny(l.Share+host, `/\`) {
		return nil, fmt.Errorf("//%s/%s is no name of a share", host, l.Share)
	}
	domain, user := userOf(l)
	options := []option{
		{"source", "//" + host + "/" + l.Share}, {"ip", ip.String()}, {"port", port},
		{"vers", "3.1.1"}, {"seal", ""}, {"sign", ""}, {"ro", ""},
		{"username", user}, {"password", l.Password},
		{"soft", ""}, {"echo_interval", "5"}, // what can't be read ends with an error, soon
		{"cache", "none"},                                      // ours is enough
		{"nolease", ""}, {"actimeo", "0"}, {"closetimeo", "0"}, // a file is what the server has by its name now
		{"nodfs", ""}, {"nosharesock", ""}, // no other server, nobody else's session
	}
	if domain != "" {
		options = append(options, option{"domain", domain})
	}
	for _, o := range options {
		if len(o.value) > 255 {
			return nil, fmt.Errorf("the %s is longer than the kernel takes", o.key)
		}
	}
	return options, nil
}

// openCIFS makes a mount that has no place in the tree yet: closing the descriptor
// undoes it.
func openCIFS(options []option) (int, error) {
	fs, err := unix.Fsopen(cifs, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen %s: %w", cifs, err)
	}
	defer unix.Close(fs)
	for _, o := range options {
		if o.value == "" {
			err = unix.FsconfigSetFlag(fs, o.key)
		} else {
			err = unix.FsconfigSetString(fs, o.key, o.value)
		}
		if err != nil {
			return -1, fmt.Errorf("setting the option %s: %w", o.key, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("mounting: %w%s", err, kernelSays(fs))
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC,
		unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC|unix.MOUNT_ATTR_NOSYMFOLLOW)
}

// kernelSays returns what the kernel wrote into the log of the file system's context.
func kernelSays(fs int) string {
	buf := make([]byte, 1024)
	n, err := unix.Read(fs, buf)
	if err != nil || n <= 0 {
		return ""
	}
	return " (" + strings.TrimSpace(string(buf[:n])) + ")"
}

// mountError is what an error of a mount means.
func mountError(err error, l Login) error {
	switch {
	case is(err, unix.EACCES, unix.EKEYREJECTED, unix.EKEYEXPIRED, unix.EKEYREVOKED):
		return fmt.Errorf("%w (%w)", ErrRefused, err)
	case is(err, unix.ENOENT, unix.ENXIO):
		return NotExist("share " + l.Share)
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

func is(err error, any ...unix.Errno) bool {
	for _, e := range any {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

type kernelConnection struct {
	kernel *kernel
	dir    string
	root   *os.File
	closed chan struct{}
	once   sync.Once
}

func (c *kernelConnection) Open(path string) (File, error) {
	f, err := abandon(c.kernel, c.closed, func() (*kernelFile, error) { return c.open(path) }, func(f *kernelFile) { f.f.Close() })
	if err != nil {
		return nil, err
	}
	return f, nil
}

// open opens a file. Nothing that the server may have there leads out of the mount, or
// waits to be opened.
func (c *kernelConnection) open(path string) (*kernelFile, error) {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	var fd int
	raw, err := c.root.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(root uintptr) { fd, err = unix.Openat2(int(root), path, &how) })
		err = errors.Join(err, cerr)
	}
	if err != nil {
		return nil, kernelFileError(err, path)
	}
	f := os.NewFile(uintptr(fd), path)
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = oci.ErrUnsupported.Withf("%s is no file on the file server, but %v", path, info.Mode())
	}
	if err != nil {
		return nil, errors.Join(kernelFileError(err, path), f.Close())
	}
	return &kernelFile{conn: c, f: f, size: info.Size()}, nil
}

// Close has the kernel end what is under way, and waits for nothing.
func (c *kernelConnection) Close() error {
	c.once.Do(func() {
		close(c.closed)
		c.kernel.wg.Go(func() {
			_ = c.root.Close() // nothing was written
			_ = unmount(c.dir) // or kernel.Close does it
		})
	})
	return nil
}

type kernelFile struct {
	conn *kernelConnection
	f    *os.File
	size int64
}

func (f *kernelFile) Size() int64 { return f.size }

func (f *kernelFile) ReadAt(p []byte, off int64) (int, error) {
	// Not into p: the kernel may write there long after nobody waits any more.
	buf := make([]byte, len(p))
	n, err := abandon(f.conn.kernel, f.conn.closed, func() (int, error) { return f.f.ReadAt(buf, off) }, func(int) {})
	copy(p, buf[:n])
	return n, kernelFileError(err, f.f.Name())
}

func (f *kernelFile) Close() error {
	f.conn.kernel.wg.Go(func() { _ = f.f.Close() }) // nothing was written
	return nil
}

// kernelFileError is what an error of a file means. Also a session that the server
// doesn't take up again, after the connection broke, is a file that may not be read.
func kernelFileError(err error, path string) error {
	var refused *oci.Error
	switch {
	case err == nil, err == io.EOF, errors.Is(err, errAbandoned), errors.As(err, &refused):
		return err
	case is(err, unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.EXDEV):
		return NotExist(path)
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}
