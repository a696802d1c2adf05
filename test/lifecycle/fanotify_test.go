package lifecycle

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
	_, err := n.Ctr(t.Context(), "run", "--detach", "--net-host", "--snapshotter", bed.Sluice, s.Ref("app:1"), "waiter",
		"/bin/sh", "-c", "while ! test -e /go; do sleep 0.1; done; sha256sum /data/* >/sums; sync; sleep 1000000")
	must(t, err)
	n.Sluice.Kill()
	began := make(chan error, 1)
	go func() { // touch is read from the image, too
		_, err := n.Ctr(t.Context(), "tasks", "exec", "--exec-id", "go", "waiter", "/bin/touch", "/go")
		began <- err
	}()
	must(t, n.StartSluice(t.Context()))
	n.Sluice.Kill()
	must(t, n.StartSluice(t.Context()))
	must(t, <-began)
	sums := filepath.Join(n.Dir, "sluice", "snapshots", "*", "fs", "sums")
	eventually(t, 20*time.Second, "the container reads what its files are", func() bool {
		all, _ := filepath.Glob(sums)
		if len(all) != 1 {
			return false
		}
		got, err := os.ReadFile(all[0])
		return err == nil && string(got) == sumsOf(s.app)
	})

	// A plane stays as long as it has images.
	n.Sluice.Stop()
	n.Reconfigure()
	must(t, n.StartSluice(t.Context()))
	if p := status(t, n).Daemon.Plane; p.Name != "fanotify" || !strings.Contains(strings.Join(p.Reasons, "; "), "has to wait") {
		t.Errorf("with images mounted the status says %+v", p)
	}
	_, err = n.Ctr(t.Context(), "tasks", "rm", "--force", "waiter")
	must(t, err)
	_, err = n.Ctr(t.Context(), "containers", "rm", "waiter")
	must(t, err)
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
