package plane

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"sluice/internal/erofs"
)

// Support is what this machine can do.
type Support struct {
	// Kernel release, as uname -r prints it.
	Kernel string
	// Mode that works, empty if none does.
	Mode Mode
}

// Mode is a way of giving images to the kernel.
type Mode string

// FileBacked: EROFS reads devices as files, which a FUSE mount has.
const FileBacked Mode = "file-backed EROFS over FUSE"

// Probe finds out by trying whether images whose metadata lies in dir can be
// mounted: it makes a tiny EROFS file there, creates the file system without
// mounting it anywhere, and removes the file. The error is an
// *UnsupportedError with all reasons, in words, if no mode works.
//
// What FUSE needs besides (FUSE_HAS_RESEND, Linux 6.9) is older than file-backed
// mounts; opening the plane checks it when the kernel names its features.
func Probe(dir string) (Support, error) {
	s := Support{Kernel: kernelRelease()}
	var reasons []string
	if err := probeEROFS(dir); err != nil {
		reasons = append(reasons, fmt.Sprintf("%s (this is Linux %s; mounting EROFS from files needs Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE)", err, s.Kernel))
	}
	if err := probeFUSE(); err != nil {
		reasons = append(reasons, err.Error())
	}
	if len(reasons) > 0 {
		return s, &UnsupportedError{Reasons: reasons}
	}
	s.Mode = FileBacked
	return s, nil
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

func probeEROFS(dir string) error {
	f, err := os.CreateTemp(dir, ".probe-*.erofs")
	if err != nil {
		return fmt.Errorf("cannot write into the metadata directory: %w", err)
	}
	name, err := filepath.Abs(f.Name())
	defer os.Remove(f.Name())
	defer f.Close()
	if err != nil {
		return err
	}
	if _, err := erofs.Write(f, erofs.Image{Root: &erofs.Inode{Mode: unix.S_IFDIR | 0o755}}); err != nil {
		return fmt.Errorf("write an EROFS file: %w", err)
	}
	mnt, err := openEROFS(name, nil, nil)
	switch {
	case err == nil:
		return unix.Close(mnt)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("mounting is not permitted, it needs root or CAP_SYS_ADMIN: %w", err)
	case errors.Is(err, unix.ENODEV):
		return errors.New("the kernel has no EROFS")
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("the kernel has no fsopen(2): %w", err)
	}
	return fmt.Errorf("an EROFS file in %s cannot be mounted: %w%s", dir, err, stackedHint(dir))
}

// stackedHint names the commonest reason that isn't the kernel's age.
func stackedHint(dir string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.OVERLAYFS_SUPER_MAGIC {
		return ""
	}
	return "; " + strings.TrimSpace(dir) + " is on overlayfs, the node's directory must be on a real file system (in a container: a volume of the host)"
}

func probeFUSE() error {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("FUSE is not there: open /dev/fuse: %w", err)
	}
	return unix.Close(fd)
}
