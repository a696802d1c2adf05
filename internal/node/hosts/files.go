package hosts

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

const (
	maxFile    = 1 << 20 // bytes of a hosts.toml or certificate
	maxFiles   = 256     // that belong to one registry
	maxHosts   = 64
	hostsFile  = "hosts.toml"
	maxMessage = 300 // of an error of the parser
)

// files are what a registry's directory has.
type files struct {
	dir   string // "": no directory knows the registry
	hosts []byte // the hosts.toml, if there's one
	stamp string // changes when a file does

	dials map[string]time.Duration // the dial_timeout of hosts that have one
}

// find finds the files of a registry in directories, as containerd does.
func find(dirs []string, host string) (files, error) {
	for _, root := range dirs {
		if root == "" {
			continue
		}
		dir, err := dockerconfig.HostDirFromRoot(root)(host)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return files{}, fmt.Errorf("look for the hosts of %s: %w", host, err)
		}
		f := files{dir: dir, dials: make(map[string]time.Duration)}
		return f, f.look(host)
	}
	return files{}, nil
}

// look looks at all files before containerd reads them: they are regular, and
// not too large or too many.
func (f *files) look(registry string) error {
	name := filepath.Join(f.dir, hostsFile)
	content, err := readBounded(name)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f.hosts = content
	var names []string
	if len(content) > 0 {
		names, err = f.named(registry)
		names = append(names, name)
	} else {
		names, err = f.certificates()
	}
	if err != nil {
		return err
	}
	if len(names) > maxFiles {
		return fmt.Errorf("%s has or names %d files: up to %d are looked at", f.dir, len(names), maxFiles)
	}
	slices.Sort(names) // those of hosts.toml come in any order
	f.stamp, err = stampOf(names)
	return err
}

// certificates returns the files of docker's pattern, which containerd reads
// where there's no hosts.toml.
func (f *files) certificates() ([]string, error) {
	d, err := os.Open(f.dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	entries, err := d.ReadDir(maxFiles + 1)
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("read directory %s: %w", f.dir, err)
	}
	if len(entries) > maxFiles {
		return nil, fmt.Errorf("directory %s has more than %d files", f.dir, maxFiles)
	}
	var names []string
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".crt", ".cert", ".key":
			if !e.IsDir() {
				names = append(names, filepath.Join(f.dir, e.Name()))
			}
		}
	}
	return names, nil
}

// section is what is looked at of a host in hosts.toml.
type section struct {
	CA          any    `toml:"ca"`
	Client      any    `toml:"client"`
	DialTimeout string `toml:"dial_timeout"`
}

// named returns the files that the hosts.toml names, and notes who has a
// dial_timeout. Whether all else in it is right is containerd's to say.
func (f *files) named(registry string) ([]string, error) {
	var doc struct {
		section
		Server string             `toml:"server"`
		Host   map[string]section `toml:"host"`
	}
	if err := toml.Unmarshal(f.hosts, &doc); err != nil {
		return nil, f.wrong(err)
	}
	if len(doc.Host) > maxHosts {
		return nil, fmt.Errorf("%s has %d hosts: up to %d are read", filepath.Join(f.dir, hostsFile), len(doc.Host), maxHosts)
	}
	var names []string
	add := func(server string, s section) {
		names = append(names, f.paths(s.CA)...)
		names = append(names, f.paths(s.Client)...)
		d, err := time.ParseDuration(s.DialTimeout)
		if err != nil {
			return
		}
		if !strings.HasPrefix(server, "http") {
			server = "https://" + server
		}
		if u, err := url.Parse(server); err == nil {
			f.dials[u.Host] = d
		}
	}
	for server, s := range doc.Host {
		add(server, s)
	}
	if doc.Server == "" {
		doc.Server = registry
	}
	add(doc.Server, doc.section)
	return names, nil
}

// paths returns the files in a value of "ca" or "client": a string, or an array
// of them, or of pairs.
func (f *files) paths(value any) []string {
	switch v := value.(type) {
	case string:
		if v == "" {
			return nil
		}
		if !filepath.IsAbs(v) {
			v = filepath.Join(f.dir, v)
		}
		return []string{v}
	case []any:
		var all []string
		for _, e := range v {
			all = append(all, f.paths(e)...)
		}
		return all
	}
	return nil
}

// stampOf returns a text that changes when one of the files does. A file that
// isn't regular, or too large, is an error.
func stampOf(names []string) (string, error) {
	var b strings.Builder
	var errs []error
	for _, name := range names {
		fi, err := os.Stat(name)
		switch {
		case err != nil:
			errs = append(errs, err)
			fmt.Fprintf(&b, "%s: %v\n", name, err)
			continue
		case !fi.Mode().IsRegular():
			errs = append(errs, fmt.Errorf("%s is not a regular file", name))
		case fi.Size() > maxFile:
			errs = append(errs, fmt.Errorf("%s has %d bytes: up to %d are read", name, fi.Size(), maxFile))
		}
		var inode uint64
		if st, ok := fi.Sys().(*syscall.Stat_t); ok {
			inode = st.Ino
		}
		fmt.Fprintf(&b, "%s %d %d %d %d\n", name, fi.Mode(), fi.Size(), fi.ModTime().UnixNano(), inode)
	}
	return b.String(), errors.Join(errs...)
}

// readBounded reads a regular file.
func readBounded(name string) ([]byte, error) {
	if _, err := stampOf([]string{name}); err != nil {
		return nil, err
	}
	r, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(io.LimitReader(r, maxFile))
}

// wrong says where in hosts.toml an error is, if the parser tells.
func (f *files) wrong(err error) error {
	if f.dir == "" {
		return err
	}
	file := filepath.Join(f.dir, hostsFile)
	var at interface{ Position() (row, column int) }
	if errors.As(err, &at) {
		row, _ := at.Position()
		return fmt.Errorf("%s, line %d: %s", file, row, short(err.Error()))
	}
	return fmt.Errorf("%s: %s", file, short(err.Error()))
}

func short(text string) string {
	if len(text) > maxMessage {
		text = strings.ToValidUTF8(text[:maxMessage], "") + "…"
	}
	return text
}
