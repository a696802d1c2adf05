package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"sluice/internal/durable"
)

// Application is a plan that is being carried out: Begin, then Do for who is to
// be started anew, one after the other.
type Application struct {
	plan *Plan
	undo []func() error // of the last Do
}

// Begin keeps what is there now and writes the record. It's on the disk before
// the first change, so that an installation that is broken off can be removed,
// or made again. After an error nothing is changed.
func (p *Plan) Begin() (*Application, error) {
	err := p.keep()
	if err == nil {
		err = p.rec.write(p.root)
	}
	if err == nil {
		return &Application{plan: p}, nil
	}
	err = explain(err)
	if !p.had.exists {
		err = errors.Join(err, p.forget())
	}
	return nil, err
}

// keep copies what is there now and isn't ours to below RecordDir.
func (p *Plan) keep() error {
	for i, r := range p.rec.Files {
		have, err := readState(p.root, r.Path)
		if err != nil {
			return err
		}
		if r.keep {
			name := backup(p.root, r.Path)
			if err := durable.MkdirAll(filepath.Dir(name), 0o700); err != nil {
				return err
			}
			if err := durable.WriteFile(name, have.content, 0o600); err != nil {
				return err
			}
		}
		if p.had.find(r.Path) == nil {
			p.rec.Files[i].Dirs = missingDirs(p.root, filepath.Dir(have.real))
		}
	}
	return nil
}

// Do carries out the changes that concern these: all of them, or after an error
// none.
func (a *Application) Do(steps ...Step) error {
	a.undo = nil
	for _, c := range a.plan.Changes {
		if !slices.Contains(steps, c.file.step) {
			continue
		}
		back, err := a.plan.change(c)
		a.undo = append(a.undo, back...)
		if err != nil {
			return errors.Join(fmt.Errorf("%s %s: %w; nothing of it is changed", c.Action, c.Path, explain(err)), a.TakeBack())
		}
	}
	return nil
}

// TakeBack undoes the last Do. If nothing else was installed, nothing is left.
func (a *Application) TakeBack() error {
	var errs []error
	for _, u := range slices.Backward(a.undo) {
		if err := u(); err != nil {
			errs = append(errs, fmt.Errorf("take back: %w", err))
		}
	}
	a.undo = nil
	if len(errs) == 0 && !a.plan.had.exists && a.plan.untouched() {
		errs = append(errs, a.plan.forget())
	}
	return errors.Join(errs...)
}

// untouched reports whether no file that the plan changes is as it wants it.
func (p *Plan) untouched() bool {
	for _, c := range p.Changes {
		have, err := readState(p.root, c.Path)
		if err != nil || have.exists && have.sum == sum(c.file.content) {
			return false
		}
	}
	return true
}

// change carries out one change; what it takes back is returned in any case.
func (p *Plan) change(c Change) (undo []func() error, err error) {
	have, err := readState(p.root, c.Path)
	if err != nil {
		return nil, err
	}
	for _, dir := range missingDirs(p.root, filepath.Dir(have.real)) {
		dir = filepath.Join(p.root, dir)
		if err := durable.MkdirAll(dir, 0o755); err != nil {
			return undo, err
		}
		undo = append(undo, func() error { return removeEmpty(dir) })
	}
	if c.file.absent {
		undo = append(undo, func() error { return write(have.real, have, have.content, have.mode.Perm()) })
		return undo, durable.Remove(have.real)
	}
	undo = append(undo, func() error {
		if have.exists {
			return write(have.real, have, have.content, have.mode.Perm())
		}
		if err := os.Remove(have.real); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) && !errors.Is(err, syscall.EROFS) {
			return err
		}
		return nil
	})
	return undo, write(have.real, have, c.file.content, c.file.mode)
}

// write replaces a file, which keeps its owner.
func write(name string, have state, content []byte, mode fs.FileMode) error {
	if have.exists {
		if now, err := os.ReadFile(name); err == nil && string(now) == string(content) {
			return nil
		}
	}
	if err := durable.WriteFile(name, content, mode.Perm()); err != nil {
		return err
	}
	if have.exists && (have.uid != os.Geteuid() || have.gid != os.Getegid()) {
		return os.Chown(name, have.uid, have.gid)
	}
	return nil
}

// Remove carries out a removal. It can be broken off and run again. Where the
// daemon hasn't ended yet, Removing keeps others from starting it.
func (p *Plan) Remove() error {
	for _, c := range p.Changes {
		if _, err := p.change(c); err != nil {
			return fmt.Errorf("%s %s: %w", c.Action, c.Path, explain(err))
		}
	}
	dirs := slices.Clone(p.had.Dirs)
	for _, r := range p.had.Files {
		dirs = append(dirs, r.Dirs...)
	}
	slices.Sort(dirs) // what is inside comes after
	for _, dir := range slices.Backward(slices.Compact(dirs)) {
		if err := removeEmpty(filepath.Join(p.root, dir)); err != nil {
			return err
		}
	}
	return nil
}

// RemoveFor carries out only those changes of a removal that concern one process,
// and returns them. A later plan hasn't got them any more.
func (p *Plan) RemoveFor(s Step) ([]Change, error) {
	var done []Change
	for _, c := range p.Changes {
		if c.file.step != s {
			continue
		}
		if _, err := p.change(c); err != nil {
			return done, fmt.Errorf("%s %s: %w", c.Action, c.Path, explain(err))
		}
		done = append(done, c)
	}
	return done, nil
}

// Removing notes that the installation is about to go, so that who supervises
// the daemon doesn't start it again.
func Removing(root string) error {
	rec, err := readRecord(root)
	if err != nil || !rec.exists || rec.Removing {
		return err
	}
	rec.Removing = true
	return rec.write(root)
}

// Forget removes the record, the last thing that is left of an installation.
// Call it when everything was started anew that Remove said.
func Forget(root string) error {
	p := Plan{root: root}
	return p.forget()
}

func (p *Plan) forget() error {
	if err := os.RemoveAll(filepath.Join(p.root, RecordDir, "before")); err != nil {
		return err
	}
	if err := os.Remove(recordFile(p.root)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return removeEmpty(filepath.Join(p.root, RecordDir))
}

// Pend notes that a process has to be started anew, until Restarted is called.
func Pend(root string, s Step) error {
	rec, err := readRecord(root)
	if err != nil || !rec.exists || slices.Contains(rec.Pending, s) {
		return err
	}
	rec.Pending = append(rec.Pending, s)
	return rec.write(root)
}

// Restarted notes that a process was started anew after the changes.
func Restarted(root string, s Step) error {
	rec, err := readRecord(root)
	if err != nil || !slices.Contains(rec.Pending, s) {
		return err
	}
	rec.Pending = slices.DeleteFunc(rec.Pending, func(p Step) bool { return p == s })
	return rec.write(root)
}

// missingDirs lists the directories on the way to dir, itself included, that
// don't exist: as paths of the machine, the uppermost first.
func missingDirs(root, dir string) []string {
	var missing []string
	for ; len(dir) > len(root); dir = filepath.Dir(dir) {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		missing = append(missing, "/"+strings.TrimPrefix(strings.TrimPrefix(dir, root), "/"))
	}
	slices.Reverse(missing)
	return missing
}

// removeEmpty removes a directory unless something is in it.
func removeEmpty(dir string) error {
	err := os.Remove(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.EROFS) {
		return nil
	}
	return err
}

// explain says what to do about errors that people meet.
func explain(err error) error {
	switch {
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: the directory can't be written to; choose another with --bin-dir or --containerd-config, or make it writable", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: this needs root, and the file must not be immutable (lsattr)", err)
	case errors.Is(err, syscall.ENOSPC):
		return fmt.Errorf("%w: free some space", err)
	}
	return err
}
