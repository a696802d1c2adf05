package lifecycle

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/test/bed"
)

// TestStartOrder starts containerd without its snapshotter, and the snapshotter
// without its registry.
func TestStartOrder(t *testing.T) {
	s := theStage(t)
	n := s.newNode(t, s.Tools)
	must(t, n.StartContainerd(t.Context()))
	must(t, n.Pull(t.Context(), bed.Overlayfs, s.Ref("plain:1")))
	if err := n.Pull(t.Context(), bed.Sluice, s.Ref("app:1")); err == nil {
		t.Error("a pull went well without the snapshotter")
	}

	s.Registry.Stop()
	must(t, n.StartSluice(t.Context()))
	must(t, s.Registry.Restart(t.Context()))

	// containerd tries to connect again every three seconds at least.
	eventually(t, patience, "containerd pulls once the snapshotter is there", func() bool {
		return n.Pull(t.Context(), bed.Sluice, s.Ref("app:1")) == nil
	})
	streams(t, n, s.Ref("app:1"))
	s.runs(t, n, bed.Sluice, "app:1", s.app)
}

// runs runs an image and compares what it is made of.
func (s *stage) runs(t *testing.T, n *bed.Node, snapshotter, name string, box bed.Toolbox) {
	t.Helper()
	r, err := n.Run(t.Context(), snapshotter, s.Ref(name), "c"+strings.ReplaceAll(time.Now().Format("150405.000000"), ".", "-"), checkSums()...)
	must(t, err)
	if r.Output != sumsOf(box) {
		t.Errorf("%s by %s: %s", name, snapshotter, r.Output)
	}
}

// TestReboot loses everything but the disk, and the registry too.
func TestReboot(t *testing.T) {
	s := theStage(t)
	reg, err := bed.StartRegistry(t.Context(), s.Sluice, t.TempDir())
	must(t, err)
	t.Cleanup(reg.Stop)
	ref := s.push(t, reg, s.app, "app:1")
	s.convert(t, ref)
	n := s.newNode(t, s.Tools)
	start(t, n)
	must(t, n.Pull(t.Context(), bed.Sluice, ref))
	must(t, n.Pull(t.Context(), bed.Sluice, s.Ref("plain:1")))
	_, err = n.Ctr(t.Context(), "run", "--detach", "--net-host", "--snapshotter", bed.Sluice, ref, "survivor",
		"/bin/sh", "-c", "if test -e /kept; then cat /kept; sha256sum /data/*; else echo mine >/kept; sync; sleep 1000000; fi")
	must(t, err)
	upper := filepath.Join(n.Dir, "sluice", "snapshots", "*", "fs", "kept")
	eventually(t, patience, "the container wrote its file", func() bool {
		all, _ := filepath.Glob(upper)
		return len(all) == 1
	})
	eventually(t, patience, "all content has arrived", func() bool {
		i := status(t, n).Images
		return len(i) == 1 && i[0].Complete
	})

	must(t, n.PowerOff(t.Context()))
	reg.Stop()
	must(t, n.StartContainerd(t.Context()))
	must(t, n.StartSluice(t.Context()))
	var got string
	eventually(t, patience, "the container starts again", func() bool {
		got, err = n.Restart(t.Context(), "survivor")
		return err == nil
	})
	if want := "mine\n" + sumsOf(s.app); got != want {
		t.Errorf("after the reboot the container has %s, want %s", got, want)
	}
	s.runs(t, n, bed.Sluice, "plain:1", s.plain)
}

// TestUserNamespaces runs a pod whose root is nobody on this machine.
func TestUserNamespaces(t *testing.T) {
	s := theStage(t)
	n := s.newNode(t, s.Tools, "--remap-ids")
	must(t, n.EnableCRI(bed.CRI{RemapIDs: true, Sandbox: s.Ref("plain:1")}, s.Registry.Addr))
	start(t, n)
	k, err := n.Kubelet("")
	must(t, err)
	defer k.Close()
	must(t, k.Pull(t.Context(), s.Ref("app:1"), nil))
	pod, err := k.RunPod(t.Context(), s.Ref("app:1"), true, "/bin/sh", "-c",
		`echo $(cat /proc/self/uid_map); stat -c '%u %g' /data/0 /bin/busybox; echo new >/data/new && stat -c %u /data/new; sha256sum /data/0 /data/1 /data/2`)
	must(t, err)
	want := "0 100000 65536\n0 0\n0 0\n0\n" + sumsOf(s.app)
	eventually(t, patience, "root in the container has the image's files, and nobody's outside", func() bool {
		return podPrinted(pod, want)
	})
	streams(t, n, s.Ref("app:1"))
	must(t, k.RemovePod(t.Context(), pod))
}

// TestUninstall follows docs/containerd.md to the end, by detours: a container is
// in the way, the daemon is dead, the first attempts are killed.
func TestUninstall(t *testing.T) {
	s := theStage(t)
	n := s.newNode(t, s.Tools)
	start(t, n)
	must(t, n.Pull(t.Context(), bed.Sluice, s.Ref("app:1")))
	s.runs(t, n, bed.Sluice, "app:1", s.app)
	_, err := n.Ctr(t.Context(), "run", "--detach", "--net-host", "--snapshotter", bed.Sluice, s.Ref("app:1"), "holdout", "/bin/sh", "-c", "sleep 1000000")
	must(t, err)
	uninstall := []string{"node", "uninstall", "--containerd", n.ContainerdSocket()}
	out, err := n.Command(t.Context(), uninstall...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "default/holdout") {
		t.Errorf("uninstall with a container: %v\n%s", err, out)
	}
	streams(t, n, s.Ref("app:1")) // nothing has changed

	n.Sluice.Kill()
	for after := range 5 { // broken off ever later
		attempt := n.Command(t.Context(), append(uninstall, "--force")...)
		must(t, attempt.Start())
		time.Sleep(time.Duration(after+1) * 40 * time.Millisecond)
		_ = attempt.Process.Kill() // it may have ended
		_ = attempt.Wait()
	}
	out, err = n.Command(t.Context(), append(uninstall, "--force")...).CombinedOutput()
	if err != nil {
		t.Fatalf("uninstall: %v\n%s", err, out)
	}
	t.Logf("%s", out)
	mounts, err := bed.Mounts(n.Dir)
	must(t, err)
	for _, m := range mounts {
		if strings.Contains(m, "sluice") || strings.Contains(m, "/run/") {
			t.Errorf("%s is still mounted", m)
		}
	}
	for _, dir := range []string{"sluice", "run"} {
		if _, err := os.Stat(filepath.Join(n.Dir, dir)); err == nil {
			t.Errorf("directory %s is still there", dir)
		}
	}
	// The image is pulled anew, the ordinary way.
	must(t, n.Pull(t.Context(), bed.Overlayfs, s.Ref("app:1")))
	s.runs(t, n, bed.Overlayfs, "app:1", s.app)
}
