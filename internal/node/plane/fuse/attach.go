package fuse

import (
	"context"
	"path/filepath"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/internal/book"
	"sluice/internal/node/plane/internal/supply"
)

// kernel implements book.Backend: devices are files of the FUSE mount.
type kernel struct{ p *Plane }

// Make implements book.Backend: the kernel comes for the device when EROFS
// opens it (LOOKUP, OPEN).
func (k kernel) Make(s *supply.Supply, next uint64) (node uint64, err error) {
	return next, k.Restore(s, next)
}

// Restore implements book.Backend.
func (k kernel) Restore(s *supply.Supply, node uint64) error {
	k.p.table.add(&device{s, node})
	return nil
}

// Remove implements book.Backend.
func (k kernel) Remove(node uint64) {
	if d := k.p.table.node(node); d != nil {
		k.p.table.remove(d)
	}
}

// Mount implements book.Backend. The mount's readahead, which stays within a
// file, is the kernel's default.
func (k kernel) Mount(metadata string, devices []book.Device, dir string) error {
	var paths, options []string
	for _, d := range devices {
		if d.File == "" {
			d.File = filepath.Join(k.p.blobs(), d.Name)
		}
		paths = append(paths, d.File)
	}
	if err := k.p.conn.show(); err != nil {
		return err
	}
	if k.p.opts.Mode == plane.Loop {
		return plane.MountEROFSLoop(metadata, paths, dir)
	}
	if k.p.opts.DirectIO {
		options = append(options, "directio")
	}
	return plane.MountEROFS(metadata, paths, dir, options...)
}

// Lost implements book.Backend.
func (k kernel) Lost() bool {
	select {
	case <-k.p.server.lost:
		return true
	default:
		return false
	}
}

// Attach implements plane.Plane.
func (p *Plane) Attach(ctx context.Context, img plane.Image, dir string) error {
	return p.book.Attach(ctx, img, dir)
}

// Adopt implements plane.Plane. A device that was attached with a Content may
// come with a File now: its reads still come here, and are answered from it.
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
