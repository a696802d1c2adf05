package fuse

import (
	"bytes"
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

// server answers the requests of one FUSE connection.
type server struct {
	dev   *os.File // /dev/fuse, non-blocking: waiting is the runtime poller's
	fd    int      // of dev, valid while workers run
	table *table
	log   *slog.Logger

	patience  supply.Patience
	openFlags uint32

	base    context.Context // of all reads; cancelled when the server stops
	cancel  context.CancelFunc
	workers sync.WaitGroup
	closing atomic.Bool   // failed reads are left to a successor
	ending  atomic.Bool   // that the connection ends is no news
	lost    chan struct{} // closed when the kernel ended the connection
	once    sync.Once     // closes lost
	errors  supply.ErrorLog
	stats   stats
	buffers buffers
}

// worker is what one goroutine needs to answer requests without allocating.
type worker struct {
	in     [requestSize]byte
	out    [maxReply]byte
	reader supply.Reader
}

// start runs n workers. Each reads a request, lets the next one read, and
// answers its own, however long that takes: so slow reads hold up others only
// when n of them are under way. os.File lets one goroutine read at a time.
func (s *server) start(n int) {
	s.workers.Add(n)
	for range n {
		go func() {
			defer s.workers.Done()
			w := &worker{}
			// Present before the kernel copies into it, see package doc.
			clear(w.in[:])
			for s.next(w) {
			}
		}()
	}
}

// stop ends reading, and the workers when their requests are done. Reads that
// are under way get grace to end by themselves and are cancelled then; what is
// not answered stays with the kernel, for a successor.
func (s *server) stop(grace time.Duration) {
	s.closing.Store(true)
	s.dev.SetReadDeadline(time.Unix(1, 0))
	t := time.AfterFunc(grace, s.cancel)
	s.workers.Wait()
	t.Stop()
	s.cancel()
}

// next serves one request. False: there are no more.
func (s *server) next(w *worker) bool {
	n, err := s.dev.Read(w.in[:])
	switch {
	case err == nil:
		if req, ok := parseRequest(w.in[:n]); ok {
			s.serve(w, req)
		} else {
			s.log.Error("request from the kernel is malformed", "bytes", n)
		}
		return true
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, os.ErrClosed):
		return false
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ECONNABORTED):
		s.disconnected(err)
		return false
	case aborted(s.fd): // the poller's own error says no more than that
		s.disconnected(err)
		return false
	default:
		// ENOENT: the request was withdrawn while it was being read.
		// EINTR, EAGAIN: nothing was read. Others don't exist in
		// fuse_dev_read; should one come, don't spin on it.
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINTR) {
			s.errors.Report(s.log, "read from /dev/fuse", "error", err)
			time.Sleep(10 * time.Millisecond)
		}
		return true
	}
}

func (s *server) disconnected(err error) {
	s.once.Do(func() {
		if !s.ending.Load() {
			s.log.Error("the kernel ended the connection of the FUSE mount: all images attached through it give EIO from now on; restart to mount anew", "error", err)
		}
		close(s.lost)
	})
}

// serve answers req, or not if it wants no answer.
func (s *server) serve(w *worker, req request) {
	switch req.op {
	case opRead:
		s.read(w, req)
	case opLookup:
		s.lookup(w, req)
	case opGetattr:
		s.getattr(w, req)
	case opOpen:
		s.open(w, req)
	case opReaddir:
		s.readdir(w, req)
	case opOpendir:
		clear(w.body(openOutSize))
		s.reply(w, req, openOutSize)
	case opStatfs:
		b := w.body(statfsSize)
		clear(b)
		ne.PutUint32(b[40:], 4096) // block size
		ne.PutUint32(b[44:], 255)  // name length
		s.reply(w, req, statfsSize)
	case opRelease, opReleasedir, opDestroy:
		s.reply(w, req, 0)
	case opForget, opBatchForget:
		// Nodes live as long as images have them, not as long as the
		// kernel remembers them. No reply.
	case opInterrupt:
		// Reads are bounded, so nothing has to be interrupted. ENOSYS
		// makes the kernel stop asking.
		s.fail(w, req, unix.ENOSYS)
	default:
		s.fail(w, req, unix.ENOSYS)
	}
}

func (w *worker) body(n int) []byte { return w.out[outHeaderSize : outHeaderSize+n] }

// reply sends the first n bytes of w's body.
func (s *server) reply(w *worker, req request, n int) {
	putHeader(w.out[:], outHeaderSize+n, 0, req.unique)
	s.send(w.out[:outHeaderSize+n])
}

func (s *server) fail(w *worker, req request, errno unix.Errno) {
	putHeader(w.out[:], outHeaderSize, errno, req.unique)
	s.send(w.out[:outHeaderSize])
}

// send writes a reply. ENOENT means that nobody waits for it any more.
func (s *server) send(msg []byte) {
	for {
		_, err := unix.Write(s.fd, msg)
		switch {
		case err == nil, errors.Is(err, unix.ENOENT):
			return
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		}
		s.errors.Report(s.log, "reply to the kernel", "error", err)
		return
	}
}

func (s *server) lookup(w *worker, req request) {
	name, _, _ := bytes.Cut(req.body, []byte{0})
	d := s.table.name(name)
	if req.node != rootNode || d == nil {
		s.fail(w, req, unix.ENOENT)
		return
	}
	b := w.body(entrySize)
	clear(b)
	ne.PutUint64(b[0:], d.node)
	ne.PutUint64(b[16:], entrySeconds)
	ne.PutUint64(b[24:], attrSeconds)
	putAttr(b[40:], d.node, d.KernelSize(), unix.S_IFREG|0o400)
	s.reply(w, req, entrySize)
}

func (s *server) getattr(w *worker, req request) {
	b := w.body(attrOutSize)
	clear(b)
	ne.PutUint64(b[0:], attrSeconds)
	if req.node == rootNode {
		putAttr(b[16:], rootNode, 0, unix.S_IFDIR|0o500)
	} else if d := s.table.node(req.node); d != nil {
		putAttr(b[16:], d.node, d.KernelSize(), unix.S_IFREG|0o400)
	} else {
		s.fail(w, req, unix.ESTALE)
		return
	}
	s.reply(w, req, attrOutSize)
}

func (s *server) open(w *worker, req request) {
	if len(req.body) < 4 {
		s.fail(w, req, unix.EINVAL)
		return
	}
	switch {
	case s.table.node(req.node) == nil:
		// The kernel then looks the name up anew.
		s.fail(w, req, unix.ESTALE)
	case ne.Uint32(req.body)&unix.O_ACCMODE != unix.O_RDONLY:
		s.fail(w, req, unix.EROFS)
	default:
		b := w.body(openOutSize)
		clear(b)
		ne.PutUint32(b[8:], s.openFlags)
		s.reply(w, req, openOutSize)
	}
}

// readdir lists the devices, for people who look. An entry's offset is its
// node, so a listing goes on correctly when devices come and go.
func (s *server) readdir(w *worker, req request) {
	if len(req.body) < readInSize || req.node != rootNode {
		s.fail(w, req, unix.ENOTDIR)
		return
	}
	from := ne.Uint64(req.body[8:])
	limit := min(int(ne.Uint32(req.body[16:])), maxReply-outHeaderSize)
	b := w.out[outHeaderSize:outHeaderSize]
	for _, d := range s.table.all() {
		if d.node <= from || d.node < firstNode {
			continue
		}
		var ok bool
		if b, ok = putDirent(b, limit, d.node, d.node, d.Name, unix.DT_REG); !ok {
			break
		}
	}
	s.reply(w, req, len(b))
}

func (s *server) read(w *worker, req request) {
	if len(req.body) < readInSize {
		s.fail(w, req, unix.EINVAL)
		return
	}
	off, size := ne.Uint64(req.body[8:]), ne.Uint32(req.body[16:])
	d := s.table.node(req.node)
	if d == nil || size > maxRead {
		s.stats.failed.Add(1)
		s.errors.Report(s.log, "read of a device that is not there", "node", req.node, "offset", off, "length", size)
		s.fail(w, req, unix.EIO)
		return
	}
	n := 0
	if end := uint64(d.KernelSize()); off < end {
		n = int(min(uint64(size), end-off))
	}
	buf := s.buffers.get(outHeaderSize + n)
	defer s.buffers.put(buf)
	msg := (*buf)[:outHeaderSize+n]
	s.stats.waiting.Add(1)
	err := w.reader.Read(s.base, s.patience, d.Supply, msg[outHeaderSize:], int64(off))
	s.stats.waiting.Add(-1)
	if err != nil {
		if s.closing.Load() {
			return // a successor gets the request again
		}
		s.stats.failed.Add(1)
		s.errors.Report(s.log, "read of a device failed, the reader gets EIO",
			"device", d.Name, "offset", off, "length", n, "error", err)
		s.fail(w, req, unix.EIO)
		return
	}
	s.stats.reads.Add(1)
	s.stats.bytes.Add(int64(n))
	putHeader(msg, len(msg), 0, req.unique)
	s.send(msg)
}

// resend makes the kernel give out again all requests which it had given to a
// predecessor and got no answer to.
func (s *server) resend() error {
	var msg [outHeaderSize]byte
	ne.PutUint32(msg[0:], outHeaderSize)
	ne.PutUint32(msg[4:], notifyResend)
	if _, err := unix.Write(s.fd, msg[:]); err != nil {
		return fmt.Errorf("ask the kernel to resend what the last daemon left: %w", err)
	}
	return nil
}
