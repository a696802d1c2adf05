package fanotify

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane/internal/supply"
)

// server answers the events of one group.
type server struct {
	group   *os.File // non-blocking: waiting is the runtime poller's
	fd      int      // of group, valid while workers run
	journal *journal
	table   *table
	log     *slog.Logger

	patience supply.Patience

	base    context.Context // of all reads; cancelled when the server stops
	cancel  context.CancelFunc
	workers sync.WaitGroup
	free    chan int      // slots of the journal
	copies  chan struct{} // holds a token while no device is being copied
	closing atomic.Bool   // failed reads are left to a successor
	errors  supply.ErrorLog
	stats   stats

	mu   sync.Mutex
	left []int // descriptors of events that weren't answered
}

// worker is what one goroutine needs to answer events without allocating.
type worker struct {
	in     [eventBuffer]byte
	reader supply.Reader
	buffer []byte // grows to what a read needs, at most maxFill
}

// maxFill is the most that is filled at once. EROFS asks for what it reads ahead,
// 128 KiB unless somebody changes its read_ahead_kb.
const maxFill = 1 << 20

// start goes on with the events in orphans, and runs n workers. Each takes an
// event, lets the next one take one, and answers its own, however long that
// takes. os.File lets one goroutine read at a time.
func (s *server) start(n int, orphans map[int]entry) {
	s.free = make(chan int, slots)
	for slot := range slots {
		if e, ok := orphans[slot]; ok {
			s.workers.Go(func() { s.serve(&worker{}, slot, e) })
		} else {
			s.free <- slot
		}
	}
	for range n {
		s.workers.Go(func() {
			w := &worker{}
			// Present before the kernel copies into it: a copy that must
			// fault a page in is given up when the process is being killed,
			// and the reader refused.
			clear(w.in[:])
			for s.next(w) {
			}
		})
	}
}

// stop ends taking events, and the workers when theirs are done. Reads that are
// under way get grace to end by themselves and are cancelled then; what is not
// answered stays with the kernel, for a successor.
func (s *server) stop(grace time.Duration) {
	s.closing.Store(true)
	s.group.SetReadDeadline(time.Unix(1, 0))
	t := time.AfterFunc(grace, s.cancel)
	s.workers.Wait()
	t.Stop()
	s.cancel()
	for _, fd := range s.left { // not before: a number must not come again
		unix.Close(fd)
	}
}

// next takes an event and serves it. False: there are no more.
func (s *server) next(w *worker) bool {
	var slot int
	select {
	case slot = <-s.free: // there are more than workers, and orphans end
	case <-s.base.Done():
		return false
	}
	n, err := s.group.Read(w.in[:])
	switch {
	case err == nil:
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, os.ErrClosed):
		s.free <- slot
		return false
	default:
		// The event was denied by the kernel: no descriptor for it, a signal.
		s.errors.Report(s.log, "read a fanotify event", "error", err)
		s.free <- slot
		time.Sleep(10 * time.Millisecond)
		return true
	}
	e, rest, err := parseEvent(w.in[:n])
	if err != nil || len(rest) > 0 || e.fd < 0 {
		s.errors.Report(s.log, "a fanotify event is not what it should be", "bytes", n, "descriptor", e.fd, "error", err)
		s.free <- slot
		if e.fd >= 0 {
			s.answer(e.fd, deny)
			unix.Close(e.fd)
		}
		return true
	}
	s.serve(w, slot, s.note(slot, e))
	return true
}

// note writes an event down.
func (s *server) note(slot int, e event) entry {
	var st unix.Stat_t
	if err := unix.Fstat(e.fd, &st); err != nil || !e.ranged {
		st.Ino = 0 // no device's: it will be denied
	}
	taken := entry{fd: e.fd, inode: st.Ino, off: e.off, n: e.n}
	if err := s.journal.put(slot, taken); err != nil {
		// Should this process die now, the reader will have to ask again.
		s.errors.Report(s.log, "note a read that was taken", "error", err)
	}
	return taken
}

// serve fills what is about to be read and answers.
func (s *server) serve(w *worker, slot int, e entry) {
	s.stats.waiting.Add(1)
	defer s.stats.waiting.Add(-1)
	answer := uint32(allow)
	if err := s.fill(w, e); err != nil {
		if s.closing.Load() { // a successor finds it in the journal
			s.mu.Lock()
			defer s.mu.Unlock()
			s.left = append(s.left, e.fd)
			return
		}
		s.stats.failed.Add(1)
		s.errors.Report(s.log, "read of a device failed, the reader gets EIO", "offset", e.off, "length", e.n, "error", err)
		answer = deny
	}
	s.answer(e.fd, answer)
	s.stats.events.Add(1)
	if err := s.journal.clear(slot); err != nil {
		s.errors.Report(s.log, "note a read that was answered", "error", err)
	}
	unix.Close(e.fd)
	s.free <- slot
}

func (s *server) answer(fd int, answer uint32) {
	// ENOENT: an orphan that its reader gave up, or that had been answered.
	if err := respond(s.fd, fd, answer); err != nil && !errors.Is(err, unix.ENOENT) {
		s.errors.Report(s.log, "answer the kernel", "error", err)
	}
}

var errUnknown = errors.New("the file belongs to no device of an attached image")

// fill makes sure that the pages which e reads are in their file.
func (s *server) fill(w *worker, e entry) error {
	d := s.table.inode(e.inode)
	if d == nil {
		return errUnknown
	}
	end := d.KernelSize()
	if e.off >= uint64(end) {
		return nil // there is nothing to read
	}
	off := int64(e.off) / pageSize * pageSize
	if e.n < uint64(end-int64(e.off)) {
		end = (int64(e.off+e.n) + pageSize - 1) / pageSize * pageSize
	}
	if err := s.fillRange(w, d, off, end); err != nil {
		return fmt.Errorf("device %s: %w", d.Name, err)
	}
	if d.left.Load() > 0 && d.Complete() {
		s.copy(d)
	}
	return nil
}

// fillRange fills the pages from off to end, both borders of pages.
func (s *server) fillRange(w *worker, d *device, off, end int64) error {
	for {
		if off, end = d.missing(off, end); off >= end {
			return nil
		}
		n := min(end-off, maxFill)
		if int64(cap(w.buffer)) < n {
			w.buffer = make([]byte, max(n, 128<<10))
		}
		p := w.buffer[:n]
		if err := w.reader.Read(s.base, s.patience, d.Supply, p, off); err != nil {
			return err
		}
		complete, err := d.write(p, off)
		if err != nil {
			return err
		}
		s.stats.filled.Add(n)
		if complete {
			s.completed(d)
		}
		off += n
	}
}

// completed makes reads of a device cost what those of any file do.
func (s *server) completed(d *device) {
	raw, err := d.file.SyscallConn()
	if err == nil { // not Fd: the device may be removed meanwhile
		cerr := raw.Control(func(fd uintptr) { err = ignoreFile(s.fd, int(fd)) })
		err = errors.Join(err, cerr)
	}
	s.log.Debug("all of a device is in its file: the kernel doesn't ask any more", "device", d.Name, "error", err)
}

// copyPiece is how much is copied at once.
const copyPiece = 256 << 10

// copy brings the rest of a device whose content is on this machine into its
// file, in the background and one device at a time.
func (s *server) copy(d *device) {
	if !d.copying.CompareAndSwap(false, true) {
		return
	}
	s.workers.Go(func() {
		defer d.copying.Store(false)
		select {
		case <-s.copies:
			defer func() { s.copies <- struct{}{} }()
		case <-s.base.Done():
			return
		}
		w := &worker{}
		for off := int64(0); off < d.KernelSize() && !s.closing.Load(); off += copyPiece {
			if err := s.fillRange(w, d, off, min(off+copyPiece, d.KernelSize())); err != nil {
				s.log.Debug("a device is not copied further for now", "device", d.Name, "error", err)
				return
			}
		}
	})
}
