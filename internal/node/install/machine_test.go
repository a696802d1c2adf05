package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// machine is a file system as a machine has it, with a containerd that reads its
// configuration as version 2.3 does: imports after who imports them, tables
// merged, lists replaced.
type machine struct {
	*testing.T
	root    string
	version string // what containerd --version prints
}

func newMachine(t *testing.T, files map[string]string) *machine {
	m := &machine{T: t, root: t.TempDir(), version: "containerd github.com/containerd/containerd/v2 v2.3.7 0123456789"}
	for _, dir := range []string{"etc/containerd", "usr/local/bin", "usr/bin", "run", "tmp"} {
		m.must(os.MkdirAll(filepath.Join(m.root, dir), 0o755))
	}
	m.write("/usr/bin/containerd", "a program")
	m.must(os.Chmod(filepath.Join(m.root, "usr/bin/containerd"), 0o755))
	m.write("/sluice", "the new program")
	for name, content := range files {
		m.write(name, content)
	}
	return m
}

func (m *machine) must(err error) {
	m.Helper()
	if err != nil {
		m.Fatal(err)
	}
}

func (m *machine) write(name, content string) {
	m.Helper()
	name = filepath.Join(m.root, name)
	m.must(os.MkdirAll(filepath.Dir(name), 0o755))
	m.must(os.WriteFile(name, []byte(content), 0o644))
}

func (m *machine) read(name string) string {
	m.Helper()
	b, err := os.ReadFile(filepath.Join(m.root, name))
	m.must(err)
	return string(b)
}

// files returns all files with their modes and content, and directories.
func (m *machine) files() map[string]string {
	m.Helper()
	all := map[string]string{}
	m.must(filepath.WalkDir(m.root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		all[name] = fi.Mode().String()
		if fi.Mode().IsRegular() {
			b, err := os.ReadFile(name)
			all[name] += string(b)
			return err
		}
		return nil
	}))
	return all
}

// same fails the test unless the machine's files are these.
func (m *machine) same(want map[string]string, when string) {
	m.Helper()
	have := m.files()
	for _, name := range slices.Sorted(maps.Keys(have)) {
		if _, ok := want[name]; !ok {
			m.Errorf("%s: %s is there", when, name)
		} else if have[name] != want[name] {
			m.Errorf("%s: %s is %q, was %q", when, name, have[name], want[name])
		}
	}
	for name := range want {
		if _, ok := have[name]; !ok {
			m.Errorf("%s: %s is gone", when, name)
		}
	}
}

func (m *machine) options() Options {
	return Options{
		Root: m.root, Program: filepath.Join(m.root, "sluice"), BinDir: "/usr/local/bin", Flags: []string{"--from", "registry.example.com"},
		State: "/var/lib/sluice", Sockets: "/run/sluice", Init: Systemd, ContainerdConfig: "/etc/containerd/config.toml",
		ContainerdUnit: "containerd.service", ContainerdSocket: "/run/containerd/containerd.sock", exec: m.exec,
	}
}

// exec is containerd.
func (m *machine) exec(_ context.Context, root, program string, args ...string) ([]byte, error) {
	if root != m.root || program != "/usr/bin/containerd" {
		return nil, fmt.Errorf("no program %s in %s", program, root)
	}
	if slices.Equal(args, []string{"--version"}) {
		return []byte(m.version + "\n"), nil
	}
	if len(args) != 4 || args[0] != "--config" || args[2] != "config" || args[3] != "dump" {
		return nil, fmt.Errorf("containerd %q", args)
	}
	merged := map[string]any{
		"version": 4, "plugins": map[string]any{pluginImages: map[string]any{
			"snapshotter": "overlayfs", "disable_snapshot_annotations": true, "max_concurrent_downloads": 3,
			"registry": map[string]any{"config_path": ""},
		}},
	}
	pending, loaded := []string{args[1]}, map[string]bool{}
	for len(pending) > 0 {
		name := pending[0]
		pending = pending[1:]
		if loaded[name] {
			continue
		}
		loaded[name] = true
		content, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return nil, err
		}
		var c map[string]any
		if err := toml.Unmarshal(content, &c); err != nil {
			return nil, err
		}
		merge(merged, c)
		main, err := parseMain(content)
		if err != nil {
			return nil, err
		}
		for _, pattern := range imported(name, main.Imports) {
			if !strings.Contains(pattern, "*") {
				pending = append(pending, pattern)
				continue
			}
			matches, err := filepath.Glob(filepath.Join(root, pattern))
			if err != nil {
				return nil, err
			}
			for _, f := range matches {
				pending = append(pending, path.Join("/", strings.TrimPrefix(f, root)))
			}
		}
	}
	return toml.Marshal(merged)
}

func merge(to, from map[string]any) {
	for k, v := range from {
		t, ok := to[k].(map[string]any)
		f, isTable := v.(map[string]any)
		if ok && isTable {
			merge(t, f)
		} else {
			to[k] = v
		}
	}
}

// install plans and carries out.
func (m *machine) install(o Options) *Plan {
	m.Helper()
	p, err := MakePlan(m.Context(), o)
	m.must(err)
	m.apply(p)
	return p
}

func (m *machine) apply(p *Plan) {
	m.Helper()
	a, err := p.Begin()
	m.must(err)
	m.must(errors.Join(a.Do(StepDaemon), a.Do(StepContainerd, StepKubelet, "")))
	for _, s := range p.Restart {
		m.must(Restarted(m.root, s))
	}
}

func (m *machine) uninstall() *Plan {
	m.Helper()
	p, err := MakeRemoval(m.root)
	m.must(err)
	m.must(p.Remove())
	m.must(Forget(m.root))
	return p
}
