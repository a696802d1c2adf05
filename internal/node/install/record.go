package install

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"sluice/internal/durable"
)

// RecordDir, on the machine, has the record of what was installed, and below
// "before" the files that were there first.
const RecordDir = "/etc/sluice"

// record is what was installed, and how.
type record struct {
	Files      []recorded `json:"files"`
	Flags      []string   `json:"flags"`
	Program    string     `json:"program"`
	State      string     `json:"state"`
	Sockets    string     `json:"sockets"`
	Init       Init       `json:"init"`
	Containerd string     `json:"containerd_unit"`
	Socket     string     `json:"containerd_socket"`
	Kubelet    string     `json:"kubelet_unit"`
	Replaced   string     `json:"replaced_snapshotter,omitempty"`
	Pending    []Step     `json:"pending"` // who has to be started anew
	Removing   bool       `json:"removing,omitempty"`
	Dirs       []string   `json:"dirs,omitempty"` // that were made for files which aren't wanted any more

	exists bool
}

// recorded is one file that was installed.
type recorded struct {
	Path       string      `json:"path"`
	Sum        string      `json:"sum"`              // of what was installed
	Before     string      `json:"before,omitempty"` // sum of what was there; "": nothing
	BeforeMode fs.FileMode `json:"before_mode,omitempty"`
	Import     string      `json:"import,omitempty"` // that is our part of it
	Dirs       []string    `json:"dirs,omitempty"`   // that were made for it
	Step       Step        `json:"step,omitempty"`   // who reads it

	keep bool // what is there now has to be kept
}

// Installation is what a machine has of sluice.
type Installation struct {
	Program, State, Sockets string
	Flags                   []string
	Init                    Init
	ContainerdUnit          string
	ContainerdSocket        string
	KubeletUnit             string
	Removing                bool // being uninstalled: nobody may start the daemon
}

// Find returns what was installed on a machine; found is false if nothing was.
func Find(root string) (i Installation, found bool, err error) {
	rec, err := readRecord(root)
	return Installation{
		Program: rec.Program, State: rec.State, Sockets: rec.Sockets, Flags: rec.Flags, Init: rec.Init,
		ContainerdUnit: rec.Containerd, ContainerdSocket: rec.Socket, Removing: rec.Removing, KubeletUnit: rec.Kubelet,
	}, rec.exists, err
}

func (r record) next(o Options, replaced string) record {
	return record{
		Flags: append([]string{}, o.Flags...), Program: o.Installed(), State: o.State, Sockets: o.Sockets, Init: o.Init,
		Containerd: o.ContainerdUnit, Socket: o.ContainerdSocket, Kubelet: o.KubeletUnit, Replaced: replaced, exists: true,
	}
}

func (r record) find(name string) *recorded {
	i := slices.IndexFunc(r.Files, func(f recorded) bool { return f.Path == name })
	if i < 0 {
		return nil
	}
	return &r.Files[i]
}

func recordFile(root string) string { return filepath.Join(root, RecordDir, "installed.json") }

func readRecord(root string) (record, error) {
	var r record
	content, err := os.ReadFile(recordFile(root))
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(content, &r); err != nil {
		return r, fmt.Errorf("%s, the record of what was installed, is damaged: %w; what was there before is below %s", recordFile(root), err, path.Join(RecordDir, "before"))
	}
	r.exists = true
	return r, nil
}

func (r record) write(root string) error {
	content, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := durable.MkdirAll(filepath.Join(root, RecordDir), 0o755); err != nil {
		return err
	}
	return durable.WriteFile(recordFile(root), append(content, '\n'), 0o600)
}

// backup is where what was at a path before us is kept.
func backup(root, name string) string { return filepath.Join(root, RecordDir, "before", name) }

// original returns what was there before.
func (r recorded) original(root string) ([]byte, error) {
	content, err := os.ReadFile(backup(root, r.Path))
	if err == nil && sum(content) != r.Before {
		err = errors.New("it isn't what it was")
	}
	if err != nil {
		return nil, fmt.Errorf("%s from before sluice was installed: %w", r.Path, err)
	}
	return content, nil
}

// state is a file of the machine as it is.
type state struct {
	exists   bool
	real     string // where it is, as this process sees it, behind symbolic links
	content  []byte
	sum      string
	mode     fs.FileMode
	uid, gid int
}

func readState(root, name string) (state, error) {
	real, err := resolve(root, name)
	if err != nil {
		return state{}, err
	}
	s := state{real: real}
	fi, err := os.Stat(real)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	if !fi.Mode().IsRegular() {
		return s, fmt.Errorf("%s isn't a file: remove it", name)
	}
	if s.content, err = os.ReadFile(real); err != nil {
		return s, err
	}
	s.exists, s.sum, s.mode = true, sum(s.content), fi.Mode()
	if sys, ok := fi.Sys().(*syscall.Stat_t); ok {
		s.uid, s.gid = int(sys.Uid), int(sys.Gid)
	}
	return s, nil
}

// maxLinks bounds symbolic links on the way to a file, as Linux does.
const maxLinks = 40

// resolve returns where a path of the machine leads, as this process sees it.
// Symbolic links are followed as on the machine, and never lead out of root.
// What isn't there yet is left as it is.
func resolve(root, name string) (string, error) {
	rest := strings.Split(strings.Trim(path.Clean("/"+name), "/"), "/")
	at, links := "/", 0
	for len(rest) > 0 {
		next := path.Join(at, rest[0])
		rest = rest[1:]
		target, err := os.Readlink(filepath.Join(root, next))
		if err != nil {
			at = next // no link, or nothing
			continue
		}
		if links++; links > maxLinks {
			return "", &fs.PathError{Op: "resolve", Path: name, Err: syscall.ELOOP}
		}
		if path.IsAbs(target) {
			at = "/"
		}
		rest = append(strings.Split(strings.Trim(path.Clean(target), "/"), "/"), rest...)
	}
	return filepath.Join(root, at), nil
}
