package holder

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDescriptor(t *testing.T) {
	if fd, err := descriptor(nil); fd != -1 || err != nil {
		t.Errorf("got %d, %v", fd, err)
	}
	if _, err := descriptor([]byte{1, 2, 3}); err == nil {
		t.Log("a short control message is no descriptor")
	}
	a, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	b, err := unix.Dup(a)
	if err != nil {
		t.Fatal(err)
	}
	if fd, err := descriptor(unix.UnixRights(a, b)); err == nil {
		t.Errorf("two descriptors gave %d", fd)
	}
	if err := unix.Close(a); !errors.Is(err, unix.EBADF) {
		t.Errorf("the first was not closed: %v", err)
	}
	if err := unix.Close(b); !errors.Is(err, unix.EBADF) {
		t.Errorf("the second was not closed: %v", err)
	}
}
