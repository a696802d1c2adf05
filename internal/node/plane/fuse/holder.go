package fuse

import (
	"context"
	"errors"
	"log/slog"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/internal/holder"
)

// RunHolder keeps a descriptor of /dev/fuse, so that the mount and what the
// kernel has asked survive the daemon. It is the whole work of a process of its
// own (Options.HolderCommand), see holder.Run, and ends besides when the FUSE
// mount is gone.
//
// When no daemon was connected for the session's OrphanGrace it answers what
// the kernel asks with EIO, until one connects: a read must not wait for ever.
func RunHolder(ctx context.Context, socket string) error {
	return holder.Run(ctx, socket, kind{})
}

// kind implements holder.Kind.
type kind struct{}

// Over implements holder.Kind: the FUSE mount is gone.
func (kind) Over(h holder.Held) bool { return aborted(h.FD) }

// AnswerBystanders implements holder.Kind: all but reads fail. Where the kernel
// can't resend it answers nobody, because the reads would be lost.
func (kind) AnswerBystanders(h holder.Held) error {
	if !connectionOf(h).resends() {
		return nil
	}
	return answer(h.FD, func(req request) bool { return req.op != opRead })
}

// AnswerOrphans implements holder.Kind. What the last daemon took the kernel
// gives out again, or has aborted where it can't resend. If no image is mounted
// any more, the FUSE mount goes, and the holder with it.
func (kind) AnswerOrphans(h holder.Held, first bool) error {
	c := connectionOf(h)
	if first && c.resends() {
		if err := (&server{fd: h.FD}).resend(); err != nil {
			return err
		}
	}
	if err := answer(h.FD, func(request) bool { return true }); err != nil {
		return err
	}
	if shown, err := c.shown(); err != nil || !shown {
		return err
	}
	if err := plane.Unmount(c.session.Mountpoint, false); !errors.Is(err, plane.ErrBusy) {
		return err
	}
	return nil
}

// answer gives EIO to those of the requests that wait for which fail says so.
func answer(fd int, fail func(request) bool) error {
	s := &server{fd: fd, log: slog.Default()}
	w := &worker{}
	for {
		n, err := unix.Read(fd, w.in[:])
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENODEV):
			return nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOENT):
			continue
		case err != nil:
			return err
		}
		req, ok := parseRequest(w.in[:n])
		if ok && req.op != opForget && req.op != opBatchForget && fail(req) {
			s.fail(w, req, unix.EIO)
		}
	}
}
