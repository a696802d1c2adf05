// Package fuse is the plane for production: devices are files of one small FUSE
// mount, whose requests a raw loop on /dev/fuse answers.
//
//	DIR/blobs      the FUSE mount: one file per device, named as the device
//	DIR/state.json which device has which node, which image is mounted where
//	DIR/lock       one process at a time
//	DIR/holder.*   the holder's socket, lock and log
//
// DIR should be on a tmpfs such as /run: nothing in it outlives a reboot, and
// every Attach writes it to disk.
//
// # Restart
//
// A FUSE connection lives as long as somebody has its descriptor of /dev/fuse.
// A small process, the holder (RunHolder), has it besides the daemon. When the
// daemon dies, in whatever way, requests stay with the kernel and their readers
// wait. The next daemon gets the descriptor from the holder, asks the kernel to
// give out again what was given to the dead one (FUSE_NOTIFY_RESEND, Linux
// 6.9), and goes on. Readers see a delay.
//
//	Open     lock DIR; get the descriptor from the holder; is it the mount at
//	         DIR/blobs, and alive? load state.json; RESEND; serve
//	Adopt …  each image's content; reads of a device wait for its first one
//	Ready    what has no content now fails
//
// If there is nothing to resume, Open starts anew, and Start says why. Images
// of an older connection give EIO for ever then: Adopt says ErrStale.
//
// When no daemon is at work for OrphanGrace, because it is dead, stopped or
// stuck, the holder answers in its place, with EIO. If no image is mounted then,
// it unmounts DIR/blobs and ends. Who looks around in DIR/blobs is answered so
// after seconds. Images keep the connection when somebody unmounts DIR/blobs; it
// is mounted again when it is needed.
//
// What makes this hold:
//
//   - All workers read the one descriptor which the holder has too. Requests
//     read through a clone of it (FUSE_DEV_IOC_CLONE) die with the clone, see
//     docs/decisions/0003. Before Linux 6.9 that is what saves their readers
//     from waiting for ever, so there the daemon reads through a clone.
//   - A node is in state.json before the kernel can learn it, and is never
//     given to another device while the connection lives.
//   - Buffers that the kernel copies requests into and replies from have been
//     touched before: a copy that must first fault a page in is given up when
//     its process is being killed, and the reader would get EIO.
//   - A read that fails because this process is closing is not answered.
package fuse

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"sluice/internal/durable"
	"sluice/internal/node/plane"
	"sluice/internal/node/plane/internal/book"
	"sluice/internal/node/plane/internal/holder"
	"sluice/internal/node/plane/internal/supply"
)

// Options of Open. The zero value of a field is its default.
type Options struct {
	// Dir is the plane's directory, made with mode 0700 if missing.
	// Required.
	Dir string
	// HolderCommand is the program and first arguments of the holder, a
	// program that calls RunHolder with its last argument; the socket's name
	// is appended. Required, unless a holder runs already.
	HolderCommand []string
	// Workers is how many requests are answered at once, 128 by default.
	// Each read that waits for content occupies one.
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
	// is settled when the mount is made.
	OrphanGrace time.Duration
	// Readahead of the FUSE mount in bytes: what the kernel may read of a
	// device beyond what EROFS asked for, across the borders of files. A page
	// by default, which is none: see docs/decisions/0004.
	Readahead int
	// Mode is how new mounts get at the FUSE mount's files, plane.FileBacked
	// by default. Mounts of an earlier process go on in theirs.
	Mode plane.Mode
	// DirectIO makes EROFS read devices past the page cache of the FUSE
	// mount. See docs/decisions/0002 for what that costs and gains. Loop
	// devices always do.
	DirectIO bool
	// Log, slog.Default() by default.
	Log *slog.Logger

	// without are flags of INIT not to ask for, but for tests.
	without uint64
}

func (o Options) withDefaults() (Options, error) {
	if o.Dir == "" {
		return o, errors.New("fuse plane: Options.Dir is empty")
	}
	if o.Workers <= 0 {
		o.Workers = 128
	}
	// Below this a handful of slow reads would hold up lookups.
	o.Workers = max(o.Workers, 8)
	o.ReadTimeout = positive(o.ReadTimeout, time.Minute)
	o.AdoptTimeout = positive(o.AdoptTimeout, 10*time.Second)
	o.OrphanGrace = positive(o.OrphanGrace, 10*time.Minute)
	if o.Mode == "" {
		o.Mode = plane.FileBacked
	}
	if o.Readahead <= 0 {
		o.Readahead = os.Getpagesize()
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return o, nil
}

func positive(d, otherwise time.Duration) time.Duration {
	if d > 0 {
		return d
	}
	return otherwise
}

// background is how many reads the kernel has under way by itself (readahead,
// asynchronous direct I/O). It leaves workers for requests that somebody waits
// for otherwise.
func (o Options) background() int { return o.Workers * 7 / 8 }

// Start tells how Open found things.
type Start struct {
	// Resumed: the connection of an earlier process was taken over. Its
	// images are to be adopted.
	Resumed bool
	// Reason says why not, empty if there was nothing to resume.
	Reason string
	// Resends: what this process reads from the kernel and doesn't answer is
	// given to the next one. Without it, before Linux 6.9, reads that are
	// under way when the process dies fail with EIO.
	Resends bool
	// Images that are mounted and can be adopted, by directory.
	Images []string
	// Stale images are mounted but lost their content for ever. Attach them
	// anew, which replaces the mount.
	Stale []string
}

// Plane implements plane.Plane.
type Plane struct {
	opts   Options
	log    *slog.Logger
	dir    string // without symbolic links
	start  Start
	lock   *os.File
	conn   *connection
	keeper *holder.Keeper
	book   *book.Book
	server *server
	table  *table // of the server
}

var _ plane.Plane = (*Plane)(nil)

// Open starts serving in opts.Dir: it goes on with the FUSE mount of an earlier
// process where that is possible, and makes a new one where not. It fails with
// an *plane.UnsupportedError when the kernel lacks what is needed.
func Open(ctx context.Context, opts Options) (*Plane, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := durable.MkdirAll(opts.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the plane's directory: %w", err)
	}
	if err := os.Chmod(opts.Dir, 0o700); err != nil {
		return nil, err
	}
	dir, err := filepath.EvalSymlinks(opts.Dir)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	lock, err := holder.Lock(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("plane in %s: %w", dir, err)
	}
	p := &Plane{
		opts: opts, log: opts.Log, dir: dir, lock: lock,
		keeper: holder.NewKeeper(dir, opts.HolderCommand, opts.Log),
		table:  newTable(),
	}
	p.book = book.New(dir, firstNode, kernel{p})
	if err := p.open(ctx); err != nil {
		p.keeper.Leave()
		lock.Close()
		return nil, fmt.Errorf("plane in %s: %w", dir, err)
	}
	return p, nil
}

func (p *Plane) blobs() string { return filepath.Join(p.dir, "blobs") }

func (p *Plane) open(ctx context.Context) error {
	// An existing one may be a mount which nobody serves: don't look at it.
	if err := os.Mkdir(p.blobs(), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	// What a process that was killed was writing.
	entries, err := os.ReadDir(p.dir)
	for _, e := range entries {
		if durable.IsTemp(e.Name()) {
			err = errors.Join(err, os.Remove(filepath.Join(p.dir, e.Name())))
		}
	}
	if err != nil {
		return err
	}
	resumed, err := p.resume()
	if err != nil {
		return err
	}
	if !resumed {
		if err := p.fresh(ctx); err != nil {
			return err
		}
	}
	if p.start.Images, p.start.Stale, err = p.book.Open(); err != nil {
		p.conn.close()
		return err
	}
	p.start.Resends = p.conn.resends()
	if err := p.serve(); err != nil {
		p.conn.close()
		return err
	}
	p.keeper.Watch(p.conn.held())
	if grace := p.conn.session.OrphanGrace; grace > 0 {
		p.keeper.Beat(min(grace/4, 10*time.Second))
	}
	if p.start.Resumed {
		p.log.Info("resumed the FUSE mount of the last process", "images", len(p.start.Images))
	} else {
		p.log.Info("made a new FUSE mount", "at", p.blobs(), "reason", p.start.Reason)
	}
	for _, dir := range p.start.Stale {
		p.log.Warn("image lost its content for ever and has to be attached anew; whoever uses the old mount gets EIO", "dir", dir)
	}
	return nil
}

// resume takes over what the holder has. False: there is nothing to go on
// with, p.start.Reason says why.
func (p *Plane) resume() (bool, error) {
	held, err := p.keeper.Get()
	if err != nil {
		return false, err
	}
	epoch, serr := p.book.Load()
	if held == nil {
		if epoch != "" {
			p.start.Reason = "no holder has the last FUSE connection"
		}
		return false, nil
	}
	conn := connectionOf(*held)
	if serr == nil {
		serr = conn.verify(p.blobs(), epoch)
	}
	if serr != nil {
		p.start.Reason = serr.Error()
		conn.close()
		return false, nil
	}
	p.conn, p.start.Resumed = conn, true
	return true, nil
}

// fresh makes a new connection. The holder takes it in place of an old one,
// whose images then get EIO instead of waiting for nobody.
func (p *Plane) fresh(ctx context.Context) error {
	if err := plane.UnmountAll(p.blobs()); err != nil {
		return err
	}
	epoch := rand.Text()
	conn, err := connect(p.blobs(), epoch, p.opts.background(), wantFlags&^p.opts.without)
	if err != nil {
		return err
	}
	conn.session.OrphanGrace = p.opts.OrphanGrace
	if err = p.book.Begin(epoch); err == nil {
		err = p.keeper.Put(ctx, conn.held())
	}
	if err != nil {
		conn.close()
		_ = plane.Unmount(p.blobs(), true) // the error that counts is err
		return err
	}
	p.conn = conn
	if err := plane.SetReadahead(conn.session.Device, p.opts.Readahead); err != nil {
		p.log.Warn("cannot set the FUSE mount's readahead, the kernel's default stays", "error", err)
	}
	return nil
}

// serve starts the workers.
func (p *Plane) serve() error {
	fd, dev, err := p.conn.reader()
	if err != nil {
		return err
	}
	s := &server{
		dev: dev, fd: fd, table: p.table, log: p.log,
		patience:  supply.Patience{Read: p.opts.ReadTimeout, Adopt: p.opts.AdoptTimeout},
		openFlags: openKeepCache, lost: make(chan struct{}),
	}
	s.base, s.cancel = context.WithCancel(context.Background())
	s.table.add(&device{supply.New(pollName, 0, true), pollNode})
	if p.start.Resumed && p.start.Resends {
		if err := s.resend(); err != nil {
			dev.Close()
			return err
		}
	}
	p.server = s
	s.start(p.opts.Workers)
	if err := calmPoller(filepath.Join(p.blobs(), pollName)); err != nil {
		p.log.Warn("the kernel was not told that FUSE files can't be polled", "error", err)
	}
	return nil
}

// Start tells how Open found things.
func (p *Plane) Start() Start { return p.start }

// Stats tells what this process has served.
func (p *Plane) Stats() Stats { return p.server.stats.snapshot() }

// Lost is closed when the kernel has ended the connection: somebody unmounted
// DIR/blobs or aborted it. Nothing can be attached any more and attached images
// give EIO; the remedy is to open the plane again.
func (p *Plane) Lost() <-chan struct{} { return p.server.lost }

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

func (p *Plane) close() error {
	p.server.stop(closeGrace)
	p.keeper.Leave()
	p.book.Close()
	err := p.server.dev.Close()
	p.conn.close()
	return errors.Join(err, p.lock.Close())
}

// Shutdown ends everything: it unmounts the FUSE mount, makes the holder quit
// and closes the plane. It fails with plane.ErrBusy and changes nothing when
// images are attached.
func (p *Plane) Shutdown(ctx context.Context) error {
	if err := p.book.Take(ctx); err != nil {
		return err
	}
	defer p.book.Give()
	if dir, ok := p.book.Attached(); ok {
		return fmt.Errorf("shut the plane down: %w: an image is attached at %s", plane.ErrBusy, dir)
	}
	p.server.ending.Store(true)
	if err := p.unmountBlobs(ctx); err != nil && !errors.Is(err, plane.ErrNotAttached) {
		p.server.ending.Store(false)
		return fmt.Errorf("shut the plane down: %w", err)
	}
	err := p.close()
	return errors.Join(err, p.keeper.Quit(), p.book.Erase())
}

// unmountBlobs tries for a while: the kernel closes the files of an EROFS mount,
// and those of reads that were under way, a little after the unmount.
func (p *Plane) unmountBlobs(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, shutdownWait)
	defer cancel()
	for {
		err := plane.Unmount(p.blobs(), false)
		if !errors.Is(err, plane.ErrBusy) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(5 * time.Millisecond):
		}
	}
}

const shutdownWait = 3 * time.Second
