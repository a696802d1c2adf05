// Package book keeps what a plane has attached: which image is mounted where,
// which devices the kernel knows, and who supplies their bytes. It is the part of
// plane.Plane which doesn't depend on how the kernel asks for the bytes; that is
// the Backend's.
//
//	DIR/state.json   what a successor has to know
package book

import (
	"context"
	"os"
	"sort"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/internal/supply"
)

// Backend makes devices that the kernel can read. Its methods are called one at
// a time.
type Backend interface {
	// Make makes a device. node tells it from all other devices that the
	// kernel knows, and from those of the past that it may still know; next is
	// above all nodes that Make returned on this connection.
	Make(s *supply.Supply, next uint64) (node uint64, err error)
	// Restore goes on with a device that an earlier process made.
	Restore(s *supply.Supply, node uint64) error
	// Remove takes away a device that no image has. Reads of it may be under
	// way.
	Remove(node uint64)
	// Mount mounts an image.
	Mount(metadata string, devices []Device, dir string) error
	// Lost reports whether the connection with the kernel has ended: nothing
	// can be attached or adopted any more.
	Lost() bool
}

// Device is one device of an image that is to be mounted.
type Device struct {
	Name string // of a device that the backend made
	File string // if not empty, a complete local file instead
}

// Book implements Attach, Adopt, Ready and Detach of plane.Plane.
type Book struct {
	dir     string
	first   uint64
	backend Backend

	// turn holds one token; who has it may change what follows. It comes
	// before the mutexes of supplies and of the backend.
	turn    chan struct{}
	state   state
	lost    bool               // the state: what is mounted isn't in it
	images  map[string]*image  // with content, by directory
	devices map[string]*device // that the kernel knows, by name
	closed  bool
}

// device is one that the backend made.
type device struct {
	*supply.Supply
	node uint64
}

// image is an attached or adopted image.
type image struct{ uses []use }

// use is one image's content of one device.
type use struct {
	device *device
	source *supply.Source
}

// New returns the book in dir. first is the least number of a node. Load and Open
// have to follow.
func New(dir string, first uint64, backend Backend) *Book {
	return &Book{
		dir: dir, first: first, backend: backend, turn: make(chan struct{}, 1),
		state:  state{Version: stateVersion, NextNode: first},
		images: map[string]*image{}, devices: map[string]*device{},
	}
}

// Mounted counts the images which the book in dir has and that are mounted,
// without opening it. known is false if there's no book.
func Mounted(dir string) (images int, known bool, err error) {
	s, err := loadState(dir, 1)
	if err != nil {
		return 0, true, err
	}
	for at, img := range s.Images {
		m, err := plane.MountAt(at)
		if err != nil {
			return 0, true, err
		}
		if m != nil && m.FSType == "erofs" && len(img.Devices) > 0 && img.Epoch == s.Epoch {
			images++
		}
	}
	return images, s.Epoch != "", nil
}

// Load reads what an earlier process wrote and returns the epoch of its
// connection with the kernel; empty if there was none. After an error the book
// is empty.
func (b *Book) Load() (epoch string, err error) {
	s, err := loadState(b.dir, b.first)
	b.lost = s.Epoch == ""
	if err != nil {
		return "", err
	}
	b.state = s
	return s.Epoch, nil
}

// Begin begins anew, on another connection. What was attached before is stale.
func (b *Book) Begin(epoch string) error {
	b.state = state{Version: stateVersion, Epoch: epoch, NextNode: b.first, Images: b.state.Images}
	return b.state.save(b.dir)
}

// Open restores the devices of the images that are still mounted, and lets the
// book be used. images can be adopted; stale ones lost their content for ever.
func (b *Book) Open() (images, stale []string, err error) {
	broken, err := b.restore()
	if err != nil {
		return nil, nil, err
	}
	if b.state.Images == nil {
		b.state.Images = map[string]imageState{}
	}
	for dir, img := range b.state.Images {
		m, err := plane.MountAt(dir)
		if err != nil {
			return nil, nil, err
		}
		for _, name := range img.Devices {
			if broken[name] {
				img.Epoch = "" // of no connection
				b.state.Images[dir] = img
			}
		}
		switch {
		case m == nil || m.FSType != "erofs":
			delete(b.state.Images, dir)
		case b.stale(img):
			stale = append(stale, dir)
		default:
			images = append(images, dir)
		}
	}
	sort.Strings(stale)
	sort.Strings(images)
	b.forget()
	if err := b.state.save(b.dir); err != nil {
		return nil, nil, err
	}
	b.turn <- struct{}{}
	return images, stale, nil
}

// restore restores the devices of the state. Those that can't be are broken.
func (b *Book) restore() (broken map[string]bool, err error) {
	broken = map[string]bool{}
	for _, d := range b.state.Devices {
		dev := &device{supply.New(d.Name, d.Size, false), d.Node}
		if err := b.backend.Restore(dev.Supply, dev.node); err != nil {
			broken[d.Name] = true
			continue
		}
		b.devices[d.Name] = dev
	}
	return broken, nil
}

func (b *Book) stale(img imageState) bool {
	return img.Epoch != b.state.Epoch && len(img.Devices) > 0
}

// Take waits for the turn, without which nothing changes until Give. It fails
// with os.ErrClosed after Close.
func (b *Book) Take(ctx context.Context) error {
	select {
	case <-b.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	if b.closed {
		b.turn <- struct{}{}
		return os.ErrClosed
	}
	return nil
}

// Give ends the turn.
func (b *Book) Give() { b.turn <- struct{}{} }

// Attached returns a directory where an image is attached that can be read, if
// there is one. The caller has the turn.
func (b *Book) Attached() (dir string, ok bool) {
	for dir, img := range b.state.Images {
		if len(img.Devices) > 0 && !b.stale(img) {
			return dir, true
		}
	}
	return "", false
}

// Close closes the files of content, which nobody may read any more. The caller
// has the turn; no other will.
func (b *Book) Close() {
	b.closed = true
	for _, img := range b.images {
		img.close()
	}
}

// Erase removes the state of a closed book.
func (b *Book) Erase() error { return eraseState(b.dir) }
