package teleport

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice/internal/operation"
	"sluice/internal/stored"
)

// While the share is full nothing of a disk is seen, and the operation says so; when
// there is room, the image is expanded.
func TestShareIsFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	b := newBench(t, stored.Options{})
	b.dir = t.TempDir()
	if err := unix.Mount("small", b.dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Skipf("no small file system: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(b.dir, unix.MNT_DETACH) })
	s := b.service(Options{})
	b.enable(s, repo)
	filler := filepath.Join(b.dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 6<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	desc := b.push(repo, "v1", "amd64", layerTar("small", "small"), layerTar("big", noise(1, 3<<20)))
	start(t, s)
	waitFor(t, "a full share", func() bool {
		op, err := s.ops.Latest(t.Context(), repo, desc.Digest)
		return err == nil && op.Status == operation.StatusRunning && strings.Contains(op.Details, "no space left")
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
}
