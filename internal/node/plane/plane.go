// Package plane gives images to the kernel: how a container reads bytes that
// are not on the machine yet.
//
// An image is one EROFS mount. Its metadata (names, modes, where each file's
// bytes lie) is a small local file; the bytes themselves are on devices, one or
// two per layer of the image. EROFS opens a device by path and reads it like a
// file (file-backed mounts, Linux 6.12; a loop device does it before), so a
// device can be
//
//   - a complete local file: nothing of ours is in the way of a read, or
//   - content that is fetched when it is read: a Plane makes a file of it whose
//     reads call Content.ReadAt.
//
// This package has what every plane shares: the vocabulary (Device, Image), the
// contract (Plane), the mount calls, and Probe, which tells what this machine
// can do. Package fuse is the plane for production; package fanotify is faster in
// one case and promises less; package local, for tests and as the oracle of the
// suite in planetest, copies all content first.
//
// # What a plane promises
//
//   - A read returns the content's bytes or fails with EIO. There is no state,
//     also while a daemon dies or comes back, in which bytes that were never
//     supplied can be read as zeros. (Package fanotify has one, and says so.)
//   - A read ends: every wait has a bound. A later read of what failed is a new
//     try.
//   - Mounts are read-only. They are made without nodev and nosuid: overlayfs
//     and bind mounts on top have their own flags, and a container's root file
//     system must be able to hold device nodes and set-user-ID programs. So the
//     directories that images are mounted on must be out of reach of other
//     users (a parent of mode 0700).
//   - Mounts are made in the caller's mount namespace and propagate as its
//     mounts do; a plane changes no propagation. Where a container runtime
//     lives in another namespace the directories have to be on a shared mount.
//
// Never map a file of a plane's mount into the memory of the process that
// serves it, neither by mmap(2) nor by executing it. A page fault may wait for
// content with the process's mmap_lock held; the first other thread that wants
// memory then stops, and with it all that would supply the content (seen in a
// test: not even ps can look at such a process). Besides, a goroutine in a page
// fault stops the garbage collector. Reading it with read(2) is fine.
package plane

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
)

// Content is the bytes of one device.
type Content interface {
	// ReadAt fills p with the content's bytes from off on. The plane asks
	// only for what lies inside the device's size, so anything short of
	// len(p) bytes comes with an error; io.EOF along with all of p is not
	// one. What ReadAt says was read has been verified: it goes to a
	// container. Reads are concurrent. They should end when ctx does, which
	// has a deadline; neither ctx nor p may be used after the return.
	ReadAt(ctx context.Context, p []byte, off int64) (n int, err error)
}

// Completer is a Content that knows whether all of it is on this machine: reading
// it takes no network then, as a rule. A plane may use it to get out of the way.
type Completer interface{ Complete() bool }

// Device is one device of an image.
type Device struct {
	// Name identifies the content: two devices of one name have the same
	// bytes, in all images and for ever ("sha256-<hex>" of the device key).
	// It becomes a file name: 1 to 255 bytes, no slash, no
	// dot in front.
	Name string
	// Size in bytes. The kernel reads zeros between it and the end of its
	// page.
	Size int64
	// Content supplies the bytes. Nil if File is set.
	Content Content
	// File is the path of a complete local file with the content. EROFS
	// then reads it directly, and it must stay as long as the mount. It
	// should be as long as Size rounded up to BlockSize, the rest zeros: the
	// last block of a file that ends inside it cannot be read by EROFS
	// (EIO, seen on Linux 6.18), so such a file goes the way of Content.
	File string
}

// BlockSize is the unit in which EROFS addresses devices.
const BlockSize = 512

// Direct reports whether EROFS can read d.File by itself to its end. It fails
// when the file is not there, or shorter than the device.
func (d Device) Direct() (bool, error) {
	info, err := os.Stat(d.File)
	if err != nil {
		return false, fmt.Errorf("device %s: %w", d.Name, err)
	}
	if info.Size() < d.Size {
		return false, fmt.Errorf("device %s: %s has %d of %d bytes", d.Name, d.File, info.Size(), d.Size)
	}
	return info.Size()%BlockSize == 0, nil
}

// FileContent is the Content in a complete local file.
type FileContent struct{ *os.File }

// Complete implements Completer.
func (c FileContent) Complete() bool { return true }

// ReadAt implements Content.
func (c FileContent) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return c.File.ReadAt(p, off)
}

// Image is what one mount is made of.
type Image struct {
	// Metadata is the path of a local EROFS file, checked by the caller
	// (erofs.FS.Check): the kernel parses it. It must not be on a stacked
	// file system such as overlayfs and has to stay as long as the mount.
	Metadata string
	// Devices in the order of the metadata's device table.
	Devices []Device
}

// Plane mounts images. All methods may be called concurrently.
type Plane interface {
	// Attach mounts img read-only on dir, an existing directory. It fails
	// with ErrAttached when an image is there already. A mount of this
	// plane that can only give EIO any more (see ErrStale) is replaced.
	//
	// When Attach has returned, the mount outlives the process; Adopt is
	// how its successor goes on. After an error nothing is mounted.
	Attach(ctx context.Context, img Image, dir string) error

	// Adopt supplies the content of an image which an earlier process
	// attached at dir and whose mount is still there. img must have the
	// same devices. It fails with ErrNotAttached when there is no such
	// mount, and with ErrStale when the mount is there but lost the
	// connection to its content for ever: Attach anew then.
	Adopt(ctx context.Context, img Image, dir string) error

	// Ready says that all adoptions are done. Until then a read of a device
	// without content waits for it (a bounded time); afterwards it fails.
	Ready()

	// Detach unmounts the image at dir. It fails with ErrBusy, and changes
	// nothing, when files of it are open or something is mounted over it;
	// and with ErrNotAttached when no image is there. When it has returned
	// nil none of the image's Contents is called any more.
	Detach(ctx context.Context, dir string) error

	// Close ends the process's part: no Content is called any more when it
	// returns. Mounts stay. Reads of what the kernel has not cached wait
	// for a successor, where the plane can have one, or fail.
	Close() error
}

var (
	// ErrBusy: the mount is in use.
	ErrBusy = errors.New("mount is in use")
	// ErrAttached: something is mounted on the directory.
	ErrAttached = errors.New("an image is already mounted here")
	// ErrNotAttached: no image of this plane is mounted on the directory.
	ErrNotAttached = errors.New("no image is mounted here")
	// ErrStale: the mount exists, but what connected it to its content is
	// gone (the machine's holder process was killed along with the daemon,
	// or the connection was aborted). Every read through it that the kernel
	// has not cached fails with EIO, for ever; only a new mount helps.
	ErrStale = errors.New("mount lost its content for ever")
)

// UnsupportedError says that this machine cannot do what a plane needs. The
// ordinary pull is what works here.
type UnsupportedError struct {
	// Reasons in words for people, each by itself sufficient.
	Reasons []string
}

func (e *UnsupportedError) Error() string {
	return "artifact streaming is not possible on this machine: " + strings.Join(e.Reasons, "; ")
}

// MaxDevices is the most devices an image may have: the device table of EROFS
// counts them in 16 bits and 0 means the metadata itself.
const MaxDevices = 65535

// Direct reports whether every device is a local file, so that nothing of ours
// is in the way of a read.
func (img Image) Direct() bool {
	for _, d := range img.Devices {
		if d.File == "" {
			return false
		}
	}
	return true
}

// Check tells what is wrong with img, without looking at any file.
func (img Image) Check() error {
	if img.Metadata == "" {
		return errors.New("image has no metadata file")
	}
	if len(img.Devices) > MaxDevices {
		return fmt.Errorf("image has %d devices, EROFS can have %d", len(img.Devices), MaxDevices)
	}
	sizes := make(map[string]int64, len(img.Devices))
	for i, d := range img.Devices {
		if err := d.check(); err != nil {
			return fmt.Errorf("device %d: %w", i, err)
		}
		if size, ok := sizes[d.Name]; ok && size != d.Size {
			return fmt.Errorf("device %d: %s has two sizes, %d and %d", i, d.Name, size, d.Size)
		}
		sizes[d.Name] = d.Size
	}
	return nil
}

func (d Device) check() error {
	switch {
	case d.Name == "" || d.Name[0] == '.':
		return fmt.Errorf("%q is not a name for a device: it is empty or begins with a dot", d.Name)
	case len(d.Name) > 255:
		return fmt.Errorf("name of %d bytes is too long, the limit is 255", len(d.Name))
	case strings.ContainsAny(d.Name, "/\x00"):
		return fmt.Errorf("name %q has a slash or a zero byte in it", d.Name)
	case d.Size < 0:
		return fmt.Errorf("%s: negative size %d", d.Name, d.Size)
	case (d.Content == nil) == (d.File == ""):
		return fmt.Errorf("%s: exactly one of Content and File must be set", d.Name)
	}
	return nil
}
