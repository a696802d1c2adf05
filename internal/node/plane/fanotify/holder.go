package fanotify

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane/internal/book"
	"sluice/internal/node/plane/internal/holder"
)

// session is what the holder keeps along with the group.
type session struct {
	Version     int           `json:"version"`
	Epoch       string        `json:"epoch"`
	OrphanGrace time.Duration `json:"orphan_grace"`
}

const sessionVersion = 1

func (s session) encode() json.RawMessage {
	data, err := json.Marshal(s)
	if err != nil {
		panic(err) // numbers and strings
	}
	return data
}

// RunHolder keeps the descriptor of a fanotify group, so that reads wait for the
// next daemon when one dies. It is the whole work of a process of its own
// (Options.HolderCommand), see holder.Run.
//
// Should it die while there is no daemon, the kernel lets all reads pass: they
// show zeros, see the package's documentation.
//
// When no daemon was connected for the session's OrphanGrace it answers what
// the kernel asks with EIO, until one connects: a read must not wait for ever.
// It ends then, if no image is mounted.
func RunHolder(ctx context.Context, socket string) error {
	return holder.Run(ctx, socket, &kind{dir: filepath.Dir(socket)})
}

// kind implements holder.Kind for a plane in dir.
type kind struct {
	dir  string
	over bool // nobody needs the group
}

// Over implements holder.Kind.
func (k *kind) Over(holder.Held) bool { return k.over }

// AnswerBystanders implements holder.Kind: only EROFS can read what is marked.
func (*kind) AnswerBystanders(holder.Held) error { return nil }

// AnswerOrphans implements holder.Kind. It takes the daemon's lock: numbers of
// descriptors tell events apart only if one process answers at a time. So in
// place of a daemon that is stopped, and will go on, nobody can answer.
func (k *kind) AnswerOrphans(h holder.Held, first bool) error {
	lock, err := holder.TryLock(filepath.Join(k.dir, lockName))
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return nil
	case errors.Is(err, os.ErrNotExist): // somebody removed the plane's directory
		k.over = true
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	if first {
		if _, err := sweep(h.FD, nil); err != nil {
			return err
		}
	}
	if err := drain(h.FD); err != nil {
		return err
	}
	images, _, err := book.Mounted(k.dir)
	k.over = err == nil && images == 0
	return err
}
