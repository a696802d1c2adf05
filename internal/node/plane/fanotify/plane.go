// Package fanotify is a plane whose devices are sparse files that are filled when
// they are read: the kernel asks before each read (FAN_PRE_ACCESS, Linux 6.15),
// the plane writes what is missing and lets the read go on. A device that is
// whole in its file is read like any file, without the daemon and without a new
// mount.
//
// It is faster than package fuse, and there is one thing that it can't promise:
// see "What remains". So it has to be asked for.
//
//	DIR/state.json   which device has which file, which image is mounted where
//	DIR/events       reads that were taken and not answered, see journal
//	DIR/lock         one process at a time
//	DIR/holder.*     the holder's socket, lock and log
//	FILES/NAME       the file of a device
//
// DIR should be on a tmpfs such as /run. FILES must be on ext4, xfs or btrfs; it
// takes as much space as all devices have bytes that are attached with a Content,
// besides what that has of its own. The space is allocated when an image is
// attached, so that it is Attach that fails for want of it, not a read.
//
// # How a read is held
//
// For each image the plane clones the mount of FILES, without giving the clone a
// place in the tree, marks it, and lets EROFS open its devices through it. What
// reads a device in another way (a backup of FILES) isn't asked about, and sees
// holes. An event has the file and the range. The plane fills whole pages: reads
// them from the device's Content, which verifies, writes them, notes that they
// are there, and answers.
//
// What has been filled is known to the process that filled it, and to no other:
// nothing that is on disk is believed. After a restart pages are filled again
// when EROFS asks for them again. After a reboot files of earlier mounts are
// removed.
//
// A page must never be taken out of a file again as long as the image is
// mounted: between the answer and the read nobody knows whether the read has
// happened.
//
// # Restart
//
// A fanotify group lives as long as somebody has its descriptor. The holder has
// it besides the daemon, as in package fuse. When the daemon dies, reads wait.
// What it had taken and not answered isn't given out again, so it is in the
// journal; what it had no time to write down is denied, and the kernel asks again
// by itself, once: read-ahead that fails is followed by a read of the page.
//
//	Open     lock DIR; get the group from the holder; load state.json;
//	         occupy the numbers of events in the journal, deny all others; serve
//	Adopt …  each image's content; reads of a device wait for its first one
//	Ready    what has no content now fails
//
// # What remains
//
// When the last descriptor of a group is closed, the kernel lets all reads pass,
// those that wait and those that come: what isn't filled reads as zeros. That
// takes the death of daemon and holder at once (kill -9 of both, a service
// manager that kills whole control groups, the end of a container that both live
// in). The next daemon finds it out: it makes the files of those mounts ask
// again and denies all that they ask, says that the mounts are stale, and mounts
// anew. But what has been read in between, zeros perhaps, stays in the page cache
// of the old mount, with whoever uses it.
//
// A daemon that is stopped (SIGSTOP) holds its readers until it goes on or is
// killed: nobody else could tell its events from others.
//
// The last thing is that of any local file: when a disk doesn't take a page and
// the kernel drops it, the file has a hole where it was.
package fanotify

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/durable"
	"sluice/internal/node/plane"
	"sluice/internal/node/plane/internal/book"
	"sluice/internal/node/plane/internal/holder"
)

// Options of Open. The zero value of a field is its default.
type Options struct {
	// Dir is the plane's directory, made with mode 0700 if missing.
	// Required.
	Dir string
	// Files is the directory of the devices' files, made with mode 0700 if
	// missing, on ext4, xfs or btrfs. It belongs to the plane: what it doesn't
	// know there is removed. Required.
	Files string
	// HolderCommand is the program and first arguments of the holder, a
	// program that calls RunHolder with its last argument; the socket's name
	// is appended. Required, unless a holder runs already.
	HolderCommand []string
	// Workers is how many reads are answered at once, 128 by default, which
	// is the most.
	Workers int
	// ReadTimeout bounds one read of content, 60 s by default. The reader
	// gets EIO then, and may try again: what the kernel tries by itself, and
	// who tries at once, waits only for a moment.
	ReadTimeout time.Duration
	// AdoptTimeout bounds how long a read waits for its device to be
	// adopted, 10 s by default.
	AdoptTimeout time.Duration
	// OrphanGrace is how long reads wait for a daemon when there is none,
	// 10 minutes by default; after that the holder answers them with EIO. It
	// is settled when the group is made.
	OrphanGrace time.Duration
	// Log, slog.Default() by default.
	Log *slog.Logger
}

// maxWorkers leaves slots of the journal for what earlier processes left.
const maxWorkers = slots / 2

func (o Options) withDefaults() (Options, error) {
	if o.Dir == "" || o.Files == "" {
		return o, errors.New("fanotify plane: Options.Dir or Files is empty")
	}
	if o.Workers <= 0 {
		o.Workers = maxWorkers
	}
	o.Workers = min(o.Workers, maxWorkers)
	for _, d := range []struct {
		value    *time.Duration
		standard time.Duration
	}{{&o.ReadTimeout, time.Minute}, {&o.AdoptTimeout, 10 * time.Second}, {&o.OrphanGrace, 10 * time.Minute}} {
		if *d.value <= 0 {
			*d.value = d.standard
		}
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return o, nil
}

// Start tells how Open found things.
type Start struct {
	// Resumed: the group of an earlier process was taken over. Its images are
	// to be adopted.
	Resumed bool
	// Reason says why not, empty if there was nothing to resume.
	Reason string
	// Images that are mounted and can be adopted, by directory.
	Images []string
	// Stale images are mounted but lost their content for ever, and may have
	// shown zeros. Attach them anew, which replaces the mount.
	Stale []string
}

// Plane implements plane.Plane.
type Plane struct {
	opts   Options
	log    *slog.Logger
	start  Start
	lock   *os.File
	keeper *holder.Keeper
	book   *book.Book
	table  *table
	group  int // its descriptor, -1 if there is none
	server *server
}

var _ plane.Plane = (*Plane)(nil)

const lockName = "lock"

// Open starts serving: it goes on with the images of an earlier process where
// that is possible. It fails with an *plane.UnsupportedError when the kernel or
// the file system of opts.Files lacks what is needed, which it tries with an
// image of its own.
func Open(ctx context.Context, opts Options) (*Plane, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	for _, dir := range []*string{&opts.Dir, &opts.Files} {
		if *dir, err = ownDir(*dir); err != nil {
			return nil, fmt.Errorf("make the plane's directory: %w", err)
		}
	}
	lock, err := holder.Lock(filepath.Join(opts.Dir, lockName))
	if err != nil {
		return nil, fmt.Errorf("plane in %s: %w", opts.Dir, err)
	}
	p := &Plane{
		opts: opts, log: opts.Log, lock: lock, group: -1, table: newTable(),
		keeper: holder.NewKeeper(opts.Dir, opts.HolderCommand, opts.Log),
	}
	p.book = book.New(opts.Dir, 1, kernel{p})
	if err := p.open(ctx); err != nil {
		_ = p.close() // the error that counts is err
		return nil, fmt.Errorf("plane in %s: %w", opts.Dir, err)
	}
	return p, nil
}

// ownDir makes a directory and returns its name without symbolic links.
func ownDir(dir string) (string, error) {
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return "", err
	}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", err
	}
	return filepath.Abs(dir)
}

func (p *Plane) open(ctx context.Context) error {
	if _, err := durable.Sweep(p.opts.Dir, 0); err != nil {
		return err
	}
	epoch, old, err := p.resume()
	if err != nil {
		return err
	}
	if p.start.Resumed {
		err = p.goOn()
	} else {
		epoch, err = p.fresh(ctx, old)
	}
	if err != nil {
		return err
	}
	p.keeper.Watch(p.held(epoch))
	if p.start.Resumed {
		p.log.Info("resumed the images of the last process", "images", len(p.start.Images))
	} else {
		p.log.Info("made a new fanotify group", "files", p.opts.Files, "reason", p.start.Reason)
	}
	for _, dir := range p.start.Stale {
		p.log.Error("image lost its content for ever and has to be attached anew; what was read through the old mount since the last daemon and its holder died may be zeros: restart whoever uses it", "dir", dir)
	}
	return nil
}

func (p *Plane) held(epoch string) holder.Held {
	s := session{Version: sessionVersion, Epoch: epoch, OrphanGrace: p.opts.OrphanGrace}
	return holder.Held{FD: p.group, Session: s.encode()}
}

// Start tells how Open found things.
func (p *Plane) Start() Start { return p.start }

// Stats tells what this process has served.
func (p *Plane) Stats() Stats { return p.server.stats.snapshot() }

// Lost is never: the group is this process's own.
func (p *Plane) Lost() <-chan struct{} { return nil }

// Close implements plane.Plane: mounts and the holder stay.
func (p *Plane) Close() error {
	if err := p.book.Take(context.Background()); err != nil {
		return nil // it is closed
	}
	defer p.book.Give()
	return p.close()
}

// closeGrace is how long reads may go on when the plane closes.
const closeGrace = 2 * time.Second

// close ends this process's part, also after an Open that failed.
func (p *Plane) close() error {
	var errs []error
	if p.server != nil {
		p.server.stop(closeGrace)
		errs = append(errs, p.server.journal.f.Close())
	}
	p.keeper.Leave()
	p.book.Close()
	for _, d := range p.table.all() {
		errs = append(errs, d.file.Close())
	}
	if p.server != nil {
		errs = append(errs, p.server.group.Close())
	} else if p.group >= 0 {
		errs = append(errs, unix.Close(p.group))
	}
	return errors.Join(append(errs, p.lock.Close())...)
}

// Shutdown ends everything: it closes the plane and makes the holder quit. It
// fails with plane.ErrBusy and changes nothing when images are attached.
func (p *Plane) Shutdown(ctx context.Context) error {
	if err := p.book.Take(ctx); err != nil {
		return err
	}
	defer p.book.Give()
	if dir, ok := p.book.Attached(); ok {
		return fmt.Errorf("shut the plane down: %w: an image is attached at %s", plane.ErrBusy, dir)
	}
	return errors.Join(p.close(), p.keeper.Quit(), p.book.Erase())
}
