package fanotify

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane/internal/holder"
	"sluice/internal/node/plane/internal/supply"
)

// resume takes over what the holder has, if it is what the state on disk is of:
// p.start.Resumed. Otherwise p.start.Reason says why not, and old is a group that
// is to be given up.
func (p *Plane) resume() (epoch string, old *holder.Held, err error) {
	held, err := p.keeper.Get()
	if err != nil {
		return "", nil, err
	}
	epoch, lerr := p.book.Load()
	if held == nil {
		if epoch != "" {
			p.start.Reason = "no holder has the last fanotify group: it ended with the last daemon"
		}
		return "", nil, nil
	}
	var s session
	switch err := json.Unmarshal(held.Session, &s); {
	case err != nil || s.Version != sessionVersion:
		p.start.Reason = fmt.Sprintf("the holder has a session of version %d, this is %d", s.Version, sessionVersion)
	case lerr != nil:
		p.start.Reason = lerr.Error()
	case s.Epoch != epoch:
		p.start.Reason = "the state on disk is of another fanotify group than the holder's"
	default:
		p.group, p.start.Resumed = held.FD, true
		return epoch, nil, nil
	}
	return "", held, nil
}

// goOn serves with the group of an earlier process.
func (p *Plane) goOn() error {
	if err := p.openBook(); err != nil {
		return err
	}
	if err := p.newServer(false); err != nil {
		return err
	}
	orphans, err := p.server.orphans()
	if err != nil {
		return err
	}
	p.server.start(p.opts.Workers, orphans)
	return nil
}

// fresh serves with a new group. Files of images whose group is gone ask it from
// now on, and are unknown to it: what reads them gets EIO.
func (p *Plane) fresh(ctx context.Context, old *holder.Held) (epoch string, err error) {
	if p.group, err = newGroup(); err != nil {
		return "", err
	}
	if err := p.guard(); err != nil {
		return "", err
	}
	if old != nil {
		// Who waits for it would be let pass when it ends.
		err := errors.Join(drain(old.FD), sweepAll(old.FD), unix.Close(old.FD))
		if err != nil {
			return "", err
		}
	}
	epoch = rand.Text()
	if err := p.book.Begin(epoch); err != nil {
		return "", err
	}
	if err := p.openBook(); err != nil {
		return "", err
	}
	if err := p.newServer(true); err != nil {
		return "", err
	}
	p.server.start(p.opts.Workers, nil)
	if err := p.try(ctx); err != nil {
		return "", err
	}
	return epoch, p.keeper.Put(ctx, p.held(epoch))
}

func sweepAll(group int) error {
	_, err := sweep(group, nil)
	return err
}

// guard marks the files that earlier processes left.
func (p *Plane) guard() error {
	entries, err := os.ReadDir(p.opts.Files)
	if err != nil {
		return err
	}
	for _, e := range entries {
		f, err := os.Open(filepath.Join(p.opts.Files, e.Name()))
		if err != nil {
			return err
		}
		err = markFile(p.group, int(f.Fd()))
		f.Close()
		if err != nil {
			p.log.Error("the file of a mount that lost its content can't be marked: what is read of it may be zeros", "file", f.Name(), "error", err)
		}
	}
	return nil
}

// openBook restores devices and images, and removes the files of all others.
// They stay as inodes for those mounts that still have them.
func (p *Plane) openBook() (err error) {
	if p.start.Images, p.start.Stale, err = p.book.Open(); err != nil {
		return err
	}
	known := map[string]bool{}
	for _, d := range p.table.all() {
		known[d.Name] = true
	}
	entries, err := os.ReadDir(p.opts.Files)
	for _, e := range entries {
		if !known[e.Name()] {
			err = errors.Join(err, os.RemoveAll(filepath.Join(p.opts.Files, e.Name())))
		}
	}
	return err
}

// newServer makes the server of p.group, which it takes over.
func (p *Plane) newServer(fresh bool) error {
	j, err := openJournal(p.opts.Dir, fresh)
	if err != nil {
		return err
	}
	group, err := pollable(p.group)
	if err != nil {
		j.f.Close()
		return err
	}
	s := &server{
		group: group, fd: p.group, journal: j, table: p.table, log: p.log,
		patience: supply.Patience{Read: p.opts.ReadTimeout, Adopt: p.opts.AdoptTimeout},
		copies:   make(chan struct{}, 1),
	}
	s.copies <- struct{}{}
	s.base, s.cancel = context.WithCancel(context.Background())
	p.server = s
	return nil
}

// pollable wraps a group for the runtime's poller and takes it over.
func pollable(group int) (*os.File, error) {
	if err := unix.SetNonblock(group, true); err != nil {
		return nil, fmt.Errorf("make the fanotify group non-blocking: %w", err)
	}
	f := os.NewFile(uintptr(group), "fanotify")
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("wait for fanotify events through the poller: %w", err)
	}
	return f, nil
}
