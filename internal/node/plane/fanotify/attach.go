package fanotify

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/internal/book"
	"sluice/internal/node/plane/internal/supply"
)

// kernel implements book.Backend: devices are sparse files, their nodes inodes.
type kernel struct{ p *Plane }

// Make implements book.Backend.
func (k kernel) Make(s *supply.Supply, _ uint64) (node uint64, err error) {
	d, err := makeDevice(k.p.opts.Files, s)
	if err != nil {
		return 0, err
	}
	k.p.table.add(d)
	return d.inode, nil
}

// Restore implements book.Backend. A device whose file is gone stays safe: the
// kernel still asks about it, and is told that it is unknown.
func (k kernel) Restore(s *supply.Supply, node uint64) error {
	d, err := openDevice(k.p.opts.Files, s, node)
	if err != nil {
		k.p.log.Error("a device of the last process is lost", "device", s.Name, "error", err)
		return err
	}
	k.p.table.add(d)
	return nil
}

// Remove implements book.Backend. The inode lives on as long as somebody reads
// it, and can't be another device's before.
func (k kernel) Remove(node uint64) {
	d := k.p.table.remove(node)
	if d == nil {
		return
	}
	err := os.Remove(d.file.Name())
	if err = errors.Join(err, d.file.Close()); err != nil {
		k.p.log.Warn("cannot remove the file of a device", "device", d.Name, "error", err)
	}
}

// Mount implements book.Backend. EROFS opens the devices through a mount that
// nobody else has and that is marked already: there is no way to open them first
// and mark them later, which would show zeros.
func (k kernel) Mount(metadata string, devices []book.Device, dir string) error {
	tree, err := openMarked(k.p.server.fd, k.p.opts.Files)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	var paths []string
	for _, d := range devices {
		if d.File == "" {
			d.File = filepath.Join(fmt.Sprintf("/proc/self/fd/%d", tree), d.Name)
		}
		paths = append(paths, d.File)
	}
	return plane.MountEROFS(metadata, paths, dir)
}

// Lost implements book.Backend: this process has the group.
func (kernel) Lost() bool { return false }

// Attach implements plane.Plane.
func (p *Plane) Attach(ctx context.Context, img plane.Image, dir string) error {
	return p.book.Attach(ctx, img, dir)
}

// Adopt implements plane.Plane. A device that was attached with a Content may
// come with a File now: it is filled from that.
func (p *Plane) Adopt(ctx context.Context, img plane.Image, dir string) error {
	return p.book.Adopt(ctx, img, dir)
}

// Ready implements plane.Plane.
func (p *Plane) Ready() { p.book.Ready() }

// Detach implements plane.Plane.
func (p *Plane) Detach(ctx context.Context, dir string) error { return p.book.Detach(ctx, dir) }

// Mounted counts the images that a plane in dir has attached and that are still
// mounted; Adopt may go on with them. known reports whether there was one.
func Mounted(dir string) (images int, known bool, err error) { return book.Mounted(dir) }
