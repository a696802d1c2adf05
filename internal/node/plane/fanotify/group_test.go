package fanotify

import (
	"encoding/binary"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// message is an event as the kernel writes it.
func message(fd int32, off, n uint64) []byte {
	b := make([]byte, eventSize+rangeSize)
	ne := binary.NativeEndian
	ne.PutUint32(b, uint32(len(b)))
	b[4] = unix.FANOTIFY_METADATA_VERSION
	ne.PutUint16(b[6:], eventSize)
	ne.PutUint64(b[8:], unix.FAN_PRE_ACCESS)
	ne.PutUint32(b[16:], uint32(fd))
	info := b[eventSize:]
	info[0] = unix.FAN_EVENT_INFO_TYPE_RANGE
	ne.PutUint16(info[2:], rangeSize)
	ne.PutUint64(info[8:], off)
	ne.PutUint64(info[16:], n)
	return b
}

func FuzzParseEvent(f *testing.F) {
	f.Add(message(7, 4096, 8192))
	f.Add(message(-1, 0, 0)[:eventSize])
	f.Fuzz(func(t *testing.T, b []byte) {
		for rest := b; len(rest) > 0; {
			_, next, err := parseEvent(rest)
			if err != nil {
				return
			}
			if len(next) >= len(rest) {
				t.Fatal("an event of no length")
			}
			rest = next
		}
	})
}

func TestParseEvent(t *testing.T) {
	e, rest, err := parseEvent(message(7, 4096, 8192))
	if want := (event{fd: 7, off: 4096, n: 8192, ranged: true}); e != want || len(rest) != 0 || err != nil {
		t.Errorf("got %+v, %d, %v", e, len(rest), err)
	}
}

func TestJournal(t *testing.T) {
	dir := t.TempDir()
	j, err := openJournal(dir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer j.f.Close()
	one, two := entry{fd: 0, inode: 5, off: 4096, n: 10}, entry{fd: 99, inode: 1 << 60, off: 0, n: 1 << 40}
	for slot, e := range map[int]entry{0: one, slots - 1: two, 3: one} {
		if err := j.put(slot, e); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.clear(3); err != nil {
		t.Fatal(err)
	}
	// Half an entry is none.
	b := entry{fd: 8, inode: 9}.encode()
	if _, err := j.f.WriteAt(b[:20], 5*entrySize); err != nil {
		t.Fatal(err)
	}
	again, err := openJournal(dir, false)
	if err != nil {
		t.Fatal(err)
	}
	defer again.f.Close()
	all, err := again.entries()
	if err != nil || len(all) != 2 || all[0] != one || all[slots-1] != two {
		t.Errorf("got %v, %v", all, err)
	}
}

// TestOccupy: a number that is in use isn't taken away from its user.
func TestOccupy(t *testing.T) {
	used, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer used.Close()
	if occupy(int(used.Fd())) {
		t.Error("a number in use was occupied")
	}
	const free = 500
	if !occupy(free) {
		t.Fatal("a free number was not occupied")
	}
	if occupy(free) {
		t.Error("it was occupied twice")
	}
	unix.Close(free)
}
