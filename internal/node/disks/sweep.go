package disks

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sluice/internal/durable"
	"sluice/internal/node/cache"
	"sluice/internal/node/plane"
	"sluice/oci"
)

// sweepLoop removes what nobody owns, every so often.
func (m *Manager) sweepLoop(ctx context.Context) {
	tick := time.NewTicker(max(m.opts.Linger/4, 50*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			m.Sweep(ctx, time.Now().Add(-m.opts.Linger))
		}
	}
}

// Sweep unmounts what had no owner since before, and removes the images that nobody
// held or used since then, with the disks that no other image has. It does nothing
// until Settled was called.
func (m *Manager) Sweep(ctx context.Context, before time.Time) {
	m.sweep(ctx, func(d *disk) bool { return d.used.Before(before) }, func(img *image) bool { return img.used.Before(before) })
}

// Collect is Sweep of the images that were held and aren't any more, or of the layers
// of them, however short that is ago: for callers who know that nobody wants them
// back.
func (m *Manager) Collect(ctx context.Context) {
	m.sweep(ctx, func(d *disk) bool { return !m.isWanted(d) }, func(img *image) bool { return img.removed })
}

// sweep unmounts the disks that nobody uses and that may be unmounted, removes the
// images that nobody has and that may go, and then the disks and the content that no
// image needs. What is asked is asked with m.mu.
func (m *Manager) sweep(ctx context.Context, unmount func(*disk) bool, remove func(*image) bool) {
	m.mu.Lock()
	if !m.settled {
		m.mu.Unlock()
		return
	}
	now := time.Now()
	for s, c := range m.calls {
		if c.over(now) {
			delete(m.calls, s)
		}
	}
	disks := m.allDisks()
	m.mu.Unlock()
	for _, d := range disks {
		m.sweepMount(ctx, d, unmount)
	}
	m.sweepImages(ctx, remove)
	for _, d := range disks {
		m.sweepDisk(d)
	}
	m.sweepFiles()
	m.mu.Lock()
	repos := m.dropRepos()
	m.mu.Unlock()
	if err := closeAll(repos); err != nil {
		m.log.WarnContext(ctx, "a share of which nothing is needed any more stays connected", "error", err)
	}
}

// isNeeded reports whether an image has the disk. The caller has m.mu.
func (m *Manager) isNeeded(d *disk) bool {
	for _, img := range m.images {
		if slices.Contains(img.disks, d) {
			return true
		}
	}
	return false
}

// isWanted reports whether somebody may read the disk as a layer of an image. The
// caller has m.mu.
func (m *Manager) isWanted(d *disk) bool {
	for _, img := range m.images {
		if slices.Contains(img.disks[:img.needed()], d) {
			return true
		}
	}
	return false
}

// needs returns what this node's images want of the cache's layers.
func (m *Manager) needs() map[oci.Digest]cache.Need {
	m.mu.Lock()
	defer m.mu.Unlock()
	needs := make(map[oci.Digest]cache.Need)
	for _, img := range m.images {
		for _, d := range img.disks[:img.needed()] {
			if d.device != nil {
				needs[d.device.Key] = cache.Needed
			}
		}
	}
	return needs
}

// idle takes the lock of a disk that nobody uses, if nobody has that.
func (m *Manager) idle(d *disk, may func(*disk) bool) bool {
	select {
	case <-d.lock:
	default:
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(d.owners) == 0 && d.using == 0 && may(d) {
		return true
	}
	d.give()
	return false
}

// sweepMount unmounts a disk that nobody uses, if it may be.
func (m *Manager) sweepMount(ctx context.Context, d *disk, may func(*disk) bool) {
	if !m.idle(d, func(d *disk) bool { return d.attached && may(d) }) {
		return
	}
	defer d.give()
	err := plane.CheckUnused(d.point)
	if err == nil {
		err = m.detach(ctx, d)
	}
	switch {
	case errors.Is(err, plane.ErrBusy):
		m.log.InfoContext(ctx, "a mount that nobody owns is still in use", "disk", d.Digest, "mount", d.point, "error", err)
		m.mu.Lock()
		d.used = time.Now()
		m.mu.Unlock()
	case err != nil:
		m.log.WarnContext(ctx, "a mount that nobody owns stays", "disk", d.Digest, "mount", d.point, "error", err)
	}
}

// sweepImages removes the images that nobody has, if they may go.
func (m *Manager) sweepImages(ctx context.Context, may func(*image) bool) {
	m.files.Lock()
	defer m.files.Unlock()
	var gone []*image
	m.mu.Lock()
	for _, img := range m.images {
		busy := img.kept > 0 || slices.ContainsFunc(img.disks, func(d *disk) bool { return d.ownedFor(img.id) || d.using > 0 })
		if len(img.holders) == 0 && !busy && may(img) {
			m.forget(img)
			gone = append(gone, img)
		}
	}
	for _, img := range gone {
		for _, d := range img.disks {
			m.resetPlaces(d)
		}
	}
	m.mu.Unlock()
	for _, img := range gone {
		err := durable.Remove(m.fileName(img.id, recordSuffix)) // its config goes with sweepFiles
		m.log.InfoContext(ctx, "image is removed", "image", img.id)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			m.log.WarnContext(ctx, "a removed image's record stays", "image", img.id, "error", err)
		}
	}
}

// resetPlaces leaves a disk the places that images know of. The caller has m.mu.
func (m *Manager) resetPlaces(d *disk) {
	d.places = nil
	for _, img := range m.images {
		for i, has := range img.disks {
			for _, o := range slices.Backward(img.origins) {
				if has == d {
					d.addPlace(place{m.repoOf(o.repo()), o.Paths[i]})
				}
			}
		}
	}
}

// sweepDisk removes a disk that no image has, or the content of one that nobody may
// read.
func (m *Manager) sweepDisk(d *disk) {
	if !m.idle(d, func(d *disk) bool { return !d.attached && !m.isWanted(d) }) {
		return
	}
	defer d.give()
	m.release(d) // of a mount that failed
	m.files.Lock()
	defer m.files.Unlock()
	m.mu.Lock()
	gone := !m.isNeeded(d) && d.using == 0
	if gone && m.disks[d.content] == d {
		delete(m.disks, d.content)
	}
	dev := d.device
	m.mu.Unlock()
	if dev != nil {
		m.opts.Cache.Remove(dev.Key)
	}
	if gone {
		if err := removeDir(d.dir); err != nil {
			m.log.Warn("a removed disk's files stay", "directory", d.dir, "error", err)
		}
	}
}

// removeDir removes a directory: first its name, so that a crash leaves nothing that
// looks like it.
func removeDir(dir string) error {
	trash := filepath.Join(filepath.Dir(dir), durable.TempPrefix+filepath.Base(dir))
	err := os.RemoveAll(trash)
	if err == nil {
		err = os.Rename(dir, trash)
	}
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, os.RemoveAll(trash))
}

// sweepFiles removes the files of images and disks that aren't known: what a crash
// left, and what is of images that aren't whole.
func (m *Manager) sweepFiles() {
	m.files.Lock()
	defer m.files.Unlock()
	known := make(map[string]bool)
	m.mu.Lock()
	for id := range m.images {
		known[id.Encoded()] = true
	}
	for _, d := range m.disks {
		known[filepath.Base(d.dir)] = true
	}
	m.mu.Unlock()
	for _, dir := range []string{m.imagesDir(), m.disksDir()} {
		entries, err := os.ReadDir(dir)
		for _, e := range entries {
			stem, _, _ := strings.Cut(e.Name(), ".")
			if known[stem] || durable.IsTemp(e.Name()) {
				continue
			}
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
		if err != nil {
			m.log.Warn("what belongs to no image stays", "directory", dir, "error", err)
		}
	}
}
