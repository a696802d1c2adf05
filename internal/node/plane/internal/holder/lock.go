package holder

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lockWait is how long a process that was killed may take to end: the kernel
// closes its descriptors one by one.
const lockWait = 2 * time.Second

// Lock takes an exclusive lock on a file, which it makes if it is missing. The
// lock ends with the file's close or the process.
func Lock(name string) (*os.File, error) {
	for deadline := time.Now().Add(lockWait); ; time.Sleep(time.Millisecond) {
		f, err := TryLock(name)
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			return f, err
		}
	}
}

// TryLock is Lock that doesn't wait.
func TryLock(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s is locked by another process: %w", filepath.Base(name), err)
	}
	return f, nil
}
