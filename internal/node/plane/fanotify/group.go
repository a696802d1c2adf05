package fanotify

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
)

// Everything here is in fanotify(7), fanotify_init(2) and fanotify_mark(2);
// FAN_PRE_ACCESS and the range that comes with it are of Linux 6.14.

// event is a read of a marked file that waits for an answer.
type event struct {
	fd  int // of the file; its number names the event until it is answered
	off uint64
	n   uint64
	// ranged: off and n are known.
	ranged bool
}

const (
	eventSize = 24 // struct fanotify_event_metadata
	infoSize  = 4  // struct fanotify_event_info_header
	rangeSize = 24 // struct fanotify_event_info_range

	// eventBuffer is for one event with its range; two don't fit, so that a
	// worker never has an event which it isn't working on.
	eventBuffer = 2*(eventSize+rangeSize) - 1
)

var errMalformed = errors.New("event from the kernel is malformed")

// parseEvent parses the first event of b and returns what follows it.
func parseEvent(b []byte) (e event, rest []byte, err error) {
	ne := binary.NativeEndian
	if len(b) < eventSize {
		return e, nil, errMalformed
	}
	size, header := int(ne.Uint32(b)), int(ne.Uint16(b[6:]))
	if b[4] != unix.FANOTIFY_METADATA_VERSION || header < eventSize || size < header || size > len(b) {
		return e, nil, errMalformed
	}
	e.fd = int(int32(ne.Uint32(b[16:])))
	for info := b[header:size]; len(info) > 0; {
		if len(info) < infoSize {
			return e, nil, errMalformed
		}
		n := int(ne.Uint16(info[2:]))
		if n < infoSize || n > len(info) {
			return e, nil, errMalformed
		}
		if info[0] == unix.FAN_EVENT_INFO_TYPE_RANGE && n >= rangeSize {
			e.off, e.n, e.ranged = ne.Uint64(info[8:]), ne.Uint64(info[16:]), true
		}
		info = info[n:]
	}
	return e, b[size:], nil
}

const (
	allow = unix.FAN_ALLOW
	// deny makes the read fail with EIO.
	deny = unix.FAN_DENY | uint32(unix.EIO)<<24
)

// respond answers the event whose descriptor has the number fd. There may be
// none (ENOENT).
func respond(group, fd int, answer uint32) error {
	var msg [8]byte
	binary.NativeEndian.PutUint32(msg[0:], uint32(fd))
	binary.NativeEndian.PutUint32(msg[4:], answer)
	for {
		_, err := unix.Write(group, msg[:])
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// maxDescriptor is more than what a daemon's descriptors are numbered up to:
// the kernel gives the lowest number that is free.
const maxDescriptor = 1 << 16

// sweep denies all events that a process took and left without an answer, but
// for those in keep. Their readers ask again by themselves once, so they aren't
// refused. Without this they would wait for ever; worse, an answer to a later
// event whose descriptor has the same number would be taken for theirs.
func sweep(group int, keep map[int]bool) (denied int, err error) {
	for fd := range maxDescriptor {
		if keep[fd] {
			continue
		}
		err := respond(group, fd, deny)
		switch {
		case err == nil:
			denied++
		case !errors.Is(err, unix.ENOENT):
			return denied, fmt.Errorf("answer what the last daemon left: %w", err)
		}
	}
	return denied, nil
}

// drain denies all events that nobody has taken yet.
func drain(group int) error {
	var buf [eventBuffer]byte
	for {
		n, err := unix.Read(group, buf[:])
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("read fanotify events: %w", err)
		}
		for rest := buf[:n]; len(rest) > 0; {
			var e event
			if e, rest, err = parseEvent(rest); err != nil {
				return err
			}
			if e.fd >= 0 {
				err = respond(group, e.fd, deny)
				unix.Close(e.fd)
			}
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("answer a fanotify event: %w", err)
			}
		}
	}
}

// newGroup makes a fanotify group that is asked before content is read.
// An overflow of a bounded queue would let reads pass unasked.
func newGroup() (int, error) {
	group, err := unix.FanotifyInit(
		unix.FAN_CLASS_PRE_CONTENT|unix.FAN_UNLIMITED_QUEUE|unix.FAN_UNLIMITED_MARKS|unix.FAN_NONBLOCK|unix.FAN_CLOEXEC,
		unix.O_RDONLY|unix.O_LARGEFILE|unix.O_CLOEXEC)
	if err != nil {
		return -1, &plane.UnsupportedError{Reasons: []string{fmt.Sprintf("the kernel makes no fanotify group for pre-content events: %v", err)}}
	}
	return group, nil
}

// openMarked returns a directory through a mount of its own, detached from the
// tree, that is marked: what is opened through it, by nobody but the owner of
// the descriptor, asks the group before it is read. The mark lives as long as
// anything is open through the mount.
func openMarked(group int, dir string) (int, error) {
	tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("clone the mount of %s: %w", dir, err)
	}
	err = unix.FanotifyMark(group, unix.FAN_MARK_ADD|unix.FAN_MARK_MOUNT, unix.FAN_PRE_ACCESS, tree, ".")
	if err == nil {
		return tree, nil
	}
	unix.Close(tree)
	switch {
	case errors.Is(err, unix.EINVAL):
		return -1, &plane.UnsupportedError{Reasons: []string{"the kernel has no fanotify pre-content events, which need Linux 6.15 and CONFIG_FANOTIFY_ACCESS_PERMISSIONS"}}
	case errors.Is(err, unix.EOPNOTSUPP):
		return -1, &plane.UnsupportedError{Reasons: []string{fmt.Sprintf("the file system of %s has no fanotify pre-content events: it must be ext4, xfs or btrfs", dir)}}
	}
	return -1, fmt.Errorf("mark the mount of %s: %w", dir, err)
}

// markFile makes the reads of a file that was opened through a marked mount,
// whose group is gone, ask this group.
func markFile(group, file int) error {
	return unix.FanotifyMark(group, unix.FAN_MARK_ADD, unix.FAN_PRE_ACCESS, file, "")
}

// ignoreFile lets all reads of a file pass unasked, for ever.
func ignoreFile(group, file int) error {
	return unix.FanotifyMark(group, unix.FAN_MARK_ADD|unix.FAN_MARK_IGNORE_SURV, unix.FAN_PRE_ACCESS, file, "")
}
