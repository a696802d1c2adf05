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
	// Reasons why the modes that were tried before it don't, in words.
	Reasons []string
}

// Mode is how EROFS gets at files.
type Mode string

const (
	// FileBacked: EROFS reads files itself (Linux 6.12).
	FileBacked Mode = "file-backed"
	// Loop: EROFS reads loop devices, which read files (Linux 6.4, since
	// when its blocks may be smaller than a page).
	Loop Mode = "loop"
)

// Modes are all modes, the best first.
func Modes() []Mode { return []Mode{FileBacked, Loop} }

// Probe finds out by trying in which of the modes, the first that works,
// images whose metadata lies in dir can be mounted: it makes a tiny EROFS file
// there, creates the file system without mounting it anywhere, and removes the
// file. The error is an *UnsupportedError with all reasons, in words, if none
// works, and ErrNotProbed when dir can't be written to.
func Probe(dir string, modes ...Mode) (Support, error) {
	s := Support{Kernel: kernelRelease()}
	name, err := probeFile(dir)
	if err != nil {
		return s, fmt.Errorf("%w: %w", ErrNotProbed, err)
	}
	defer os.Remove(name)
	for _, m := range modes {
		if err := probe(m, name); err != nil {
			s.Reasons = append(s.Reasons, fmt.Sprintf("%s (this is Linux %s)", err, s.Kernel))
			continue
		}
		s.Mode = m
		break
	}
	var lacking []string
	if s.Mode == "" {
		lacking = s.Reasons
	}
	if err := probeFUSE(); err != nil {
		lacking = append(lacking, err.Error())
	}
	if len(lacking) > 0 {
		s.Mode = ""
		return s, &UnsupportedError{Reasons: lacking}
	}
	return s, nil
}

// ErrNotProbed: nothing was found out.
var ErrNotProbed = errors.New("cannot try to mount an EROFS file")

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// probeFile writes an empty EROFS into dir.
func probeFile(dir string) (string, error) {
	f, err := os.CreateTemp(dir, ".probe-*.erofs")
	if err != nil {
		return "", err
	}
	name, err := filepath.Abs(f.Name())
	if err == nil {
		_, err = erofs.Write(f, erofs.Image{Root: &erofs.Inode{Mode: unix.S_IFDIR | 0o755}})
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return "", errors.Join(fmt.Errorf("write an EROFS file: %w", err), os.Remove(f.Name()))
	}
	return name, nil
}

// probe tells why the EROFS file name can't be mounted in mode m.
func probe(m Mode, name string) error {
	var mnt int
	var err error
	if m == Loop {
		mnt, err = openEROFSLoop(name, nil)
	} else {
		mnt, err = openEROFS(name, nil, nil)
	}
	switch {
	case err == nil:
		return unix.Close(mnt)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("mounting is not permitted, it needs root or CAP_SYS_ADMIN: %w", err)
	case errors.Is(err, unix.ENODEV):
		return errors.New("the kernel has no EROFS")
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("the kernel has no fsopen(2): %w", err)
	case m == Loop:
		return fmt.Errorf("EROFS can't be mounted from loop devices, which needs Linux 6.4 and CONFIG_BLK_DEV_LOOP: %w", err)
	}
	dir := filepath.Dir(name)
	return fmt.Errorf("EROFS can't be mounted from files in %s, which needs Linux 6.12 and CONFIG_EROFS_FS_BACKED_BY_FILE: %w%s", dir, err, stackedHint(dir))
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
