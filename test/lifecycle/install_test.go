package lifecycle

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// filesBelow returns the files of the machine below directories, with content.
func (m *machine) filesBelow(dirs ...string) map[string]string {
	m.t.Helper()
	all := map[string]string{}
	for _, dir := range dirs {
		err := filepath.WalkDir(m.path(dir), func(name string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				var b []byte
				b, err = os.ReadFile(name)
				all[strings.TrimPrefix(name, m.path("/"))] = string(b)
			}
			return err
		})
		must(m.t, err)
	}
	return all
}

// criSnapshotter is where containerd makes new pods.
func (m *machine) criSnapshotter() string {
	m.t.Helper()
	fsInfo, err := m.images.ImageFsInfo(m.t.Context(), &runtimeapi.ImageFsInfoRequest{})
	must(m.t, err)
	return fsInfo.ImageFilesystems[0].GetFsId().GetMountpoint()
}

// TestInstalledByPod has pods of a machine without systemd install sluice, update
// it and remove it, as the DaemonSets of deploy/ do. The last of them run from
// images that stream by the daemon which they replace and remove.
func TestInstalledByPod(t *testing.T) {
	s := theStage(t)
	for name, more := range map[string]string{"sluice:1": "", "sluice:2": "another version"} {
		layout, err := programImage(filepath.Join(t.TempDir(), "image"), s.Sluice, more)
		must(t, err)
		must(t, s.Push(t.Context(), layout, name))
		must(t, s.Convert(t.Context(), s.Ref(name)))
	}
	m := s.newMachine(t)
	before := m.filesBelow("/etc/containerd", "/usr/local/bin")
	install := []string{
		"/sluice", "node", "install", "--host=/host", "--supervise", "--containerd-binary", filepath.Join(m.dir, "bin/containerd"),
		"--restart-command", "kill $(pidof containerd)", "--from", s.Registry.Addr, "--registry", s.Registry.Addr, "--", "--recheck", "1s",
	}
	m.takesBack()
	m.pull("plain:1")
	m.pull("sluice:1")
	first := m.run("sluice:1", true, install...)
	first.prints("the node daemon runs")
	m.containerdAnswers()
	daemon, err := m.status()
	must(t, err)
	if got := m.criSnapshotter(); got != "/var/lib/sluice" {
		t.Errorf("pods are made in %s", got)
	}
	m.pull("plain:1")
	m.pull("app:1")
	app := m.run("app:1", false, "/bin/sh", "-c", "sha256sum /data/0; echo first; while ! test -e /go; do sleep 0.1; done; sha256sum /data/*; echo all; sleep 1000000")
	app.prints("first")

	first.remove()
	if now, err := m.status(); err != nil || now.Daemon.PID != daemon.Daemon.PID {
		t.Errorf("when its pod was deleted the daemon became %v, %v; was %d", now.Daemon.PID, err, daemon.Daemon.PID)
	}
	m.pull("sluice:1")
	same := m.run("sluice:1", true, install...)
	same.prints("Nothing to do.")
	same.prints("the node daemon runs")
	same.remove()

	m.pull("sluice:2")
	second := m.run("sluice:2", true, install...)
	second.prints("the node daemon runs")
	updated, err := m.status()
	must(t, err)
	if updated.Daemon.PID == daemon.Daemon.PID || !updated.Daemon.Resumed {
		t.Errorf("after the update the daemon is %+v", updated.Daemon)
	}
	if out, err := m.command("kill", "-9", strconv.Itoa(updated.Daemon.PID)); err != nil {
		t.Fatalf("kill the daemon: %v: %s", err, out)
	}
	eventually(t, patience, "the killed daemon is started again", func() bool {
		now, err := m.status()
		return err == nil && now.Daemon.PID != updated.Daemon.PID
	})
	_, err = m.pods.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: app.container, Cmd: []string{"/bin/touch", "/go"}, Timeout: 60})
	must(t, err)
	app.prints("all")
	for file, sum := range s.app.Sums {
		if !strings.Contains(app.printed(), sum+"  "+file) {
			t.Errorf("%s isn't what it was", file)
		}
	}
	second.remove()
	m.uninstalls(app)
	if after := m.filesBelow("/etc/containerd", "/usr/local/bin"); !maps.Equal(after, before) {
		t.Errorf("left over: %q", slices.Sorted(maps.Keys(after)))
	}
}

// takesBack has containerd not start with the new configuration.
func (m *machine) takesBack() {
	m.t.Helper()
	before := m.filesBelow("/etc/containerd")
	out, err := m.command(m.Sluice, "node", "install", "--supervise", "--containerd-binary", filepath.Join(m.dir, "bin/containerd"),
		"--restart-command", "test ! -e /etc/containerd/conf.d/sluice.toml && kill $(pidof containerd)")
	if err == nil || !strings.Contains(out, "its old configuration is back") {
		m.t.Errorf("containerd that doesn't start: %v, %s", err, out)
	}
	if after := m.filesBelow("/etc/containerd"); !maps.Equal(after, before) {
		m.t.Errorf("it has now %q", after)
	}
	m.containerdAnswers()
}

// uninstalls has a pod uninstall sluice while app runs, which it waits for.
func (m *machine) uninstalls(app pod) {
	t := m.t
	m.pull("sluice:1")
	refused := m.run("sluice:1", true, "/sluice", "node", "uninstall", "--host=/host")
	if code := refused.exits(); code != 1 || !strings.Contains(refused.printed(), app.container) {
		t.Errorf("with a container exit code %d, %s", code, refused.printed())
	}
	if _, err := m.status(); err != nil {
		t.Errorf("the refused uninstall: %v", err)
	}
	refused.remove()
	last := m.run("sluice:1", true, "/sluice", "node", "uninstall", "--host=/host", "--wait=2m", "--restart-command", "kill $(pidof containerd)")
	last.prints("waiting for")
	m.containerdAnswers()
	if got := m.criSnapshotter(); strings.Contains(got, "sluice") {
		t.Errorf("while uninstall waits pods are made in %s", got)
	}
	m.pull("plain:1")
	m.pull("app:1")
	plain := m.run("app:1", false, checkSums()...)
	if code := plain.exits(); code != 0 || !strings.Contains(plain.printed(), "/data/0") {
		t.Errorf("a new container meanwhile: exit code %d, %s", code, plain.printed())
	}
	app.remove()
	code := last.exits()
	t.Logf("the uninstalling pod printed\n%s", last.printed())
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, last.printed())
	}
	m.containerdAnswers()
	last.remove()
	plain.remove()
	m.pull("app:1")
	again := m.run("app:1", false, checkSums()...)
	if code := again.exits(); code != 0 {
		t.Errorf("by plain containerd: exit code %d, %s", code, again.printed())
	}
	again.remove()
	for _, dir := range []string{"/var/lib/sluice", "/run/sluice", "/etc/sluice"} {
		if _, err := os.Stat(m.path(dir)); err == nil {
			t.Errorf("%s is still there", dir)
		}
	}
	if mounts, err := m.command("grep", "-c", "sluice/", "/proc/self/mountinfo"); strings.TrimSpace(mounts) != "0" {
		t.Errorf("still mounted: %s, %v", mounts, err)
	}
}
