package fuse

import (
	"context"
	"errors"
	"log/slog"

	"golang.org/x/sys/unix"

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

// AnswerOrphans implements holder.Kind. Where the kernel can't resend, it has
// aborted what the last daemon took.
func (kind) AnswerOrphans(h holder.Held, first bool) error {
	return answerOrphans(h.FD, first && connectionOf(h).resends())
}

// answerOrphans gives EIO to all requests that wait; with resend also to those
// which the last daemon took and did not answer.
func answerOrphans(fd int, resend bool) error {
	s := &server{fd: fd, log: slog.Default()}
	if resend {
		if err := s.resend(); err != nil {
			return err
		}
	}
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
		if !ok || req.op == opForget || req.op == opBatchForget {
			continue
		}
		s.fail(w, req, unix.EIO)
	}
}
