package lifecycle

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sluice/test/bed"
)

// TestFanotify kills the daemon of a node with --plane=fanotify while a
// container reads, and takes the node back to FUSE.
func TestFanotify(t *testing.T) {
	s := theStage(t)
	n := s.newNode(t, s.Tools, "--plane", "fanotify")
	start(t, n)
	if p := status(t, n).Daemon.Plane; p.Name != "fanotify" {
		t.Skip("this machine can't: ", p.Reasons)
	}
	must(t, n.Pull(t.Context(), bed.Sluice, s.Ref("app:1")))
	streams(t, n, s.Ref("app:1"))
	s.startWaiter(t, n)
	n.Sluice.Kill()
	began := make(chan error, 1)
	go func() { began <- letWaiterRead(t.Context(), n) }() // touch is read from the image, too
	must(t, n.StartSluice(t.Context()))
	n.Sluice.Kill()
	must(t, n.StartSluice(t.Context()))
	must(t, <-began)
	s.waiterReads(t, n)

	// A plane stays as long as it has images.
	n.Sluice.Stop()
	n.Reconfigure()
	must(t, n.StartSluice(t.Context()))
	if p := status(t, n).Daemon.Plane; p.Name != "fanotify" || !strings.Contains(strings.Join(p.Reasons, "; "), "has to wait") {
		t.Errorf("with images mounted the status says %+v", p)
	}
	removeWaiter(t, n)
	must(t, n.PowerOff(t.Context()))
	start(t, n)
	if p := status(t, n).Daemon.Plane; p.Name != "fuse" {
		t.Errorf("without images the status says %+v", p)
	}
	s.runs(t, n, bed.Sluice, "app:1", s.app)
	if left, err := os.ReadDir(filepath.Join(n.Dir, "sluice", "fanotify")); len(left) > 0 || err != nil {
		t.Errorf("files of fanotify are left: %v, %v", left, err)
	}
}
