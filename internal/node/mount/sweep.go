package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"sluice/internal/durable"
	"sluice/internal/node/cache"
	"sluice/internal/node/plane"
	"sluice/oci"
)

// sweepLoop collects what nobody owns, every so often.
func (m *Manager) sweepLoop(ctx context.Context) {
	interval := max(m.opts.Linger/4, 50*time.Millisecond)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			m.sweepClaims(ctx)
			m.Sweep(ctx, time.Now().Add(-m.opts.Linger))
			m.noteEvicted(ctx)
			m.forgetDevices()
			m.resumeFills(ctx)
		}
	}
}

// Sweep unmounts what had no owner since before, and removes the images that
// nobody held or used since then, with their content. It does nothing until
// Settled was called.
func (m *Manager) Sweep(ctx context.Context, before time.Time) {
	m.sweepMounts(ctx, unusedSince(before))
	m.sweepImages(ctx, unusedSince(before))
}

// SweepMounts is Sweep without removing images.
func (m *Manager) SweepMounts(ctx context.Context, before time.Time) {
	m.sweepMounts(ctx, unusedSince(before))
}

// Collect is Sweep of the images that were held and aren't any more, or of the
// layers of them, however short that is ago: for callers who know that nobody
// wants them back. When containerd has removed an image, kubelet looks at the
// disk at once.
func (m *Manager) Collect(ctx context.Context) {
	removed := func(img *image, _ time.Time) bool { return img.removed }
	m.sweepMounts(ctx, removed)
	m.sweepImages(ctx, removed)
}

// idle says of an image, or of a mount of it, that was last used at a time and
// has no owner, whether it may go. The caller has m.mu.
type idle func(img *image, used time.Time) bool

func unusedSince(before time.Time) idle {
	return func(_ *image, used time.Time) bool { return used.Before(before) }
}

func (m *Manager) sweepMounts(ctx context.Context, may idle) {
	m.mu.Lock()
	points := m.unowned(may)
	for s, c := range m.calls {
		if c.over(time.Now()) {
			delete(m.calls, s)
		}
	}
	m.mu.Unlock()
	for p, img := range points {
		m.sweepPoint(ctx, img, p, may)
	}
}

// unowned returns the points that are mounted though nobody owns them, with their
// images, as far as they may go. The caller has m.mu.
func (m *Manager) unowned(may idle) map[*point]*image {
	points := make(map[*point]*image)
	for _, img := range m.images {
		for _, p := range img.points {
			if m.settled && p.attached && len(p.owners) == 0 && may(img, p.used) {
				points[p] = img
			}
		}
	}
	return points
}

// lingering returns the layers of the cache that sweepMounts would release.
func (m *Manager) lingering(may idle) (layers []*cache.Layer) {
	m.mu.Lock()
	points := m.unowned(may)
	m.mu.Unlock()
	for p := range points {
		if plane.CheckUnused(p.dir) != nil {
			continue
		}
		m.mu.Lock()
		layers = append(layers, p.layers...)
		m.mu.Unlock()
	}
	return layers
}

// sweepPoint unmounts a point unless somebody got it meanwhile.
func (m *Manager) sweepPoint(ctx context.Context, img *image, p *point, may idle) {
	select {
	case <-p.lock:
	default:
		return // in use
	}
	defer func() { p.lock <- struct{}{} }()
	m.mu.Lock()
	free := p.attached && len(p.owners) == 0 && may(img, p.used)
	m.mu.Unlock()
	if !free {
		return
	}
	err := plane.CheckUnused(p.dir)
	if err == nil {
		err = m.detach(ctx, p)
	}
	switch {
	case errors.Is(err, plane.ErrBusy):
		m.log.InfoContext(ctx, "a mount that nobody owns is still in use", "image", img.id, "mount", p.dir, "error", err)
		m.mu.Lock()
		p.used = time.Now()
		m.mu.Unlock()
	case err != nil:
		m.log.WarnContext(ctx, "a mount that nobody owns stays", "image", img.id, "mount", p.dir, "error", err)
	}
}

// sweepImages removes the images that nobody needs.
func (m *Manager) sweepImages(ctx context.Context, may idle) {
	m.naming.Lock()
	defer m.naming.Unlock()
	pinned := make(map[*image]bool) // none is pinned or removed meanwhile
	for _, img := range m.list() {
		pinned[img] = img.pinned()
	}
	var gone, less []*image
	m.mu.Lock()
	for id, img := range m.images {
		switch {
		case !m.settled || pinned[img]:
			continue
		case len(img.holders) > 0 || !may(img, img.used) || img.mounted():
			if img.needed() < len(img.manifest.Layers) {
				less = append(less, img)
			}
			continue
		}
		delete(m.images, id)
		m.forget(id)
		close(img.gone)
		gone = append(gone, img)
	}
	m.mu.Unlock()
	for _, img := range less {
		m.dropContent(ctx, img)
	}
	for _, img := range gone {
		freed := m.dropContent(ctx, img)
		err := m.removeDir(img)
		m.log.InfoContext(ctx, "image is removed", "image", img.id, "bytes", freed)
		if err != nil {
			m.log.WarnContext(ctx, "a removed image's directory stays", "image", img.id, "error", err)
		}
	}
}

// dropContent removes from the cache the layers of an image that no image needs
// any more. Those that background work still has are removed by work, when it
// has ended.
func (m *Manager) dropContent(ctx context.Context, img *image) (freed int64) {
	keep := make(map[oci.Digest]bool)
	for _, other := range m.list() {
		for _, l := range other.manifest.Layers[:m.needed(other)] {
			keep[l.Tar.Digest] = true
		}
	}
	table, err := m.openTable(ctx, img)
	if err != nil {
		m.log.WarnContext(ctx, "a removed image's content stays until the cache's quota needs its place", "image", img.id, "error", err)
		return 0
	}
	for i, l := range img.manifest.Layers {
		if keep[l.Tar.Digest] {
			continue
		}
		tar, sparse := img.manifest.LayerDevices(i)
		freed += m.opts.Cache.Remove(table.Devices[tar].Key)
		if sparse >= 0 {
			freed += m.opts.Cache.Remove(table.Devices[sparse].Key)
		}
	}
	return freed
}

// mounted reports whether any part is mounted or has an owner who is about to
// mount it. The caller has m.mu.
func (img *image) mounted() bool {
	for _, p := range img.points {
		if p.attached || len(p.owners) > 0 || len(p.lock) == 0 {
			return true
		}
	}
	return false
}

// forget drops what earlier pulls found. The caller has m.mu.
func (m *Manager) forget(id oci.Digest) {
	for s, known := range m.known {
		if known == id {
			delete(m.known, s)
		}
	}
}

// removeDir removes an image's directory: first its name, so that a crash
// leaves nothing that looks like an image. The caller has m.naming.
func (m *Manager) removeDir(img *image) error {
	trash := filepath.Join(m.imagesDir(), durable.TempPrefix+filepath.Base(img.dir))
	err := os.RemoveAll(trash)
	if err == nil {
		err = durable.Rename(img.dir, trash)
	}
	return errors.Join(err, os.RemoveAll(trash))
}
