package mount

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"

	"sluice/internal/node/plane"
)

// adopt supplies the content of all mounts that an earlier process left. A
// mount that lost its content is made anew: what runs on it already keeps
// failing, what starts on it works.
func (m *Manager) adopt(ctx context.Context) error {
	root := m.mountsDir() + string(filepath.Separator)
	mounts, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(i.Mountpoint, root), false
	})
	if err != nil {
		return fmt.Errorf("read the mount table: %w", err)
	}
	dirs := make(map[string]bool)
	for _, i := range mounts {
		dirs[filepath.Base(i.Mountpoint)] = true
	}
	for name := range dirs {
		if err := m.adoptOne(ctx, name); err != nil {
			m.log.ErrorContext(ctx, "a mount of the last process can't be continued: containers on it get errors for content that isn't in memory, restart them", "mount", name, "error", err)
		}
	}
	return nil
}

// adoptOne adopts the mount in the directory name beneath mountsDir.
func (m *Manager) adoptOne(ctx context.Context, name string) error {
	img, p := m.pointNamed(name)
	if img == nil {
		// Its image is gone: a crash between detaching and removing can't do
		// that, so somebody removed the image's directory.
		err := fmt.Errorf("no image belongs to it")
		return errors.Join(err, plane.Unmount(filepath.Join(m.mountsDir(), name), true))
	}
	pi, layers, err := m.planeImage(ctx, img, p.part)
	if err != nil {
		return err
	}
	err = m.opts.Plane.Adopt(ctx, pi, p.dir)
	if errors.Is(err, plane.ErrStale) {
		m.log.ErrorContext(ctx, "a mount lost its connection to this daemon: containers on it must be restarted", "image", img.id, "mount", p.dir, "error", err)
		err = m.opts.Plane.Attach(ctx, pi, p.dir)
	}
	if err != nil {
		for _, l := range layers {
			l.Release()
		}
		return err
	}
	m.setAttached(p, layers, false) // for all that can be told
	return nil
}

// pointNamed returns the point whose directory has the name, or nil.
func (m *Manager) pointNamed(name string) (*image, *point) {
	dir, part, ok := pointOf(name)
	if !ok {
		return nil, nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, img := range m.images {
		if img.mount == dir && (part == Merged || int(part) < len(img.manifest.Layers)) {
			return img, m.pointFor(img, part)
		}
	}
	return nil, nil
}
