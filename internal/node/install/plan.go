package install

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
)

// Init is what starts the daemon on a machine.
type Init string

// What starts daemons. Without systemd somebody else has to: Supervise.
const (
	Systemd Init = "systemd"
	NoInit  Init = "none"
)

// Options say what to install and where.
type Options struct {
	Root             string     // of the machine's file system as this process sees it; "/"
	Program          string     // the file to install, as this process sees it
	BinDir           string     // where it goes
	Flags            []string   // of sluice node
	State, Sockets   string     // the directories that these flags mean
	Init             Init       // what starts the daemon
	ContainerdConfig string     // its main file
	ContainerdBinary string     // "": searched
	ContainerdUnit   string     // of systemd
	ContainerdSocket string     // where it answers
	Registries       []Registry // that get a hosts.toml
	Kubelet          bool       // send kubelet's image service through the daemon
	KubeletConfigDir string     // its --config-dir; "": searched
	KubeletUnit      string     // of systemd
	// ReplaceSnapshotter: another one may be the CRI's default now.
	ReplaceSnapshotter bool

	// exec runs a program with a root; nil: a process.
	exec func(ctx context.Context, root, program string, args ...string) ([]byte, error)
}

func (o Options) snapshotterSocket() string { return path.Join(o.Sockets, "snapshotter.sock") }

// Installed is where the program goes.
func (o Options) Installed() string { return path.Join(o.BinDir, "sluice") }

// Action is what happens to a file.
type Action string

// What happens to files.
const (
	Create Action = "create"
	Edit   Action = "edit"   // there is one, and it changes
	Remove Action = "remove" // ours, or one that is given back
)

// Change is one file that is to change.
type Change struct {
	Action Action `json:"action"`
	Path   string `json:"path"` // on the machine
	Why    string `json:"why"`
	Diff   string `json:"diff,omitempty"` // of text

	file file
}

// Step is a process that has to be started anew for changes to count.
type Step string

// The processes, in the order in which they are started anew.
const (
	StepDaemon     Step = "sluice"
	StepContainerd Step = "containerd"
	StepKubelet    Step = "kubelet"
)

// Plan is what has to change on a machine.
type Plan struct {
	Changes []Change `json:"changes"`
	// Restart: who has to be started anew after it. It stays so, also in later
	// plans, until Restarted is called.
	Restart []Step   `json:"restart"`
	Notes   []string `json:"notes"` // what somebody should know

	root string
	rec  record // after the changes
	had  record
}

// file is a file as it should be.
type file struct {
	path    string
	content []byte
	program string // a file with the content instead
	mode    fs.FileMode
	why     string
	step    Step
	added   string // an import of it is all that is ours
	keep    bool   // it stays as it is
	absent  bool   // it goes
}

// MakePlan compares a machine with what is to be installed, and changes nothing.
func MakePlan(ctx context.Context, o Options) (*Plan, error) {
	rec, err := readRecord(o.Root)
	if err != nil {
		return nil, err
	}
	if o.ContainerdBinary == "" {
		var ok bool
		if o.ContainerdBinary, ok = findProgram(o.Root, "/usr/local/bin/containerd", "/usr/bin/containerd", "/opt/bin/containerd", "/bin/containerd", "/usr/sbin/containerd"); !ok {
			return nil, errors.New("there's no containerd in /usr/local/bin, /usr/bin, /opt/bin, /bin or /usr/sbin: install containerd 2.1 or newer, or name its program with --containerd-binary")
		}
	}
	p := &Plan{Changes: []Change{}, Restart: []Step{}, Notes: []string{}, root: o.Root, had: rec}
	conf, err := o.containerdFiles(ctx, rec)
	if err != nil {
		return nil, err
	}
	p.Notes = append(p.Notes, conf.notes...)
	files := []file{{path: o.Installed(), program: o.Program, mode: 0o755, why: "the program", step: StepDaemon}}
	if o.Init == Systemd {
		files = append(files, o.unit())
	}
	for _, f := range conf.files {
		f.step = StepContainerd
		files = append(files, f)
	}
	hosts, notes := o.hostsFiles(rec, conf.hosts)
	files, p.Notes = append(files, hosts...), append(p.Notes, notes...)
	kubelet, notes := o.kubeletFiles()
	files, p.Notes = append(files, kubelet...), append(p.Notes, notes...)
	p.rec = rec.next(o, conf.replaced)
	p.rec.Dirs = slices.Clone(rec.Dirs)
	for _, f := range files {
		if err := p.want(f); err != nil {
			return nil, err
		}
	}
	for _, old := range rec.Files {
		if !slices.ContainsFunc(files, func(f file) bool { return f.path == old.Path }) {
			if err := p.revert(old); err != nil {
				return nil, err
			}
			p.rec.Dirs = append(p.rec.Dirs, old.Dirs...)
		}
	}
	if o.flagsChanged(rec) {
		p.restart(StepDaemon)
	}
	for _, s := range rec.Pending {
		p.restart(s)
	}
	p.sortSteps()
	p.rec.Pending = p.Restart
	return p, nil
}

// flagsChanged: a daemon without a unit has its flags from the record.
func (o Options) flagsChanged(rec record) bool {
	return o.Init == NoInit && rec.exists && !slices.Equal(rec.Flags, o.Flags)
}

// Empty reports whether the machine is as the plan wants it.
func (p *Plan) Empty() bool { return len(p.Changes) == 0 && len(p.Restart) == 0 }

func (p *Plan) restart(s Step) {
	if s != "" && !slices.Contains(p.Restart, s) {
		p.Restart = append(p.Restart, s)
	}
}

func (p *Plan) sortSteps() {
	order := []Step{StepDaemon, StepContainerd, StepKubelet}
	slices.SortFunc(p.Restart, func(a, b Step) int { return slices.Index(order, a) - slices.Index(order, b) })
}

// want adds what it takes for a file to be as it should.
func (p *Plan) want(f file) error {
	if f.keep {
		if old := p.had.find(f.path); old != nil {
			p.rec.Files = append(p.rec.Files, *old)
		}
		return nil
	}
	if f.program != "" {
		content, err := os.ReadFile(f.program)
		if err != nil {
			return fmt.Errorf("read the program: %w", err)
		}
		f.content = content
	}
	have, err := readState(p.root, f.path)
	if err != nil {
		return err
	}
	old := p.had.find(f.path)
	r := recorded{Path: f.path, Sum: sum(f.content), Import: f.added, Step: f.step}
	edited := old != nil && f.added != "" && have.exists && have.sum != old.Sum
	if old != nil && !edited { // ours: what was there first stays what is given back
		r.Before, r.BeforeMode, r.Dirs = old.Before, old.BeforeMode, old.Dirs
		if f.added == "" {
			r.Import = old.Import
		}
	} else if have.exists {
		r.Before, r.BeforeMode, r.keep = have.sum, have.mode.Perm(), true
	}
	if have.exists && have.sum == r.Sum {
		if old != nil {
			p.rec.Files = append(p.rec.Files, r)
		}
		return nil // what was there before us, as we want it, isn't ours
	}
	p.rec.Files = append(p.rec.Files, r)
	c := Change{Action: Create, Path: f.path, Why: f.why, file: f}
	if have.exists {
		c.Action = Edit
		if f.program == "" {
			f.mode = have.mode.Perm()
			c.file = f
		}
	}
	if f.program == "" {
		c.Diff = diff(have.content, f.content)
	}
	p.Changes = append(p.Changes, c)
	p.restart(f.step)
	return nil
}

// revert adds what it takes to give back what was there before a file of ours.
func (p *Plan) revert(r recorded) error {
	have, err := readState(p.root, r.Path)
	if err != nil {
		return err
	}
	f := file{path: r.Path, mode: r.BeforeMode, step: r.Step}
	c := Change{Action: Remove, Path: r.Path}
	untouched := have.exists && have.sum == r.Sum
	switch {
	case !have.exists:
		return nil
	case have.sum == r.Before:
		return nil // the change never got there
	case untouched && r.Before != "":
		if f.content, err = r.original(p.root); err != nil {
			return err
		}
		c.Action, c.Why = Edit, "as it was before"
	case untouched:
		f.absent, c.Why = true, "it came with sluice"
	case r.Import != "":
		if f.content, err = dropImport(have.content, r.Import); err != nil {
			return fmt.Errorf("%s: %w: take %q out of them by hand, and run this again", r.Path, err, r.Import)
		}
		if bytes.Equal(f.content, have.content) {
			return nil
		}
		f.mode = have.mode.Perm()
		c.Action, c.Why = Edit, "somebody has edited it since: only the import goes"
	case r.Step == StepContainerd || path.Ext(r.Path) == ".service":
		f.absent, c.Why = true, "it came with sluice; somebody has edited it since"
	default:
		p.Notes = append(p.Notes, fmt.Sprintf("%s has been changed since sluice was installed: it stays", r.Path))
		return nil
	}
	if text(have.content) {
		c.Diff = diff(have.content, f.content)
	}
	c.file = f
	p.Changes = append(p.Changes, c)
	p.restart(r.Step)
	return nil
}

// MakeRetreat plans to give the CRI back the snapshotter that it had, while
// containers that use sluice go on: new ones don't.
func MakeRetreat(root string) (*Plan, error) {
	rec, err := readRecord(root)
	if err != nil {
		return nil, err
	}
	p := &Plan{Changes: []Change{}, Restart: []Step{}, Notes: []string{}, root: root, had: rec, rec: rec}
	p.rec.Files = nil
	for _, r := range rec.Files {
		f := file{path: r.Path, keep: true}
		if path.Base(r.Path) == dropInName && r.Step == StepContainerd {
			have, err := readState(root, r.Path)
			if err != nil {
				return nil, err
			}
			if kept, _, ok := strings.Cut(string(have.content), asDefault); ok {
				f = file{path: r.Path, content: []byte(kept), mode: 0o644, why: "containerd: sluice isn't the default any more", step: StepContainerd}
			}
		}
		if err := p.want(f); err != nil {
			return nil, err
		}
	}
	p.rec.Pending = slices.Clone(rec.Pending)
	for _, s := range p.Restart {
		if !slices.Contains(p.rec.Pending, s) {
			p.rec.Pending = append(p.rec.Pending, s)
		}
	}
	return p, nil
}

// MakeRemoval plans to take away what was installed, and to give back what was
// there before.
func MakeRemoval(root string) (*Plan, error) {
	rec, err := readRecord(root)
	if err != nil {
		return nil, err
	}
	p := &Plan{Changes: []Change{}, Restart: []Step{}, Notes: []string{}, root: root, had: rec}
	for _, r := range slices.Backward(rec.Files) {
		if err := p.revert(r); err != nil {
			return nil, err
		}
	}
	for _, s := range rec.Pending {
		p.restart(s)
	}
	p.Restart = slices.DeleteFunc(p.Restart, func(s Step) bool { return s == StepDaemon })
	p.sortSteps()
	return p, nil
}

func sum(content []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(content)) }

// text reports whether content is for people to read.
func text(content []byte) bool {
	return len(content) < 1<<20 && !bytes.Contains(content, []byte{0})
}

// diff returns the lines that go, with "-", and come, with "+", between equal
// beginnings and ends, of which one line is shown.
func diff(from, to []byte) string {
	a, b := lines(from), lines(to)
	begin := 0
	for begin < len(a) && begin < len(b) && a[begin] == b[begin] {
		begin++
	}
	end := 0
	for end < len(a)-begin && end < len(b)-begin && a[len(a)-1-end] == b[len(b)-1-end] {
		end++
	}
	var out strings.Builder
	show := func(mark string, lines []string) {
		for _, l := range lines {
			fmt.Fprintf(&out, "%s%s\n", mark, strings.TrimRight(l, "\r\n"))
		}
	}
	show(" ", a[max(0, begin-1):begin])
	show("-", a[begin:len(a)-end])
	show("+", b[begin:len(b)-end])
	show(" ", a[len(a)-end:min(len(a), len(a)-end+1)])
	return out.String()
}

func lines(content []byte) []string {
	return slices.Collect(strings.Lines(string(content)))
}
