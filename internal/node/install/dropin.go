package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

const (
	// dropInName is our file in a directory that containerd imports.
	dropInName = "sluice.toml"

	// asDefault is the line in it behind which it makes sluice the default.
	asDefault = "# Kubernetes: the CRI's snapshotter."
)

// configured is what containerd's configuration has to become.
type configured struct {
	files    []file
	notes    []string
	replaced string // the snapshotter that the CRI had, if it's another streaming one
	hosts    string // the directory of hosts.toml files that counts
}

// containerdFiles plans containerd's configuration, and has containerd itself
// check the outcome.
func (o Options) containerdFiles(ctx context.Context, rec record) (configured, error) {
	var done configured
	c := containerd{root: o.Root, binary: o.ContainerdBinary, config: o.ContainerdConfig, exec: o.exec}
	if c.exec == nil {
		c.exec = runProgram
	}
	version, warning, err := c.version(ctx)
	if err != nil {
		return done, err
	}
	if warning != "" {
		done.notes = append(done.notes, warning)
	}
	text, err := o.read(c.config)
	if errors.Is(err, fs.ErrNotExist) {
		text, err = []byte("# Made by sluice node install: there was none.\nversion = 3\n"), nil
	}
	if err != nil {
		return done, err
	}
	main, err := parseMain(text)
	if err != nil {
		return done, fmt.Errorf("%s isn't right, and containerd wouldn't start with it: %w", c.config, err)
	}
	place := o.place(main)
	before, err := c.dump(ctx, text, o.expand(place.patterns, place.dropIn, false), nil)
	if err != nil {
		return done, err
	}
	if before.missing(o) == "" {
		done.notes = append(done.notes, c.config+" has sluice in it already; it's left as it is, and stays when sluice is uninstalled")
		return done, nil
	}
	if err := o.mayReplace(before, &done); err != nil {
		return done, err
	}
	dropIn := o.dropIn(main.Version, version, before, &done)
	edited := text
	patterns := place.patterns
	if place.add != "" {
		if edited, err = addImport(text, place.add); err != nil {
			return done, fmt.Errorf("%s: %w: add %q to them by hand, and run this again", c.config, err, place.add)
		}
		patterns = append(slices.Clone(patterns), place.add)
	}
	after, err := c.dump(ctx, edited, o.expand(patterns, place.dropIn, true), map[string][]byte{place.dropIn: dropIn})
	if err != nil {
		return done, err
	}
	if key := after.missing(o); key != "" {
		return done, fmt.Errorf("containerd doesn't take %s from %s: a file that %s imports later sets it, too; remove it there", key, place.dropIn, c.config)
	}
	if d := difference(map[string]any(before.without()), map[string]any(after.without())); d != "" {
		return done, fmt.Errorf("with %s containerd would understand other settings differently (%s): nothing is changed; bring all files that %s imports to the same version (containerd config migrate)", place.dropIn, d, c.config)
	}
	done.files = append(done.files, file{path: place.dropIn, content: dropIn, mode: 0o644, why: "containerd: the snapshotter sluice"})
	if place.add != "" {
		why := "containerd: import " + place.dropIn
		done.files = append(done.files, file{path: c.config, content: edited, mode: 0o644, why: why, added: place.add})
	} else if rec.find(c.config) != nil {
		done.files = append(done.files, file{path: c.config, keep: true})
	}
	return done, nil
}

// dropInPlace is where the drop-in goes.
type dropInPlace struct {
	patterns []string // what the main file imports now, absolute
	dropIn   string
	add      string // what it has to import besides
}

// place chooses a directory that is imported already, or else the one that
// newer versions of containerd import in the configuration that they generate.
// A pattern of our own is narrow, so that files don't come into force that
// happen to lie there.
func (o Options) place(main mainConfig) dropInPlace {
	p := dropInPlace{patterns: imported(o.ContainerdConfig, main.Imports)}
	for _, pattern := range p.patterns {
		name := path.Join(path.Dir(pattern), dropInName)
		if ok, err := path.Match(pattern, name); ok && err == nil && !strings.ContainsAny(path.Dir(pattern), "*?[") {
			p.dropIn = name
			return p
		}
	}
	dir := path.Join(path.Dir(o.ContainerdConfig), "conf.d")
	p.dropIn, p.add = path.Join(dir, dropInName), path.Join(dir, "sluice*.toml")
	return p
}

// expand lists the files of patterns in containerd's order, with or without
// the drop-in.
func (o Options) expand(patterns []string, dropIn string, with bool) []string {
	var all []string
	for _, pattern := range patterns {
		files := []string{pattern}
		if strings.Contains(pattern, "*") {
			files = nil
			matches, _ := filepath.Glob(filepath.Join(o.Root, pattern)) // a bad pattern matches nothing, and containerd says so
			for _, m := range matches {
				files = append(files, path.Join("/", strings.TrimPrefix(m, strings.TrimSuffix(o.Root, "/"))))
			}
			if ok, _ := path.Match(pattern, dropIn); ok && !slices.Contains(files, dropIn) {
				files = append(files, dropIn)
				slices.Sort(files)
			}
		}
		all = append(all, files...)
	}
	if !with {
		all = slices.DeleteFunc(all, func(name string) bool { return name == dropIn })
	}
	return all
}

// mayReplace refuses to take the CRI away from another snapshotter.
func (o Options) mayReplace(before settings, done *configured) error {
	if !before.hasCRI() {
		done.notes = append(done.notes, "containerd's CRI is disabled: kubelet can't use it; other clients stream with --snapshotter sluice")
		return nil
	}
	have := before.text("plugins", pluginImages, "snapshotter")
	switch have {
	case "", plainSnapshots, pluginName:
		return nil
	}
	name := have
	if full, ok := others[have]; ok {
		name = fmt.Sprintf("%s (%s)", have, full)
	}
	if !o.ReplaceSnapshotter {
		return fmt.Errorf("containerd's CRI uses the snapshotter %s: only one can be its default. To use sluice instead, drain the node and give --replace-snapshotter; sluice node uninstall gives it back", name)
	}
	done.replaced = have
	done.notes = append(done.notes, fmt.Sprintf("the snapshotter %s makes way as the CRI's default; it stays installed, and is the default again when sluice is uninstalled", name))
	return nil
}

// dropIn is our part of containerd's configuration. Its version is that of the
// main file as far as that matters: up to containerd 2.2 the last file's version
// counts for all of them.
func (o Options) dropIn(fileVersion int, version [2]int, before settings, done *configured) []byte {
	v := fileVersion
	if v < 2 || v > 3 {
		v = 3
	}
	var b strings.Builder
	fmt.Fprintf(&b, `# Made by sluice node install, removed by sluice node uninstall.
version = %d

[proxy_plugins.sluice]
  type = "snapshot"
  address = %q
  [proxy_plugins.sluice.exports]
    root = %q
    enable_remote_snapshot_annotations = "true"
`, v, o.snapshotterSocket(), o.State)
	if slices.Contains(o.Flags, "--remap-ids") || slices.Contains(o.Flags, "--remap-ids=true") {
		text := strings.Replace(b.String(), "  [proxy_plugins.sluice.exports]", "  capabilities = [\"remap-ids\"]\n  [proxy_plugins.sluice.exports]", 1)
		b.Reset()
		b.WriteString(text)
	}
	b.WriteString("\n# Lists aren't merged: these are all that there are.\n")
	for _, u := range unpackList(before, version) {
		writeUnpacker(&b, u)
	}
	done.hosts = before.text("plugins", pluginImages, "registry", "config_path")
	if done.hosts == "" && len(o.Registries) > 0 {
		done.hosts = defaultHosts
		fmt.Fprintf(&b, "\n[plugins.%q.registry]\n  config_path = %q\n", pluginImages, defaultHosts)
	}
	b.WriteString("\n" + asDefault + "\n")
	images := func(section string) {
		fmt.Fprintf(&b, "[plugins.%s]\n  snapshotter = \"sluice\"\n", section)
		if before.localPull() {
			b.WriteString("  disable_snapshot_annotations = false\n")
		}
	}
	images(`"` + pluginImages + `"`)
	if v == 2 { // the section that containerd migrates over the one above
		images(`"` + pluginCRI + `".containerd`)
	}
	return []byte(b.String())
}

// unpackList is what containerd unpacks images for, and sluice. Where nothing
// is configured it's containerd's default, which a list replaces.
func unpackList(before settings, version [2]int) []map[string]any {
	var list []map[string]any
	for _, u := range before.unpackers() {
		if m, ok := u.(map[string]any); ok && m["snapshotter"] != pluginName {
			list = append(list, m)
		}
	}
	if len(list) == 0 {
		list = append(list, map[string]any{"platform": "linux", "snapshotter": plainSnapshots, "differ": "walking"})
		if slices.Compare(version[:], []int{2, 3}) >= 0 {
			list = append(list, map[string]any{"platform": "linux(+erofs)/" + runtime.GOARCH, "snapshotter": "erofs", "differ": "erofs", "optional": true})
		}
	}
	return append(list, map[string]any{"platform": "linux", "snapshotter": pluginName, "differ": "walking"})
}

func writeUnpacker(b *strings.Builder, u map[string]any) {
	fmt.Fprintf(b, "[[plugins.%q.unpack_config]]\n", pluginTransfer)
	for _, key := range []string{"platform", "snapshotter", "differ", "config_type", "layer_types", "optional"} {
		switch v := u[key].(type) {
		case string:
			if v != "" {
				fmt.Fprintf(b, "  %s = %q\n", key, v)
			}
		case bool:
			if v {
				fmt.Fprintf(b, "  %s = true\n", key)
			}
		case []any:
			var quoted []string
			for _, e := range v {
				quoted = append(quoted, fmt.Sprintf("%q", e))
			}
			if len(quoted) > 0 {
				fmt.Fprintf(b, "  %s = [%s]\n", key, strings.Join(quoted, ", "))
			}
		}
	}
}

// read returns a file of the machine.
func (o Options) read(name string) ([]byte, error) {
	real, err := resolve(o.Root, name)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(real)
}
