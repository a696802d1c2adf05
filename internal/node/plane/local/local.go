// Package local is the plane that a reader understands at a glance: attaching
// copies all content to local files, which EROFS then reads by itself. Nothing
// is lazy. It shows what reading through any plane must look like, and serves
// tests that need images mounted but not streamed.
package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"sluice/internal/node/plane"
)

// Plane keeps complete devices in a directory. It implements plane.Plane.
type Plane struct {
	dir string

	mu     sync.Mutex          // held during whole calls; of what follows
	images map[string][]string // names of the copied devices, by mount directory
	users  map[string]int      // images that have a copied device, by name
}

var _ plane.Plane = (*Plane)(nil)

// New returns a plane with its devices in dir, which must exist and belong to
// the plane alone.
func New(dir string) *Plane {
	return &Plane{dir: dir, images: map[string][]string{}, users: map[string]int{}}
}

// Attach implements plane.Plane. It takes as long as reading all content does,
// and fails if that does.
func (p *Plane) Attach(ctx context.Context, img plane.Image, dir string) error {
	return p.enter(img, dir, func(dir string) error {
		m, err := plane.MountAt(dir)
		if err != nil {
			return err
		}
		if m != nil {
			return fmt.Errorf("%w (%s)", plane.ErrAttached, m.FSType)
		}
		names, paths, err := p.copyDevices(ctx, img)
		if err == nil {
			err = plane.MountEROFS(img.Metadata, paths, dir)
		}
		if err != nil {
			p.drop(names)
			return err
		}
		p.images[dir] = names
		return nil
	})
}

// Adopt implements plane.Plane. The mount has all it needs, so only the books
// are kept.
func (p *Plane) Adopt(_ context.Context, img plane.Image, dir string) error {
	return p.enter(img, dir, func(dir string) error {
		m, err := plane.MountAt(dir)
		if err != nil {
			return err
		}
		if m == nil || m.FSType != "erofs" {
			return plane.ErrNotAttached
		}
		if _, ok := p.images[dir]; ok {
			return plane.ErrAttached
		}
		var names []string
		for _, d := range img.Devices {
			if d.File != "" {
				if direct, err := d.Direct(); err != nil || direct {
					continue
				}
			}
			if info, err := os.Stat(p.path(d.Name)); err != nil || info.Size() != roundUp(d.Size) {
				return fmt.Errorf("device %s is not here: %w", d.Name, plane.ErrNotAttached)
			}
			names = append(names, d.Name)
		}
		for _, name := range names {
			p.users[name]++
		}
		p.images[dir] = names
		return nil
	})
}

func (p *Plane) enter(img plane.Image, dir string, do func(dir string) error) error {
	if err := img.Check(); err != nil {
		return fmt.Errorf("image at %s: %w", dir, err)
	}
	clean, err := plane.CleanDir(dir)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := do(clean); err != nil {
		return fmt.Errorf("image at %s: %w", dir, err)
	}
	return nil
}

func (p *Plane) path(name string) string { return filepath.Join(p.dir, name) }

// copyDevices makes files of what has none yet. names are to be dropped, also
// after an error.
func (p *Plane) copyDevices(ctx context.Context, img plane.Image) (names, paths []string, err error) {
	for _, d := range img.Devices {
		direct := false
		if d.File != "" {
			if direct, err = d.Direct(); err != nil {
				return names, nil, err
			}
		}
		if direct {
			paths = append(paths, d.File)
			continue
		}
		p.users[d.Name]++
		names = append(names, d.Name)
		paths = append(paths, p.path(d.Name))
		if p.users[d.Name] > 1 {
			continue
		}
		if err := copyDevice(ctx, d, p.path(d.Name)); err != nil {
			return names, nil, fmt.Errorf("copy device %s: %w", d.Name, err)
		}
	}
	return names, paths, nil
}

func copyDevice(ctx context.Context, d plane.Device, name string) error {
	content := d.Content
	if d.File != "" {
		f, err := os.Open(d.File)
		if err != nil {
			return err
		}
		defer f.Close()
		content = plane.FileContent{File: f}
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < d.Size; {
		b := buf[:min(int64(len(buf)), d.Size-off)]
		n, err := content.ReadAt(ctx, b, off)
		if n < len(b) {
			return errors.Join(err, io.ErrUnexpectedEOF)
		}
		if _, err := f.Write(b); err != nil {
			return err
		}
		off += int64(n)
	}
	if err := f.Truncate(roundUp(d.Size)); err != nil {
		return err
	}
	return f.Close()
}

// roundUp to whole blocks, see plane.Device.File.
func roundUp(size int64) int64 {
	return (size + plane.BlockSize - 1) / plane.BlockSize * plane.BlockSize
}

func (p *Plane) drop(names []string) {
	for _, name := range names {
		if p.users[name]--; p.users[name] == 0 {
			delete(p.users, name)
			os.Remove(p.path(name))
		}
	}
}

// Ready implements plane.Plane; nothing waits here.
func (p *Plane) Ready() {}

// Detach implements plane.Plane.
func (p *Plane) Detach(_ context.Context, dir string) error {
	clean, err := plane.CleanDir(dir)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := plane.Unmount(clean, false); err != nil {
		return err
	}
	p.drop(p.images[clean])
	delete(p.images, clean)
	return nil
}

// Close implements plane.Plane.
func (p *Plane) Close() error { return nil }
