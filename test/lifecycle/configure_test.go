package lifecycle

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"sluice/internal/node/install"
	"sluice/test/bed"
)

// shapes are main files of containerd as machines have them; DEFAULT is what
// containerd itself generates.
var shapes = map[string]string{
	"none":      "",
	"generated": "DEFAULT",
	"version 2": "version = 2\nroot = '/var/lib/containerd' # ours\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"pause:9\"\n",
	"version 2, migrated sections": `version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"
  disable_snapshot_annotations = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"
`,
	"version 3, mirrors": `version = 3
imports = ["/etc/containerd/conf.d/*.toml"]
[plugins.'io.containerd.cri.v1.images'.registry.mirrors."docker.io"]
  endpoint = ["https://mirror.local"]
`,
	"version 3, relative glob": "version = 3\nimports = [\n  'extra.d/*.toml', # more\n]\n[plugins.'io.containerd.cri.v1.images']\n  discard_unpacked_layers = true\n",
	"version 3, stargz": `version = 3
[proxy_plugins.stargz]
  type = "snapshot"
  address = "/run/stargz.sock"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "stargz"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux"
  snapshotter = "stargz"
`,
}

// TestConfiguresEveryContainerd has each version of containerd read what sluice
// node install makes of each shape of its configuration.
func TestConfiguresEveryContainerd(t *testing.T) {
	s := theStage(t)
	versions, err := bed.BuildOlderAndNewer(t.Context(), s.Tools, s.Src, func(s string) { t.Log(s) })
	must(t, err)
	versions["2.3"] = s.Tools
	for _, v := range slices.Sorted(maps.Keys(versions)) {
		root := t.TempDir()
		for _, dir := range []string{"etc/containerd", "usr/bin", "run", "tmp", "dev"} {
			must(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
		}
		must(t, exec.Command("cp", "--reflink=auto", versions[v].Containerd(), filepath.Join(root, "usr/bin/containerd")).Run())
		for _, name := range slices.Sorted(maps.Keys(shapes)) {
			t.Run(v+"/"+name, func(t *testing.T) { s.configures(t, root, shapes[name]) })
		}
	}
}

// dumped is what containerd makes of its configuration.
func dumped(t *testing.T, root string, args ...string) string {
	t.Helper()
	cmd := exec.Command("/usr/bin/containerd", args...)
	cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Chroot: root}
	out, err := cmd.Output()
	must(t, err)
	return string(out)
}

func (s *stage) configures(t *testing.T, root, text string) {
	main := filepath.Join(root, "etc/containerd/config.toml")
	if text == "DEFAULT" {
		text = dumped(t, root, "config", "default")
	}
	if text != "" {
		must(t, os.WriteFile(main, []byte(text), 0o644))
	}
	before := dumped(t, root, "config", "dump")
	o := install.Options{
		Root: root, Program: s.Sluice, BinDir: "/usr/local/bin", State: "/var/lib/sluice", Sockets: "/run/sluice", Init: install.Systemd,
		ContainerdConfig: "/etc/containerd/config.toml", ContainerdUnit: "containerd.service",
		ReplaceSnapshotter: strings.Contains(text, "stargz"),
	}
	p, err := install.MakePlan(t.Context(), o)
	must(t, err)
	a, err := p.Begin()
	must(t, err)
	must(t, a.Do(install.StepDaemon))
	must(t, a.Do(install.StepContainerd, install.StepKubelet, ""))
	after := dumped(t, root, "config", "dump")
	for _, want := range []string{
		"\n    snapshotter = 'sluice'\n", "[proxy_plugins.sluice]", "address = '/run/sluice/snapshotter.sock'",
		"\n      snapshotter = 'sluice'\n", "enable_remote_snapshot_annotations = 'true'",
	} {
		if !strings.Contains(after, want) {
			t.Errorf("containerd's configuration lacks %q:\n%s", want, after)
		}
	}
	other := bed.Overlayfs
	if o.ReplaceSnapshotter {
		other = bed.Stargz
	}
	if !strings.Contains(after, "\n      snapshotter = '"+other+"'\n") {
		t.Errorf("containerd can't unpack for %s any more:\n%s", other, after)
	}
	local := strings.Contains(text, "mirrors") && !strings.Contains(text, "mirrors = {}") || strings.Contains(text, "discard_unpacked_layers = true")
	if strings.Contains(after, "disable_snapshot_annotations = false") != local {
		t.Errorf("pulls by itself: %v, and containerd's configuration is\n%s", local, after)
	}
	for _, r := range p.Restart {
		must(t, install.Restarted(root, r))
	}
	again, err := install.MakePlan(t.Context(), o)
	must(t, err)
	if !again.Empty() {
		t.Errorf("the second time: %+v", again)
	}
	removal, err := install.MakeRemoval(root)
	must(t, err)
	must(t, removal.Remove())
	must(t, install.Forget(root))
	if now := dumped(t, root, "config", "dump"); now != before {
		t.Errorf("after the removal containerd's configuration is\n%s", now)
	}
	now, err := os.ReadFile(main)
	if text == "" && err == nil || text != "" && string(now) != text {
		t.Errorf("after the removal the main file is %q, %v", now, err)
	}
	os.Remove(main)
}
