package fanotify

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane/internal/supply"
)

// device is one sparse file.
type device struct {
	*supply.Supply
	file  *os.File // not through a marked mount: what is done with it asks nobody
	inode uint64

	// filled has a bit for each page that this process wrote into the file.
	// What an earlier one wrote isn't known, and written again.
	filled  []atomic.Uint64
	left    atomic.Int64 // pages that aren't filled
	copying atomic.Bool  // the copier is at it
}

var pageSize = int64(os.Getpagesize())

// makeDevice makes the file of a device in dir. All the space that it will ever
// need is allocated now, so that no read fails for want of it later.
func makeDevice(dir string, s *supply.Supply) (*device, error) {
	f, err := os.OpenFile(filepath.Join(dir, s.Name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if n := s.KernelSize(); n > 0 {
		err = allocate(f, n)
	}
	d, err := newDevice(f, s, err)
	if err != nil {
		os.Remove(f.Name())
		return nil, fmt.Errorf("make the file of device %s: %w", s.Name, err)
	}
	return d, nil
}

func allocate(f *os.File, n int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, 0, n)
		if err != unix.EINTR {
			return os.NewSyscallError("fallocate", err)
		}
	}
}

// openDevice opens the file that an earlier process made.
func openDevice(dir string, s *supply.Supply, inode uint64) (*device, error) {
	f, err := os.OpenFile(filepath.Join(dir, s.Name), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	d, err := newDevice(f, s, nil)
	if err != nil {
		return nil, err
	}
	if d.inode != inode {
		f.Close()
		return nil, fmt.Errorf("%s was replaced by another file", f.Name())
	}
	return d, nil
}

// newDevice takes f over, also after an error.
func newDevice(f *os.File, s *supply.Supply, err error) (*device, error) {
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstat(int(f.Fd()), &st)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	pages := s.KernelSize() / pageSize
	d := &device{Supply: s, file: f, inode: st.Ino, filled: make([]atomic.Uint64, (pages+63)/64)}
	d.left.Store(pages)
	return d, nil
}

func (d *device) has(page int64) bool { return d.filled[page/64].Load()&(1<<(page%64)) != 0 }

// missing narrows the bytes from off to end, borders of pages, to those from the
// first page that isn't filled to the last.
func (d *device) missing(off, end int64) (int64, int64) {
	for off < end && d.has(off/pageSize) {
		off += pageSize
	}
	for off < end && d.has(end/pageSize-1) {
		end -= pageSize
	}
	return off, end
}

// write puts verified bytes into the file: whole pages. It reports whether the
// file is complete by that.
func (d *device) write(p []byte, off int64) (complete bool, err error) {
	if _, err := d.file.WriteAt(p, off); err != nil {
		return false, err
	}
	for page := off / pageSize; page < (off+int64(len(p)))/pageSize; page++ {
		bit := uint64(1) << (page % 64)
		if d.filled[page/64].Or(bit)&bit == 0 && d.left.Add(-1) == 0 {
			complete = true
		}
	}
	return complete, nil
}

// table finds devices by inode.
type table struct {
	mu      sync.RWMutex // of the map
	byInode map[uint64]*device
}

func newTable() *table { return &table{byInode: map[uint64]*device{}} }

func (t *table) inode(n uint64) *device {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byInode[n]
}

func (t *table) add(d *device) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.byInode[d.inode] = d
}

func (t *table) remove(n uint64) *device {
	t.mu.Lock()
	defer t.mu.Unlock()
	d := t.byInode[n]
	delete(t.byInode, n)
	return d
}

func (t *table) all() []*device {
	t.mu.RLock()
	defer t.mu.RUnlock()
	list := make([]*device, 0, len(t.byInode))
	for _, d := range t.byInode {
		list = append(list, d)
	}
	return list
}
