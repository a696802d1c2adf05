package teleport

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/operation"
	"sluice/internal/stored"
	"sluice/oci"
)

// small gives a bench a share of 8 MiB, of which so many bytes are taken, by a file
// whose path it returns.
func small(b *bench, taken int) (filler string) {
	b.t.Helper()
	if os.Geteuid() != 0 {
		b.t.Skip("needs root to mount a small file system")
	}
	b.dir = b.t.TempDir()
	if err := unix.Mount("small", b.dir, "tmpfs", 0, "size=8m"); err != nil {
		b.t.Skipf("no small file system: %v", err)
	}
	b.t.Cleanup(func() { _ = unix.Unmount(b.dir, unix.MNT_DETACH) })
	filler = filepath.Join(b.dir, "filler")
	if err := os.WriteFile(filler, make([]byte, taken), 0o600); err != nil {
		b.t.Fatal(err)
	}
	return filler
}

// saysFull reports whether an operation says that the share is full, and what to do.
func saysFull(op operation.Operation) bool {
	return strings.Contains(op.Details, "no space left") && strings.Contains(op.Details, "teleport.directory")
}

// While the share is full nothing of a disk is seen, and the operation says so; when
// there is room, the image is expanded.
func TestShareIsFull(t *testing.T) {
	for what, taken := range map[string]int{"for the tar": 6 << 20, "for the disk": 4 << 20} {
		t.Run(what, func(t *testing.T) {
			b := newBench(t, stored.Options{})
			filler := small(b, taken)
			timing := hurry()
			timing.Pause = time.Second // so that it isn't given up within half a minute
			s, err := newService(b.reg, b.db, Options{Directory: b.dir}, timing)
			if err != nil {
				t.Fatal(err)
			}
			desc := pushTwo(b, s)
			start(t, s)
			waitFor(t, "a full share", func() bool {
				op, err := s.Latest(t.Context(), repo, desc.Digest)
				return err == nil && op.Status == operation.StatusRunning && saysFull(op)
			})
			if state, err := s.Find(t.Context(), repo, "v1", amd64); err != nil || state.Status != Expanding || state.Disks != nil {
				t.Errorf("%+v, %v", state, err)
			}
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
			for _, d := range b.ready(s, repo, "v1") {
				b.check(repo, d)
			}
		})
	}
}

func pushTwo(b *bench, s *Service) oci.Descriptor {
	b.t.Helper()
	b.enable(s, repo)
	return b.push(repo, "v1", "amd64", layerTar("small", "small"), layerTar("big", noise(1, 3<<20)))
}

// A share that stays full fails the expansion, which leaves nothing; later, whoever
// asks for the image has it tried again.
func TestShareStaysFull(t *testing.T) {
	b := newBench(t, stored.Options{})
	filler := small(b, 6<<20)
	s := b.service(Options{})
	pushTwo(b, s)
	start(t, s)
	state := b.state(s, repo, "v1")
	if state.Status != Failed || state.Operation.ErrorCode != operation.CodeUnknown || !saysFull(state.Operation) {
		t.Errorf("%+v", state)
	}
	waitFor(t, "the disk that was made", func() bool { return b.files("") == 1 })
	for age, want := range map[time.Duration]bool{0: false, 11 * time.Minute: true} {
		op := state.Operation
		op.Updated = op.Updated.Add(-age)
		if got := passed(op); got != want {
			t.Errorf("after %v it is tried again: %v", age, got)
		}
		op.ErrorCode = ErrTooLarge.Code
		if passed(op) {
			t.Error("what is too large is tried again")
		}
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(t.Context(), repo, "v1"); err != nil {
		t.Fatal(err)
	}
	b.ready(s, repo, "v1")
}

// Something is left for those who keep the file server's passwords there.
func TestReserve(t *testing.T) {
	b := newBench(t, stored.Options{})
	filler := small(b, 1<<20)
	s := share{b.dir}
	for n, full := range map[int64]bool{0: false, 6 << 20: false, 7<<20 - 1<<18: true, 1 << 40: true} {
		if err := s.room(n); errors.Is(err, unix.ENOSPC) != full {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if err := s.copyFile(filler, filler+"2"); err != nil {
		t.Error(err)
	}
	if err := os.Truncate(filler, 1<<30); err != nil { // it takes no space
		t.Fatal(err)
	}
	if err := s.copyFile(filler, filler+"3"); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("more than there is room for: %v", err)
	}
	if err := (share{filepath.Join(b.dir, "none")}).room(0); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of a directory that isn't there: %v", err)
	}
}

// That there is no room says where to make some.
func TestSpaceIsNamed(t *testing.T) {
	s := &Service{share: share{"/srv/disks"}}
	for err, want := range map[error]bool{unix.ENOSPC: true, unix.EDQUOT: true, unix.EIO: false} {
		if got := strings.Contains(fmt.Sprint(s.explain(&os.PathError{Op: "write", Path: "x", Err: err})), "/srv/disks"); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
}
