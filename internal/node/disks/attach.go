package disks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/oci"
)

// Attach mounts a layer of an image for owner and returns the directory, which stays
// mounted until the owner's Release. There is no merged mount.
//
// It needs neither the registry nor the share. mount.ErrUnknownImage: the image isn't
// here, or not as it was; whoever wants it has to pull it again.
func (m *Manager) Attach(ctx context.Context, id oci.Digest, part mount.Part, owner string) (string, error) {
	dir, _, err := m.attach(ctx, id, part, owner)
	return dir, err
}

// attach is Attach that tells whether the owner is new.
func (m *Manager) attach(ctx context.Context, id oci.Digest, part mount.Part, owner string) (dir string, fresh bool, err error) {
	d, fresh, err := m.own(id, part, owner)
	if err != nil {
		return "", false, err
	}
	defer m.done(d)
	ctx, cancel := context.WithTimeoutCause(ctx, m.opts.Fetch, fmt.Errorf("it isn't mounted after %v", m.opts.Fetch))
	defer cancel()
	if err := m.prepare(ctx, d, nil); err != nil {
		if fresh {
			m.disown(d, id, owner)
		}
		return "", false, fmt.Errorf("mount layer %s of image %s: %w", part, id, err)
	}
	return d.point, fresh, nil
}

// Own makes owner one of a layer of an image without mounting it: if it is mounted it
// stays so until the owner's Release.
func (m *Manager) Own(_ context.Context, id oci.Digest, part mount.Part, owner string) error {
	d, _, err := m.own(id, part, owner)
	if err == nil {
		m.done(d)
	}
	return err
}

// own registers an owner of a layer's disk, which is in use until done. fresh reports
// whether it wasn't one. The owner "" is nobody.
func (m *Manager) own(id oci.Digest, part mount.Part, name string) (d *disk, fresh bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	img := m.images[id]
	if img == nil {
		return nil, false, fmt.Errorf("image %s: %w", id, mount.ErrUnknownImage)
	}
	if part < 0 || int(part) >= len(img.disks) {
		return nil, false, fmt.Errorf("image %s has %d layers, and %s isn't one: %w", id, len(img.disks), part, unix.EINVAL)
	}
	d = img.disks[part]
	d.using++
	img.used = time.Now()
	o := owner{name, id}
	if name == "" || d.owners[o] {
		return d, false, nil
	}
	d.owners[o] = true
	return d, true, nil
}

func (m *Manager) disown(d *disk, id oci.Digest, name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(d.owners, owner{name, id})
}

// Stack mounts all layers of an image for owner and returns their directories, the
// topmost first, as overlayfs wants them: one for each disk, though a layer be in the
// image twice. They stay mounted until the owner's Release; after an error nothing is
// owned that wasn't before.
func (m *Manager) Stack(ctx context.Context, id oci.Digest, owner string) (dirs []string, err error) {
	img, err := m.lookup(id)
	if err == nil {
		err = m.attachAll(ctx, img, owner)
	}
	if err != nil {
		return nil, err
	}
	for _, d := range slices.Backward(img.disks) {
		if !slices.Contains(dirs, d.point) { // the upper one covers all that the lower one has or hides
			dirs = append(dirs, d.point)
		}
	}
	return dirs, nil
}

// attachAll mounts all layers of an image for owner, which may be nobody.
func (m *Manager) attachAll(ctx context.Context, img *image, owner string) error {
	fresh := make([]bool, len(img.disks))
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for i := range img.disks {
		group.Go(func() (err error) {
			_, fresh[i], err = m.attach(gctx, img.id, mount.Part(i), owner)
			return err
		})
	}
	err := group.Wait()
	for i, d := range img.disks {
		if err != nil && fresh[i] {
			m.disown(d, img.id, owner)
		}
	}
	return err
}

// prepare makes sure that a disk is mounted. fetch, which may be nil, brings what is
// needed of it if that isn't here.
func (m *Manager) prepare(ctx context.Context, d *disk, fetch func(context.Context) error) error {
	if err := d.take(ctx); err != nil {
		return err
	}
	defer d.give()
	if d.attached {
		return nil
	}
	began := time.Now()
	if d.device != nil {
		if err := d.open(ctx); err != nil && (ctx.Err() != nil || passing(err)) {
			return err
		} else if err != nil {
			m.log.ErrorContext(ctx, "what is stored of a disk isn't what it was: it is fetched again", "disk", d.Digest, "directory", d.dir, "error", err)
			m.lose(d)
		}
	}
	if d.device == nil {
		if fetch == nil {
			return fmt.Errorf("disk %s: %w", d.Digest, mount.ErrUnknownImage)
		}
		if err := fetch(ctx); err != nil {
			return err
		}
	}
	if err := m.mount(ctx, d); err != nil {
		return err
	}
	m.noteAttach(time.Since(began))
	return nil
}

// passing reports whether an error of reading files says nothing about them.
func passing(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// lose forgets what is stored of a disk, and with it the images that have it. The
// caller has the disk's lock.
func (m *Manager) lose(d *disk) {
	m.files.Lock()
	defer m.files.Unlock()
	m.mu.Lock()
	d.device, d.windows = nil, nil
	var lost []*image
	for _, img := range m.images {
		if slices.Contains(img.disks, d) {
			m.forget(img)
			lost = append(lost, img)
		}
	}
	m.mu.Unlock()
	for _, img := range lost {
		if err := os.Remove(m.fileName(img.id, recordSuffix)); err != nil && !errors.Is(err, os.ErrNotExist) {
			m.log.Warn("the record of an image that is lost stays", "image", img.id, "error", err)
		}
	}
}

// mount mounts a disk whose files are here and good. The caller has its lock.
func (m *Manager) mount(ctx context.Context, d *disk) error {
	if d.cached == nil {
		layer, err := m.opts.Cache.Acquire(ctx, d.device, m.source(d), &d.meter)
		if err != nil {
			return cacheError(err)
		}
		m.mu.Lock()
		d.cached = layer
		m.mu.Unlock()
	}
	err := os.MkdirAll(d.point, 0o700)
	if err == nil {
		if err = m.opts.Plane.Attach(ctx, d.planeImage(), d.point); errors.Is(err, plane.ErrAttached) {
			// Something that Open could not adopt. It isn't known what it shows.
			err = errors.Join(plane.Unmount(d.point, true), m.opts.Plane.Attach(ctx, d.planeImage(), d.point))
		}
	}
	m.mu.Lock()
	d.attached, d.problem = err == nil, err
	m.mu.Unlock()
	if err != nil {
		m.release(d)
		return &mount.NotStreaming{Reason: mount.PlaneUnavailable, Err: err}
	}
	return nil
}

// release gives the cache's layer back. The caller has the disk's lock.
func (m *Manager) release(d *disk) {
	m.mu.Lock()
	layer := d.cached
	d.cached = nil
	m.mu.Unlock()
	if layer != nil {
		layer.Release()
	}
}

// detach unmounts a disk. The caller has its lock.
func (m *Manager) detach(ctx context.Context, d *disk) error {
	err := m.opts.Plane.Detach(ctx, d.point)
	if err != nil && !errors.Is(err, plane.ErrNotAttached) {
		return fmt.Errorf("unmount %s: %w", d.point, err)
	}
	m.mu.Lock()
	d.attached = false
	m.mu.Unlock()
	m.release(d)
	// The directory is made again when it's needed; an empty one is no harm.
	if err := os.Remove(d.point); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the unmounted directory: %w", err)
	}
	return nil
}
