package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"sluice/internal/durable"
)

// The files of a cached layer, in a directory named after its device key.
const (
	dataFile       = "data"       // the device, sparse: a chunk that isn't there yet is a hole
	stateFile      = "state"      // which chunks data has
	completeFile   = "complete"   // exists when all of data has been checked against the diff ID
	quarantineFile = "quarantine" // exists, with the reason, when that check failed
)

// open opens what an earlier process left. An error that isn't passing means
// that it is to be discarded.
func (c *content) open() (err error) {
	if c.state, err = openFile(filepath.Join(c.dir, stateFile)); err != nil {
		return err
	}
	if c.data, err = openFile(filepath.Join(c.dir, dataFile)); err != nil {
		return err
	}
	info, err := c.data.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() != c.size {
		return fmt.Errorf("data file is a %v of %d bytes, want a file of %d", info.Mode().Type(), info.Size(), c.size)
	}
	file := make([]byte, c.fileSize())
	if info, err := c.state.Stat(); err != nil || info.Size() != c.fileSize() {
		return fmt.Errorf("state file doesn't have the %d bytes it should have", c.fileSize())
	}
	if _, err := c.state.ReadAt(file, 0); err != nil {
		return err
	}
	known, damaged, err := c.parse(file)
	if err != nil {
		return err
	}
	if damaged > 0 {
		c.log.Warn("some entries of a cached layer's state are damaged; their chunks will be fetched again", "damaged", damaged)
	}
	bits := uint32(claimed)
	if c.readComplete() {
		if len(known) != c.count {
			return fmt.Errorf("marked complete, but only %d of %d chunks are recorded", len(known), c.count)
		}
		c.complete.Store(true)
		bits = present | claimed
	}
	for _, k := range known {
		c.crcs[k.chunk].Store(k.crc)
		c.chunks[k.chunk].Store(bits)
	}
	c.stored.Store(allocated(c.data))
	return nil
}

// openFile opens a file for reading and writing; only for reading where the
// file system has become read-only, as ext4 does after errors.
func openFile(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if errors.Is(err, unix.EROFS) {
		return os.Open(name)
	}
	return f, err
}

// readComplete reports whether the marker of a complete layer is there, and
// is this layer's.
func (c *content) readComplete() bool {
	b, err := durable.ReadFile(filepath.Join(c.dir, completeFile), 1<<10)
	return err == nil && string(b) == c.completeMark()
}

func (c *content) completeMark() string { return c.key.String() + "\n" }

// create makes the layer's files, empty, in place of any that are there. It
// doesn't wait for the disk: a container that starts may be waiting, for many
// layers. What a loss of power leaves of that is nothing, or files that claim
// nothing, or such that are found not to be right.
func (c *content) create() error {
	c.closeFiles()
	if err := discard(c.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	const fresh = os.O_RDWR | os.O_CREATE | os.O_EXCL
	var err error
	if c.data, err = os.OpenFile(filepath.Join(c.dir, dataFile), fresh, 0o600); err != nil {
		return err
	}
	if err := c.data.Truncate(c.size); err != nil {
		return err
	}
	// The state file is written whole, so that recording a chunk never needs
	// space.
	if c.state, err = os.OpenFile(filepath.Join(c.dir, stateFile), fresh, 0o600); err != nil {
		return err
	}
	_, err = c.state.Write(c.emptyState())
	return err
}

// syncNames makes the names of the layer's files durable, once. Whoever says
// that something is durable calls it. flushing is held.
func (c *content) syncNames() error {
	if c.named {
		return nil
	}
	if err := errors.Join(durable.SyncDir(c.dir), durable.SyncDir(filepath.Dir(c.dir))); err != nil {
		return err
	}
	c.named = true
	return nil
}

// discard removes a layer's directory so that a crash leaves none or all of
// it under its name.
func discard(dir string) error {
	trash := filepath.Join(filepath.Dir(dir), durable.TempPrefix+filepath.Base(dir))
	if err := os.RemoveAll(trash); err != nil {
		return err
	}
	if err := durable.Rename(dir, trash); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.RemoveAll(trash)
}

// passing reports whether an error of opening files says nothing about them.
func passing(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EINTR, unix.EACCES, unix.EPERM, unix.EROFS} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// allocated returns how many bytes of disk f has.
func allocated(f *os.File) int64 {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

func fdatasync(f *os.File) error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); err != unix.EINTR {
			return err
		}
	}
}

func (c *content) closeFiles() {
	for _, f := range []*os.File{c.data, c.state, c.recent} {
		if f != nil {
			f.Close() // what matters has been synced
		}
	}
}
