package bed

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// A container whose `ctr run` was broken off ends with its node.
func TestStopEndsContainers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a node needs root")
	}
	dir, err := Dir()
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, debianKey, "1")
	if _, err := os.Stat(image); err != nil {
		t.Skip("make demo hasn't made the Debian image yet")
	}
	ctx := t.Context()
	src, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	tools, err := BuildTools(ctx, src, func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	sluice, err := BuildSluice(ctx, src, work)
	if err != nil {
		t.Fatal(err)
	}
	reg, err := StartRegistry(ctx, sluice, work)
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Stop()
	if err := reg.Push(ctx, tools, image, "debian:1"); err != nil {
		t.Fatal(err)
	}
	n, err := StartNode(ctx, tools, sluice, filepath.Join(work, "node"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Stop() })
	ref := reg.Addr + "/debian:1"
	if err := n.Pull(ctx, Overlayfs, ref); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends when the container runs, or with the test
		for ctx.Err() == nil && n.ctr(ctx, "tasks", "exec", "--exec-id", "probe", "test-stop", "true").Run() != nil {
			time.Sleep(100 * time.Millisecond)
		}
		cancel()
	}()
	if _, err := n.Run(short, Overlayfs, ref, "test-stop", "sleep", "300"); err == nil {
		t.Fatal("the run wasn't broken off")
	}
	if err := n.Stop(); err != nil {
		t.Error(err)
	}
	// A shim answers that it ends, and then does.
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		out, err := exec.Command("pgrep", "-f", "shim-runc-v2.*"+n.containerdSocket()).Output()
		if err != nil {
			break // there is none
		}
		if time.Now().After(end) {
			t.Fatalf("shims that are left: %s", out)
		}
	}
}
