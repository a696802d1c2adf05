package plane

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// MountOverlay mounts an overlayfs on dir that shows lower and can be written
// to. What is written goes to the directories upper and work in scratch, which
// is on a file system that overlayfs can write to, and private: files in upper
// can have any owner and mode. They are made if they are missing; with those of
// an earlier mount its changes are there again.
func MountOverlay(lower, scratch, dir string) error {
	for _, path := range []string{lower, scratch} {
		if strings.ContainsAny(path, `:,\`) {
			return fmt.Errorf("mount overlayfs on %s: %q has characters that overlayfs gives a meaning: use another directory", dir, path)
		}
	}
	upper, work := filepath.Join(scratch, "upper"), filepath.Join(scratch, "work")
	if err := makeUpper(lower, upper); err != nil {
		return err
	}
	if err := os.Mkdir(work, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	options := "lowerdir=" + lower + ",upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("overlay", dir, "overlay", 0, options); err != nil {
		return fmt.Errorf("mount overlayfs on %s with %s: %w", dir, options, err)
	}
	return nil
}

// makeUpper makes the upper directory, whose owner and mode are those of the
// root that the mount shows: that of lower.
func makeUpper(lower, upper string) error {
	fi, err := os.Stat(lower)
	if err != nil {
		return err
	}
	if err := os.Mkdir(upper, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil
		}
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("owner of %s is unknown", lower)
	}
	return errors.Join(os.Chown(upper, int(st.Uid), int(st.Gid)), os.Chmod(upper, fi.Mode()))
}
