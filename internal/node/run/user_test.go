package run

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// An image's FIFO would be waited for, and its device nodes are this machine's.
func TestUserFilesThatAreNone(t *testing.T) {
	for what, mode := range map[string]uint32{"a FIFO": unix.S_IFIFO | 0o644, "a directory": unix.S_IFDIR | 0o755} {
		dir := t.TempDir()
		name := filepath.Join(dir, "etc/passwd")
		if err := os.Mkdir(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if mode&unix.S_IFMT == unix.S_IFDIR {
			err = os.Mkdir(name, 0o755)
		} else {
			err = unix.Mknod(name, mode, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			_, err := findUser(dir, "web")
			done <- err
		}()
		select {
		case err := <-done:
			if err == nil {
				t.Errorf("a user was found in %s", what)
			}
		case <-time.After(time.Minute):
			t.Fatalf("%s is being opened", what)
		}
	}
}
