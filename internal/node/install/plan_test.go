package install

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	mainFile = "/etc/containerd/config.toml"
	dropIn   = "/etc/containerd/conf.d/sluice.toml"
)

// TestInstall: on every shape of machine the plan is carried out, a second plan
// is empty, and removal gives back byte for byte what was there.
func TestInstall(t *testing.T) {
	for name, c := range map[string]struct {
		files  map[string]string
		dropIn string // where it goes, if not to the usual place
		edits  bool   // the main file
		change func(*machine, *Options)
		holds  []string // in the drop-in
	}{
		"no configuration": {edits: true, holds: []string{"version = 3\n", `snapshotter = "overlayfs"`, `snapshotter = "erofs"`}},
		"empty":            {files: map[string]string{mainFile: ""}, edits: true},
		"version 2": {
			files: map[string]string{mainFile: "# mine\nversion = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"pause:1\"\n"},
			edits: true, holds: []string{"version = 2\n", `[plugins."io.containerd.grpc.v1.cri".containerd]`},
		},
		"version 3":       {files: map[string]string{mainFile: "version = 3\nimports = [ ]\n"}, edits: true},
		"version 4":       {files: map[string]string{mainFile: "version = 4\nroot = '/x' # here\n"}, edits: true},
		"imports":         {files: map[string]string{mainFile: "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n"}},
		"relative glob":   {files: map[string]string{mainFile: "version = 3\nimports = ['extra/*.toml']\n"}, dropIn: "/etc/containerd/extra/sluice.toml"},
		"imports a file":  {files: map[string]string{mainFile: "version = 3\nimports = ['a.toml']\n", "/etc/containerd/a.toml": "version = 3\n"}, edits: true},
		"files elsewhere": {files: map[string]string{mainFile: "version = 3\n", "/etc/containerd/conf.d/old.toml": "root = '/wrong'\n"}, edits: true},
		"local pull": {
			files: map[string]string{mainFile: "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  discard_unpacked_layers = true\n"},
			edits: true, holds: []string{"disable_snapshot_annotations = false"},
		},
		"more to unpack for": {
			files: map[string]string{mainFile: "version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux/arm64'\n  snapshotter = 'native'\n  layer_types = ['a/b']\n"},
			edits: true, holds: []string{"platform = \"linux/arm64\"\n  snapshotter = \"native\"\n  layer_types = [\"a/b\"]\n"},
		},
		"a symbolic link": {
			files: map[string]string{"/usr/share/containerd.toml": "version = 3\n"}, edits: true,
			change: func(m *machine, _ *Options) {
				m.must(os.Symlink("/usr/share/containerd.toml", filepath.Join(m.root, mainFile)))
			},
		},
		"another snapshotter": {
			files:  map[string]string{mainFile: "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'stargz'\n"},
			change: func(_ *machine, o *Options) { o.ReplaceSnapshotter = true }, edits: true,
		},
		"registries": {
			files: map[string]string{mainFile: "version = 3\n"}, edits: true, holds: []string{`config_path = "/etc/containerd/certs.d"`},
			change: func(_ *machine, o *Options) {
				o.Registries = []Registry{{"r.example:5000", "http://r.example:5000"}, {"docker.io", "https://m.local"}}
			},
		},
		"kubelet": {
			files: map[string]string{mainFile: "version = 3\n"}, edits: true,
			change: func(_ *machine, o *Options) { o.Kubelet, o.KubeletConfigDir = true, "/etc/kubernetes/kubelet.conf.d" },
		},
		"an older sluice":      {files: map[string]string{"/usr/local/bin/sluice": "the old program"}, edits: true},
		"sluice was put there": {files: map[string]string{"/usr/local/bin/sluice": "the new program"}, edits: true},
		"no systemd":           {change: func(_ *machine, o *Options) { o.Init = NoInit }, edits: true},
		"remap IDs":            {change: func(_ *machine, o *Options) { o.Flags = []string{"--remap-ids"} }, edits: true, holds: []string{`capabilities = ["remap-ids"]`}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, c.files)
			o := m.options()
			if c.change != nil {
				c.change(m, &o)
			}
			before := m.files()
			p := m.install(o)
			if !slices.Contains(p.Restart, StepContainerd) || !slices.Contains(p.Restart, StepDaemon) {
				t.Errorf("to be started anew: %v", p.Restart)
			}
			edits := slices.ContainsFunc(p.Changes, func(c Change) bool { return c.Path == mainFile })
			if edits != c.edits {
				t.Errorf("edits the main file: %v", edits)
			}
			if c.dropIn == "" {
				c.dropIn = dropIn
			}
			text := m.read(c.dropIn)
			for _, part := range c.holds {
				if !strings.Contains(text, part) {
					t.Errorf("the drop-in lacks %q:\n%s", part, text)
				}
			}
			again, err := MakePlan(t.Context(), o)
			m.must(err)
			if !again.Empty() {
				t.Errorf("the second time: %+v", again)
			}
			m.apply(again)
			p = m.uninstall()
			if !slices.Equal(p.Restart, restartsOf(o)) {
				t.Errorf("after the removal: start %v anew", p.Restart)
			}
			m.same(before, "after the removal")
			if p = m.uninstall(); !p.Empty() {
				t.Errorf("removed the second time: %+v", p)
			}
		})
	}
}

func restartsOf(o Options) []Step {
	if o.Kubelet {
		return []Step{StepContainerd, StepKubelet}
	}
	return []Step{StepContainerd}
}

// TestRefused: what can't be is told with what to do, and nothing is changed.
func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		files  map[string]string
		change func(*machine, *Options)
		says   []string
	}{
		"too old":      {change: func(m *machine, _ *Options) { m.version = "containerd containerd.io 1.7.27 05044ec" }, says: []string{"1.7.27", "2.1", "update"}},
		"unknown":      {change: func(m *machine, _ *Options) { m.version = "containerd from git" }, says: []string{"--containerd-binary"}},
		"none":         {change: func(m *machine, _ *Options) { m.must(os.Remove(filepath.Join(m.root, "usr/bin/containerd"))) }, says: []string{"--containerd-binary"}},
		"malformed":    {files: map[string]string{mainFile: "version = 3\nroot = \n"}, says: []string{mainFile, "line 2"}},
		"stargz":       {files: map[string]string{mainFile: "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'stargz'\n"}, says: []string{"stargz-snapshotter", "--replace-snapshotter"}},
		"devmapper":    {files: map[string]string{mainFile: "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'devmapper'\n"}, says: []string{"devmapper", "--replace-snapshotter"}},
		"overridden":   {files: map[string]string{mainFile: "imports = ['conf.d/*.toml']\n", "/etc/containerd/conf.d/zz.toml": "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'overlayfs'\n"}, says: []string{"snapshotter", "imports later"}},
		"strange list": {files: map[string]string{mainFile: "\"im\\u0070orts\" = ['/a*']\n"}, says: []string{"imports = [...]"}},
		"a directory":  {change: func(m *machine, _ *Options) { m.must(os.Mkdir(filepath.Join(m.root, "usr/local/bin/sluice"), 0o755)) }, says: []string{"isn't a file"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, c.files)
			o := m.options()
			if c.change != nil {
				c.change(m, &o)
			}
			before := m.files()
			p, err := MakePlan(t.Context(), o)
			if err == nil {
				t.Fatalf("planned %+v", p.Changes)
			}
			for _, word := range c.says {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%v; lacks %q", err, word)
				}
			}
			m.same(before, "after the refusal")
		})
	}
}

// TestNotes: what works but should be known is told.
func TestNotes(t *testing.T) {
	for name, c := range map[string]struct {
		files  map[string]string
		change func(*machine, *Options)
		says   string
	}{
		"newer":      {change: func(m *machine, _ *Options) { m.version = "containerd x v2.9.0 1" }, says: "2.9.0, newer"},
		"no CRI":     {files: map[string]string{mainFile: "version = 3\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n"}, says: "CRI is disabled"},
		"foreign":    {files: map[string]string{"/etc/containerd/certs.d/r/hosts.toml": "server = 'https://other'\n"}, change: func(_ *machine, o *Options) { o.Registries = []Registry{{"r", "http://r"}} }, says: "stays as it is"},
		"no kubelet": {change: func(_ *machine, o *Options) { o.Kubelet = true }, says: "imageServiceEndpoint: unix:///run/sluice/cri.sock"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, c.files)
			o := m.options()
			if c.change != nil {
				c.change(m, &o)
			}
			before := m.files()
			p := m.install(o)
			if !strings.Contains(strings.Join(p.Notes, "\n"), c.says) {
				t.Errorf("%q lack %q", p.Notes, c.says)
			}
			m.uninstall()
			m.same(before, "after the removal")
		})
	}
}

// TestConfiguredByHand: what somebody wrote as the documentation says stays.
func TestConfiguredByHand(t *testing.T) {
	m := newMachine(t, nil)
	o := m.options()
	m.install(o)
	text := strings.Replace(m.read(dropIn), "Made by", "Once", 1)
	m.uninstall()
	m.write(mainFile, text)
	p := m.install(o)
	if slices.Contains(p.Restart, StepContainerd) || len(p.Notes) == 0 {
		t.Errorf("planned %+v", p)
	}
	m.uninstall()
	if m.read(mainFile) != text {
		t.Errorf("it's now %s", m.read(mainFile))
	}
}

// TestEditedSince: what somebody edits after the installation stays edited, and
// only what is ours goes.
func TestEditedSince(t *testing.T) {
	m := newMachine(t, map[string]string{mainFile: "version = 3\n"})
	o := m.options()
	o.Registries = []Registry{{"r", "http://r"}}
	m.install(o)
	m.write(mainFile, m.read(mainFile)+"# more\nroot = '/x'\n")
	m.write("/etc/containerd/certs.d/r/hosts.toml", "server = 'https://mine'\n")
	m.write(dropIn, m.read(dropIn)+"# mine\n")
	p := m.uninstall()
	if got := m.read(mainFile); got != "version = 3\n# more\nroot = '/x'\n" {
		t.Errorf("the main file is %q", got)
	}
	if got := m.read("/etc/containerd/certs.d/r/hosts.toml"); got != "server = 'https://mine'\n" || len(p.Notes) == 0 {
		t.Errorf("hosts.toml is %q, notes %q", got, p.Notes)
	}
	if _, err := os.Stat(filepath.Join(m.root, dropIn)); err == nil {
		t.Error("the drop-in is still there")
	}
}

// TestImportTakenOutAndEdited: an operator takes the import out and edits the
// file; installing again and uninstalling keeps that edit.
func TestImportTakenOutAndEdited(t *testing.T) {
	m := newMachine(t, map[string]string{mainFile: "version = 3\n"})
	m.install(m.options())
	m.write(mainFile, "version = 3\nroot = '/new'\n")
	m.install(m.options())
	m.uninstall()
	if got := m.read(mainFile); got != "version = 3\nroot = '/new'\n" {
		t.Errorf("it's now %q", got)
	}
}

// TestUpdate: a new program and other flags change what depends on them, and
// what isn't wanted any more goes.
func TestUpdate(t *testing.T) {
	m := newMachine(t, nil)
	before := m.files()
	o := m.options()
	o.Registries = []Registry{{"r", "http://r"}}
	m.install(o)
	m.write("/sluice", "a newer program")
	o.Registries, o.Flags = nil, []string{"--no-fill", "--log-format", "a b%"}
	p := m.install(o)
	if !strings.Contains(m.read(unitPath), `ExecStart=/usr/local/bin/sluice node --no-fill --log-format "a b%%"`+"\n") {
		t.Errorf("the unit:\n%s", m.read(unitPath))
	}
	if !slices.Contains(p.Restart, StepDaemon) {
		t.Errorf("to be started anew: %v", p.Restart)
	}
	m.uninstall()
	before[filepath.Join(m.root, "sluice")] = "-rw-r--r--a newer program"
	m.same(before, "after the removal")
}

// TestReadOnly: where a directory can't be written nothing is half done.
func TestReadOnly(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	for _, dir := range []string{"/etc/containerd", "/usr/local/bin", "/etc"} {
		t.Run(dir, func(t *testing.T) {
			m := newMachine(t, map[string]string{mainFile: "version = 3\n"})
			m.must(os.MkdirAll(filepath.Join(m.root, "etc/systemd/system"), 0o755))
			before := m.files()
			at := filepath.Join(m.root, dir)
			m.must(unix.Mount(at, at, "", unix.MS_BIND, ""))
			t.Cleanup(func() { m.must(unix.Unmount(at, unix.MNT_DETACH)) })
			m.must(unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
			p, err := MakePlan(t.Context(), m.options())
			m.must(err)
			a, err := p.Begin()
			if err == nil {
				if err = a.Do(StepDaemon); err == nil {
					err = a.Do(StepContainerd)
				}
			}
			if err == nil || !strings.Contains(err.Error(), "can't be written to") {
				t.Errorf("error %v", err)
			}
			m.uninstall()
			m.same(before, "after the failure and the removal")
		})
	}
}

// TestTakeBack: containerd's part is taken back when it doesn't start with it,
// and the daemon's stays.
func TestTakeBack(t *testing.T) {
	m := newMachine(t, map[string]string{mainFile: "version = 3\n"})
	before := m.files()
	p, err := MakePlan(t.Context(), m.options())
	m.must(err)
	a, err := p.Begin()
	m.must(err)
	m.must(a.Do(StepDaemon))
	m.must(a.Do(StepContainerd))
	m.must(a.TakeBack())
	if got := m.read(mainFile); got != "version = 3\n" {
		t.Errorf("the main file is %q", got)
	}
	again, err := MakePlan(t.Context(), m.options())
	m.must(err)
	if len(again.Changes) != 2 || again.Changes[0].Path != dropIn {
		t.Errorf("then: %+v", again.Changes)
	}
	m.uninstall()
	m.same(before, "after the removal")
}

// TestRetreat: sluice stops being the default, and stays what containers need.
func TestRetreat(t *testing.T) {
	m := newMachine(t, map[string]string{mainFile: "version = 2\n"})
	before := m.files()
	m.install(m.options())
	p, err := MakeRetreat(m.root)
	m.must(err)
	if len(p.Changes) != 1 || !slices.Equal(p.Restart, []Step{StepContainerd}) {
		t.Errorf("planned %+v", p)
	}
	m.apply(p)
	if text := m.read(dropIn); strings.Contains(text, pluginImages) || strings.Contains(text, pluginCRI) || !strings.Contains(text, "[proxy_plugins.sluice]") {
		t.Errorf("the drop-in is now\n%s", text)
	}
	if p, err = MakeRetreat(m.root); err != nil || !p.Empty() {
		t.Errorf("the second time: %+v, %v", p, err)
	}
	m.uninstall()
	m.same(before, "after the removal")
}

// TestKubeletFirst: kubelet's part goes before the rest, and kubelet is to be
// started anew until it was.
func TestKubeletFirst(t *testing.T) {
	m := newMachine(t, nil)
	before := m.files()
	o := m.options()
	o.Kubelet, o.KubeletConfigDir = true, "/etc/kubernetes/kubelet.conf.d"
	m.install(o)
	p, err := MakeRemoval(m.root)
	m.must(err)
	m.must(Pend(m.root, StepKubelet))
	done, err := p.RemoveFor(StepKubelet)
	m.must(err)
	if len(done) != 1 || done[0].Path != "/etc/kubernetes/kubelet.conf.d/90-sluice.conf" {
		t.Errorf("kubelet's part: %+v", done)
	}
	p, err = MakeRemoval(m.root)
	m.must(err)
	if !slices.Equal(p.Restart, []Step{StepContainerd, StepKubelet}) {
		t.Errorf("to be started anew: %v", p.Restart)
	}
	m.must(Restarted(m.root, StepKubelet))
	if p = m.uninstall(); !slices.Equal(p.Restart, []Step{StepContainerd}) {
		t.Errorf("then: %v", p.Restart)
	}
	m.same(before, "after the removal")
}

// TestResolve: symbolic links are followed as on the machine.
func TestResolve(t *testing.T) {
	m := newMachine(t, nil)
	for link, target := range map[string]string{"a": "/etc", "b": "../../etc", "etc/c": "../a/containerd", "loop": "loop", "none": "/nowhere/x"} {
		m.must(os.Symlink(target, filepath.Join(m.root, link)))
	}
	for name, want := range map[string]string{"/a/x": "/etc/x", "/b/containerd": "/etc/containerd", "/a/c/y": "/etc/containerd/y", "/none/z": "/nowhere/x/z", "/": "/"} {
		got, err := resolve(m.root, name)
		if err != nil || got != filepath.Join(m.root, want) {
			t.Errorf("%s leads to %s, %v; want %s", name, got, err, want)
		}
	}
	if got, err := resolve(m.root, "/loop/x"); err == nil {
		t.Errorf("a loop leads to %s", got)
	}
}

func TestParseRegistry(t *testing.T) {
	for in, want := range map[string]Registry{
		"r.example:5000":             {"r.example:5000", "http://r.example:5000"},
		"docker.io=https://m.local/": {"docker.io", "https://m.local"},
	} {
		if got, err := ParseRegistry(in); got != want || err != nil {
			t.Errorf("%s: %v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "a/b", "../x", "a=ftp://b", "a=", "=http://x", "a=http://u:p@b", "http://a"} {
		if got, err := ParseRegistry(in); err == nil {
			t.Errorf("%q is %v", in, got)
		}
	}
}

func TestKubeletConfigDir(t *testing.T) {
	proc := t.TempDir()
	for pid, words := range map[string]string{"1": "init\x00", "7": "/usr/bin/kubelet\x00--config=/x\x00--config-dir=/etc/k.d\x00"} {
		if err := os.MkdirAll(filepath.Join(proc, pid), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, pid, "cmdline"), []byte(words), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if dir := kubeletConfigDir(proc); dir != "/etc/k.d" {
		t.Errorf("it's %q", dir)
	}
}
