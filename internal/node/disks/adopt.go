package disks

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"sluice/internal/node/plane"
)

// adopt supplies the content of all mounts that an earlier process left. A mount that
// lost its content is made anew: what runs on it already keeps failing, what starts on
// it works.
func (m *Manager) adopt(ctx context.Context) error {
	dirs, err := plane.MountsBelow(m.mountsDir())
	if err != nil {
		return fmt.Errorf("read the mount table: %w", err)
	}
	seen := make(map[string]bool)
	for _, dir := range dirs {
		if seen[dir] {
			continue // one over the other
		}
		seen[dir] = true
		if err := m.adoptOne(ctx, dir); err != nil {
			m.log.ErrorContext(ctx, "a mount of the last process can't be continued: containers on it get errors for content that isn't in memory, restart them", "mount", dir, "error", err)
		}
	}
	return nil
}

// adoptOne adopts the mount at a directory.
func (m *Manager) adoptOne(ctx context.Context, dir string) error {
	d := m.diskAt(dir)
	if d == nil {
		// A crash between unmounting and removing can't do that: somebody removed
		// what is stored, or it isn't what it was.
		return errors.Join(errors.New("no disk belongs to it"), plane.Unmount(dir, true))
	}
	if err := d.take(ctx); err != nil {
		return err
	}
	defer d.give()
	if err := d.open(ctx); err != nil {
		m.lose(d)
		return errors.Join(fmt.Errorf("disk %s: %w", d.Digest, err), plane.Unmount(dir, true))
	}
	layer, err := m.opts.Cache.Acquire(ctx, d.device, m.source(d), &d.meter)
	if err != nil {
		return cacheError(err)
	}
	m.mu.Lock()
	d.cached = layer
	m.mu.Unlock()
	err = m.opts.Plane.Adopt(ctx, d.planeImage(), d.point)
	if errors.Is(err, plane.ErrStale) {
		m.log.ErrorContext(ctx, "a mount lost its connection to this daemon: containers on it must be restarted", "disk", d.Digest, "mount", d.point, "error", err)
		err = m.opts.Plane.Attach(ctx, d.planeImage(), d.point)
	}
	if err != nil {
		m.release(d)
		return err
	}
	m.mu.Lock()
	d.attached = true
	m.mu.Unlock()
	return nil
}

// diskAt returns the disk that is mounted at a directory, or nil.
func (m *Manager) diskAt(dir string) *disk {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, d := range m.disks {
		if d.point == filepath.Clean(dir) {
			return d
		}
	}
	return nil
}
