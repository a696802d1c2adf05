package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"sluice/internal/artifact"
	"sluice/internal/durable"
	"sluice/internal/node/cache"
	"sluice/internal/node/plane"
	"sluice/oci"
)

// point is a directory where a part of an image is mounted, or can be.
type point struct {
	part Part
	dir  string

	// lock holds a token while nobody mounts or unmounts here.
	lock chan struct{}

	// What follows is guarded by Manager.mu; attached and layers change only
	// under lock too.
	owners   map[string]bool
	used     time.Time
	attached bool
	layers   []*cache.Layer
	direct   bool // the kernel reads local files, no plane is asked
}

// releaseLayers gives the cache's layers back.
func (p *point) releaseLayers() {
	for _, l := range p.layers {
		l.Release()
	}
	p.layers = nil
}

// Attach mounts a part of an image for owner and returns the directory, which
// stays mounted until the owner's Release. Without an owner it's mounted and
// lingers.
//
// Attaching needs no registry when the image was pulled before, but for a
// layer's own metadata, which comes in the background after the first pull.
func (m *Manager) Attach(ctx context.Context, id oci.Digest, part Part, owner string) (string, error) {
	img, p, fresh, err := m.own(id, part, owner)
	if err != nil {
		return "", err
	}
	if err := m.mount(ctx, img, p); err != nil {
		if fresh {
			m.disown(p, owner)
		}
		return "", fmt.Errorf("mount %s of image %s: %w", part, id, err)
	}
	return p.dir, nil
}

// Own makes owner one of a part of an image without mounting it: if it is
// mounted it stays so until the owner's Release.
func (m *Manager) Own(_ context.Context, id oci.Digest, part Part, owner string) error {
	_, _, _, err := m.own(id, part, owner)
	return err
}

// own registers owner at a point before it's mounted, so that the point can't
// be collected meanwhile. fresh reports whether it wasn't yet.
func (m *Manager) own(id oci.Digest, part Part, owner string) (img *image, p *point, fresh bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	img, ok := m.images[id]
	if !ok {
		return nil, nil, false, fmt.Errorf("image %s: %w", id, ErrUnknownImage)
	}
	if part != Merged && (part < 0 || int(part) >= len(img.manifest.Layers)) {
		return nil, nil, false, fmt.Errorf("image %s has no layer %d", id, int(part))
	}
	p = m.pointFor(img, part)
	p.used, img.used = time.Now(), time.Now()
	img.removed = img.removed && part != Merged
	if owner == "" || p.owners[owner] {
		return img, p, false, nil
	}
	p.owners[owner] = true
	return img, p, true, nil
}

func (m *Manager) disown(p *point, owner string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(p.owners, owner)
}

// pointFor returns the point of a part. The caller has m.mu.
func (m *Manager) pointFor(img *image, part Part) *point {
	p := img.points[part]
	if p == nil {
		p = &point{
			part:   part,
			dir:    filepath.Join(m.mountsDir(), img.mount+"."+part.String()),
			lock:   make(chan struct{}, 1),
			owners: make(map[string]bool),
			used:   time.Now(),
		}
		p.lock <- struct{}{}
		img.points[part] = p
	}
	return p
}

// mount makes sure that a point is mounted.
func (m *Manager) mount(ctx context.Context, img *image, p *point) (err error) {
	select {
	case <-p.lock:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { p.lock <- struct{}{} }()
	if m.attached(p) {
		return nil
	}
	ctx, span := m.step(ctx, "mount")
	defer func() { end(span, err) }()
	if err := m.mend(ctx, img, p.part); err != nil {
		return err
	}
	pi, layers, err := m.planeImage(ctx, img, p.part)
	if err != nil {
		return err
	}
	if err = os.MkdirAll(p.dir, 0o700); err == nil {
		if err = m.opts.Plane.Attach(ctx, pi, p.dir); errors.Is(err, plane.ErrAttached) {
			// Something that Open could not adopt. It isn't known what it shows.
			err = errors.Join(plane.Unmount(p.dir, true), m.opts.Plane.Attach(ctx, pi, p.dir))
		}
	}
	if err != nil {
		for _, l := range layers {
			l.Release()
		}
		return &NotStreaming{Reason: PlaneUnavailable, Err: err}
	}
	m.setAttached(p, layers, pi.Direct())
	return nil
}

func (m *Manager) attached(p *point) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return p.attached
}

// setAttached records that a point is mounted, with these layers of the cache.
func (m *Manager) setAttached(p *point, layers []*cache.Layer, direct bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p.attached, p.layers, p.direct = true, layers, direct
}

// planeImage returns what the plane mounts for a part, and the cache's layers
// that it reads, which the caller has to release.
func (m *Manager) planeImage(ctx context.Context, img *image, part Part) (plane.Image, []*cache.Layer, error) {
	table, err := m.openTable(ctx, img)
	if err != nil {
		return plane.Image{}, nil, err
	}
	file := filepath.Join(img.dir, metadataFile(part))
	if part != Merged && !exists(file) {
		if err := m.fetchLayerMetadata(ctx, img, int(part)); err != nil {
			return plane.Image{}, nil, err
		}
	}
	pi := plane.Image{Metadata: file}
	layers, err := m.acquire(ctx, img, table, img.metadata(part).Devices)
	if err != nil {
		return plane.Image{}, nil, err
	}
	for i, n := range img.metadata(part).Devices {
		pi.Devices = append(pi.Devices, planeDevice(img, table.Devices[n], layers[i]))
	}
	return pi, layers, nil
}

// acquireAtOnce is how many layers are opened at the same time. Opening one
// waits for the disk a few times.
const acquireAtOnce = 16

// acquire acquires the cache's layers of devices, all or none.
func (m *Manager) acquire(ctx context.Context, img *image, table *artifact.Table, devices []int) ([]*cache.Layer, error) {
	layers := make([]*cache.Layer, len(devices))
	var group errgroup.Group
	group.SetLimit(acquireAtOnce)
	for i, n := range devices {
		group.Go(func() (err error) {
			dev := table.Devices[n]
			if layers[i], err = m.opts.Cache.Acquire(ctx, dev, m.source(img, dev.Blob), &img.meter); err != nil {
				return cacheError(fmt.Errorf("content of layer %s: %w", dev.DiffID, err))
			}
			return nil
		})
	}
	err := group.Wait()
	if err == nil {
		return layers, nil
	}
	for _, l := range layers {
		if l != nil {
			l.Release()
		}
	}
	return nil, err
}

// A plane that copies what is complete asks a layer whether it is.
var _ plane.Completer = (*cache.Layer)(nil)

// planeDevice gives a layer to the plane: as a file when all of it is there.
func planeDevice(img *image, dev *artifact.Device, l *cache.Layer) plane.Device {
	d := plane.Device{Name: dev.Key.Algorithm().String() + "-" + dev.Key.Encoded(), Size: dev.Size}
	if l.Complete() {
		d.File = l.Path()
	} else {
		d.Content = content{l, img}
	}
	return d
}

// cacheError says which reason an error of the cache is.
func cacheError(err error) error {
	var integrity *cache.IntegrityError
	if errors.As(err, &integrity) {
		return &NotStreaming{Reason: IntegrityFailure, Err: err}
	}
	return &NotStreaming{Reason: PlaneUnavailable, Err: err}
}

// openTable returns the image's chunk table.
func (m *Manager) openTable(ctx context.Context, img *image) (*artifact.Table, error) {
	img.opening.Lock()
	defer img.opening.Unlock()
	if img.table != nil {
		return img.table, nil
	}
	src := &tableSource{remote: m.source(img, img.manifest.Table.Blob)}
	if name := filepath.Join(img.dir, fileTable); exists(name) {
		if err := src.useFile(name); err != nil {
			return nil, localError(err)
		}
	} else {
		root, err := durable.ReadFile(filepath.Join(img.dir, fileRoot), artifact.MaxRootSize)
		if err != nil {
			return nil, localError(err)
		}
		src.root = root
	}
	table, err := artifact.OpenTable(ctx, img.manifest.Table, src)
	if err == nil {
		err = img.manifest.CheckTable(table)
	}
	if err != nil {
		return nil, notStreaming(IntegrityFailure, "stored chunk table: %w", err)
	}
	m.shareDevices(table, src)
	img.table, img.tables = table, src
	return table, nil
}

// fetchLayerMetadata brings one layer's own metadata, or that of Merged.
func (m *Manager) fetchLayerMetadata(ctx context.Context, img *image, layer int) error {
	part := Part(layer)
	what := "metadata of part " + part.String()
	ctx, cancel := context.WithTimeoutCause(ctx, m.opts.Fetch, fmt.Errorf("%s didn't arrive within %v", what, m.opts.Fetch))
	defer cancel()
	table, err := m.openTable(ctx, img)
	if err != nil {
		return err
	}
	src, err := m.spoolMetadata(ctx, img, img.metadata(part).Blob)
	if err != nil {
		return registryError(what, err)
	}
	if c, ok := src.(fileSource); ok {
		defer c.Close()
	}
	return m.unpack(ctx, img, table, part, src)
}

// detach unmounts a point that has no owner. The caller has the point's lock.
func (m *Manager) detach(ctx context.Context, p *point) error {
	err := m.opts.Plane.Detach(ctx, p.dir)
	if err != nil && !errors.Is(err, plane.ErrNotAttached) {
		return fmt.Errorf("unmount %s: %w", p.dir, err)
	}
	m.mu.Lock()
	p.attached = false
	layers := p.layers
	p.layers = nil
	m.mu.Unlock()
	for _, l := range layers {
		l.Release()
	}
	// The directory is made again when it's needed; an empty one is no harm.
	if err := os.Remove(p.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the unmounted directory: %w", err)
	}
	return nil
}
