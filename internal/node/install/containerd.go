package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// The versions of containerd that the tests know. An older one lacks the
// transfer service's remote snapshots; a newer one probably works.
var (
	oldestContainerd = [2]int{2, 1}
	newestContainerd = [2]int{2, 4}
)

// Names in containerd's configuration.
const (
	pluginImages   = "io.containerd.cri.v1.images"
	pluginCRI      = "io.containerd.grpc.v1.cri" // before version 3 of the file
	pluginTransfer = "io.containerd.transfer.v1.local"
	plainSnapshots = "overlayfs" // containerd's default
	pluginName     = "sluice"    // ours, among the proxy plugins
)

// others are snapshotters that bring content when it's read, too.
var others = map[string]string{
	"stargz": "stargz-snapshotter", "soci": "SOCI snapshotter", "nydus": "nydus-snapshotter",
	"overlaybd": "overlaybd (accelerated-container-image)", "fuse-overlayfs": "fuse-overlayfs-snapshotter",
}

// containerd is the machine's containerd: it can be asked before it is used.
type containerd struct {
	root   string
	binary string // on the machine
	config string // its main file, likewise
	exec   func(ctx context.Context, root, program string, args ...string) ([]byte, error)
}

// askTime bounds how long containerd may take to print something.
const askTime = 30 * time.Second

// find returns the path of a program on the machine.
func findProgram(root string, names ...string) (string, bool) {
	for _, name := range names {
		if fi, err := os.Stat(filepath.Join(root, name)); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return name, true
		}
	}
	return "", false
}

// run runs containerd on the machine, without its daemon.
func (c containerd) run(ctx context.Context, args ...string) ([]byte, error) {
	return c.exec(ctx, c.root, c.binary, args...)
}

// runProgram runs a program that only prints something, with root as its root.
func runProgram(ctx context.Context, root, program string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir, cmd.WaitDelay = "/", time.Second
	if root != "/" {
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	}
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(problems.String())
		return nil, fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, text[max(0, len(text)-1000):])
	}
	return out.Bytes(), nil
}

var versionNumber = regexp.MustCompile(`\bv?(\d+)\.(\d+)\.(\d+)`)

// version asks for the version, and returns a warning if it's one that nobody
// has tried.
func (c containerd) version(ctx context.Context) (v [2]int, warning string, err error) {
	out, err := c.run(ctx, "--version")
	if err != nil {
		return v, "", err
	}
	text := strings.TrimSpace(string(out))
	m := versionNumber.FindStringSubmatch(text)
	if m == nil {
		return v, "", fmt.Errorf("%s doesn't say which version it is (%.100q): install containerd 2.1 or newer, or name its program with --containerd-binary", c.binary, text)
	}
	v[0], _ = strconv.Atoi(m[1])
	v[1], _ = strconv.Atoi(m[2])
	switch {
	case slices.Compare(v[:], oldestContainerd[:]) < 0:
		return v, "", fmt.Errorf("containerd is version %s, and streaming needs %d.%d or newer: update containerd, then run this again", m[0], oldestContainerd[0], oldestContainerd[1])
	case slices.Compare(v[:], newestContainerd[:]) > 0:
		warning = fmt.Sprintf("containerd is version %s, newer than any that sluice was tested with (%d.%d): look whether images stream with sluice node status", m[0], newestContainerd[0], newestContainerd[1])
	}
	return v, warning, nil
}

// dump returns what containerd makes of a main file with this text and these
// imports, all of them absolute paths of the machine. Files in staged, whose
// content isn't there yet, are read from it.
func (c containerd) dump(ctx context.Context, text []byte, imports []string, staged map[string][]byte) (settings, error) {
	dir, err := c.stage()
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(filepath.Join(c.root, dir))
	imports = slices.Clone(imports)
	for i, name := range imports {
		if content, ok := staged[name]; ok {
			imports[i] = path.Join(dir, strconv.Itoa(i)+".toml")
			if err := os.WriteFile(filepath.Join(c.root, imports[i]), content, 0o600); err != nil {
				return nil, err
			}
		}
	}
	if text, err = setImports(text, imports); err != nil {
		return nil, fmt.Errorf("%s: %w", c.config, err)
	}
	main := path.Join(dir, "config.toml")
	if err := os.WriteFile(filepath.Join(c.root, main), text, 0o600); err != nil {
		return nil, err
	}
	out, err := c.run(ctx, "--config", main, "config", "dump")
	if err != nil {
		return nil, fmt.Errorf("containerd refuses its configuration %s: %w", c.config, err)
	}
	s := settings{}
	if err := toml.Unmarshal(out, &s); err != nil {
		return nil, fmt.Errorf("what %s config dump prints isn't understood: %w", c.binary, tomlError(err))
	}
	return s, nil
}

// stage makes a directory for files that only containerd config dump reads.
func (c containerd) stage() (string, error) {
	var problems []error
	for _, parent := range []string{"/run", "/tmp"} {
		dir, err := os.MkdirTemp(filepath.Join(c.root, parent), "sluice-install-")
		if err == nil {
			return path.Join(parent, filepath.Base(dir)), nil
		}
		problems = append(problems, err)
	}
	return "", errors.Join(problems...)
}

// settings is containerd's configuration as it dumps it.
type settings map[string]any

// at returns a setting, nil if there's none.
func (s settings) at(keys ...string) any {
	var v any = map[string]any(s)
	for _, k := range keys {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[k]
	}
	return v
}

func (s settings) text(keys ...string) string {
	t, _ := s.at(keys...).(string)
	return t
}

// hasCRI reports whether containerd answers kubelet.
func (s settings) hasCRI() bool {
	disabled, _ := s.at("disabled_plugins").([]any)
	for _, p := range []string{pluginImages, pluginCRI} {
		if slices.Contains(disabled, any(p)) {
			return false
		}
	}
	return true
}

// localPull reports whether the CRI pulls by itself, not by the transfer
// service. containerd decides that by settings that the service doesn't know.
func (s settings) localPull() bool {
	image := func(keys ...string) any { return s.at(append([]string{"plugins", pluginImages}, keys...)...) }
	is := func(keys ...string) bool { b, _ := image(keys...).(bool); return b }
	some := func(keys ...string) bool { m, _ := image(keys...).(map[string]any); return len(m) > 0 }
	annotated, ok := image("disable_snapshot_annotations").(bool)
	downloads, set := image("max_concurrent_downloads").(int64)
	return is("use_local_image_pull") || ok && !annotated || is("discard_unpacked_layers") || is("image_pull_with_sync_fs") ||
		some("registry", "mirrors") || some("registry", "configs") || some("registry", "auths") || set && downloads != 3
}

// unpackers are the snapshotters that the transfer service unpacks images for.
func (s settings) unpackers() []any {
	list, _ := s.at("plugins", pluginTransfer, "unpack_config").([]any)
	return list
}

// missing names a setting without which images don't stream, "" if they do.
func (s settings) missing(o Options) string {
	plugin := []string{"proxy_plugins", pluginName}
	exports := append(slices.Clone(plugin), "exports")
	unpacks := slices.ContainsFunc(s.unpackers(), func(e any) bool {
		m, _ := e.(map[string]any)
		return m["snapshotter"] == pluginName
	})
	switch {
	case s.text(append(plugin, "address")...) != o.snapshotterSocket():
		return "proxy_plugins.sluice"
	case s.text(append(exports, "root")...) != o.State || s.text(append(exports, "enable_remote_snapshot_annotations")...) != "true":
		return "proxy_plugins.sluice.exports"
	case !unpacks:
		return `plugins."` + pluginTransfer + `".unpack_config`
	case s.hasCRI() && s.text("plugins", pluginImages, "snapshotter") != pluginName:
		return `plugins."` + pluginImages + `".snapshotter`
	case s.hasCRI() && s.localPull() && s.at("plugins", pluginImages, "disable_snapshot_annotations") != false:
		return `plugins."` + pluginImages + `".disable_snapshot_annotations`
	}
	return ""
}

// without returns the settings that aren't ours.
func (s settings) without() settings {
	rest, _ := clone(map[string]any(s)).(map[string]any)
	remove := func(keys ...string) {
		m := rest
		for _, k := range keys[:len(keys)-1] {
			if m, _ = m[k].(map[string]any); m == nil {
				return
			}
		}
		delete(m, keys[len(keys)-1])
	}
	remove("imports")
	remove("version")
	remove("proxy_plugins", pluginName)
	remove("plugins", pluginTransfer, "unpack_config")
	for _, key := range []string{"snapshotter", "disable_snapshot_annotations", "use_local_image_pull"} {
		remove("plugins", pluginImages, key)
		remove("plugins", pluginCRI, "containerd", key)
	}
	remove("plugins", pluginImages, "registry", "config_path")
	prune(rest)
	return rest
}

// clone copies what a TOML file holds, deeply as far as there are tables.
func clone(v any) any {
	m, ok := v.(map[string]any)
	if !ok {
		return v
	}
	c := make(map[string]any, len(m))
	for k, v := range m {
		c[k] = clone(v)
	}
	return c
}

// prune removes tables that hold nothing.
func prune(m map[string]any) {
	for k, v := range m {
		if t, ok := v.(map[string]any); ok {
			prune(t)
			if len(t) == 0 {
				delete(m, k)
			}
		}
	}
}

// difference names the first setting in which two configurations differ, "" if
// they don't.
func difference(a, b any) string {
	x, xok := a.(map[string]any)
	y, yok := b.(map[string]any)
	if !xok || !yok {
		if reflect.DeepEqual(a, b) {
			return ""
		}
		return fmt.Sprintf("%v instead of %v", b, a)
	}
	keys := slices.Collect(maps.Keys(x))
	keys = append(keys, slices.Collect(maps.Keys(y))...)
	slices.Sort(keys)
	for _, k := range slices.Compact(keys) {
		if d := difference(x[k], y[k]); d != "" {
			return strconv.Quote(k) + ": " + d
		}
	}
	return ""
}
