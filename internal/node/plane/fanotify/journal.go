package fanotify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// journal is the file DIR/events: which events the daemon has taken and not
// answered. The kernel doesn't give them to a successor again, and knows them
// only by the numbers of descriptors that died with the daemon; so what they are
// about must be written down.
//
// A number is in the journal before anything is done about its event, and until
// the event has been answered and before its descriptor is closed. So an event
// with a number that is in the journal, if there is one, is the one described.
// The file is lost or stays with the page cache, as the events do: it is never
// synced.
type journal struct{ f *os.File }

// entry is an event that was taken.
type entry struct {
	fd     int
	inode  uint64
	off, n uint64
}

const (
	journalName = "events"
	entrySize   = 40
	// slots is how many events may be under way.
	slots = 256
)

// openJournal opens the journal of dir; a new one if fresh.
func openJournal(dir string, fresh bool) (*journal, error) {
	flags := os.O_RDWR | os.O_CREATE
	if fresh {
		flags |= os.O_TRUNC
	}
	f, err := os.OpenFile(filepath.Join(dir, journalName), flags, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.Size() != slots*entrySize {
		// Written whole now, so that there is space for it later.
		if err = f.Truncate(0); err == nil {
			_, err = f.WriteAt(make([]byte, slots*entrySize), 0)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &journal{f}, nil
}

func (e entry) encode() (b [entrySize]byte) {
	for i, v := range []uint64{uint64(e.fd) + 1, e.inode, e.off, e.n, e.sum()} {
		binary.NativeEndian.PutUint64(b[8*i:], v)
	}
	return b
}

// sum tells an entry from what was written half.
func (e entry) sum() uint64 {
	return (uint64(e.fd) + 1) ^ e.inode<<1 ^ e.off<<2 ^ e.n<<3 ^ 0x5851f42d4c957f2d
}

func decodeEntry(b []byte) (e entry, ok bool) {
	var v [5]uint64
	for i := range v {
		v[i] = binary.NativeEndian.Uint64(b[8*i:])
	}
	if v[0] == 0 || v[0] > maxDescriptor {
		return e, false
	}
	e = entry{int(v[0]) - 1, v[1], v[2], v[3]}
	return e, e.sum() == v[4]
}

// put writes e into a slot.
func (j *journal) put(slot int, e entry) error {
	b := e.encode()
	_, err := j.f.WriteAt(b[:], int64(slot)*entrySize)
	return err
}

// clear empties a slot.
func (j *journal) clear(slot int) error {
	_, err := j.f.WriteAt(make([]byte, entrySize), int64(slot)*entrySize)
	return err
}

// entries returns what is in the slots.
func (j *journal) entries() (map[int]entry, error) {
	b := make([]byte, slots*entrySize)
	if _, err := j.f.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("read %s: %w", j.f.Name(), err)
	}
	all := map[int]entry{}
	for slot := range slots {
		if e, ok := decodeEntry(b[slot*entrySize:]); ok {
			all[slot] = e
		}
	}
	return all, nil
}

// orphans returns the events that the last daemon took and didn't answer, by
// slot, and denies those that aren't in the journal: it was killed before it
// could write them down. Each event's number is occupied by a descriptor of this
// process, the caller's to close when it has answered: otherwise the kernel would
// give it to a new event.
func (s *server) orphans() (map[int]entry, error) {
	left, err := s.journal.entries()
	if err != nil {
		return nil, err
	}
	keep := map[int]bool{}
	for slot, e := range left {
		if keep[e.fd] || !occupy(e.fd) {
			delete(left, slot)
			err = errors.Join(err, s.journal.clear(slot))
			continue
		}
		keep[e.fd] = true
	}
	if err != nil {
		return nil, err
	}
	denied, err := sweep(s.fd, keep)
	if len(left)+denied > 0 {
		s.log.Info("took over reads that the last daemon left", "reads", len(left), "to_ask_again", denied)
	}
	return left, err
}

// occupy makes the number fd that of a descriptor, unless it is one already.
func occupy(fd int) bool {
	null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	if null == fd {
		return true
	}
	defer unix.Close(null)
	got, err := unix.FcntlInt(uintptr(null), unix.F_DUPFD_CLOEXEC, fd)
	if err == nil && got != fd {
		unix.Close(got)
	}
	return err == nil && got == fd
}
