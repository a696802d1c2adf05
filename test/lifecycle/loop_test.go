package lifecycle

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sluice/test/bed"
)

// TestLoopDevices runs a node as on a kernel that can't mount EROFS from files,
// and kills its daemon while a container runs.
func TestLoopDevices(t *testing.T) {
	s := theStage(t)
	n := s.newNode(t, s.Tools, "--plane", "fuse-loop")
	start(t, n)
	if p := status(t, n).Daemon.Plane; p.Name != "fuse-loop" || len(p.Reasons) == 0 {
		t.Errorf("the status says %+v", p)
	}
	must(t, n.Pull(t.Context(), bed.Sluice, s.Ref("app:1")))
	streams(t, n, s.Ref("app:1"))
	if len(boundLoops(t, n.Dir)) == 0 {
		t.Error("no loop device reads the image")
	}
	s.startWaiter(t, n)
	n.Sluice.Kill()
	must(t, n.StartSluice(t.Context()))
	must(t, letWaiterRead(t.Context(), n))
	s.waiterReads(t, n)
	// With all content here the next mount reads complete layers' files, by
	// loop devices too.
	eventually(t, patience, "all content has arrived", func() bool {
		i := status(t, n).Images
		return len(i) == 1 && i[0].Complete
	})
	removeWaiter(t, n)
	must(t, n.PowerOff(t.Context()))
	// A namespace that another test makes has a copy of the mount for a moment.
	eventually(t, patience, "no loop device is without a mount", func() bool { return len(boundLoops(t, n.Dir)) == 0 })
	start(t, n)
	s.runs(t, n, bed.Sluice, "app:1", s.app)
	bound := boundLoops(t, n.Dir)
	if !strings.Contains(strings.Join(bound, ""), filepath.Join(n.Dir, "sluice", "cache")) {
		t.Errorf("no loop device reads a complete layer's file: %q", bound)
	}
}

// boundLoops are the files below dir that loop devices read.
func boundLoops(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	must(t, err)
	var bound []string
	for _, name := range names {
		if file, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(file), dir) { // else it was just let go
			bound = append(bound, string(file))
		}
	}
	return bound
}
