package book

import (
	"context"
	"errors"
	"fmt"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/internal/supply"
)

// Attach implements plane.Plane: the image is in the state before it is mounted.
// A kill in between leaves one there which isn't; the next Open forgets it.
func (b *Book) Attach(ctx context.Context, img plane.Image, dir string) error {
	if err := img.Check(); err != nil {
		return fmt.Errorf("attach at %s: %w", dir, err)
	}
	dir, err := plane.CleanDir(dir)
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if err := b.Take(ctx); err != nil {
		return fmt.Errorf("attach at %s: %w", dir, err)
	}
	defer b.Give()
	if err := b.vacate(dir); err != nil {
		return fmt.Errorf("attach at %s: %w", dir, err)
	}
	if b.backend.Lost() {
		return fmt.Errorf("attach at %s: the connection with the kernel is lost, the plane must be opened again: %w", dir, plane.ErrStale)
	}
	a, devices, err := b.enlist(img)
	if err != nil {
		return fmt.Errorf("attach at %s: %w", dir, err)
	}
	b.state.Images[dir] = imageState{Epoch: b.state.Epoch, Devices: a.names()}
	if err = b.state.save(b.dir); err == nil {
		err = b.backend.Mount(img.Metadata, devices, dir)
	}
	if err != nil {
		delete(b.state.Images, dir)
		b.withdraw(a)
		a.close()
		err = errors.Join(err, b.state.save(b.dir))
		return fmt.Errorf("attach at %s: %w", dir, err)
	}
	b.images[dir] = a
	return nil
}

// vacate makes sure that nothing of use is mounted at dir.
func (b *Book) vacate(dir string) error {
	m, err := plane.MountAt(dir)
	if err != nil {
		return err
	}
	old, known := b.state.Images[dir]
	switch {
	case m == nil:
		// Somebody else unmounted it.
		if a := b.images[dir]; a != nil {
			for _, ended := range b.withdraw(a) {
				<-ended // bounded by ReadTimeout
			}
			a.close()
			delete(b.images, dir)
		}
		delete(b.state.Images, dir)
		b.forget()
		return nil
	case m.FSType == "erofs" && (known && b.stale(old) || !known && b.lost):
		if err := plane.Unmount(dir, true); err != nil {
			return err
		}
		delete(b.state.Images, dir)
		return nil
	default:
		return fmt.Errorf("%w (%s)", plane.ErrAttached, m.FSType)
	}
}

// enlist makes a device of each of img's that isn't a file, unless there is one
// of that name, and lets it read from img's content.
func (b *Book) enlist(img plane.Image) (a *image, devices []Device, err error) {
	a = &image{}
	defer func() {
		if err != nil {
			b.withdraw(a)
			a.close()
		}
	}()
	for _, d := range img.Devices {
		if d.File != "" {
			direct, err := d.Direct()
			if err != nil {
				return a, nil, err
			}
			if direct {
				devices = append(devices, Device{File: d.File})
				continue
			}
		}
		dev := b.devices[d.Name]
		if dev != nil && dev.Size != d.Size {
			return a, nil, fmt.Errorf("device %s has %d bytes, but %d in another image", d.Name, d.Size, dev.Size)
		}
		s, err := supply.NewSource(d)
		if err != nil {
			return a, nil, err
		}
		if dev == nil {
			if dev, err = b.makeDevice(d); err != nil {
				s.Close()
				return a, nil, err
			}
		}
		a.use(dev, s)
		devices = append(devices, Device{Name: d.Name})
	}
	return a, devices, nil
}

func (b *Book) makeDevice(d plane.Device) (*device, error) {
	dev := &device{Supply: supply.New(d.Name, d.Size, true)}
	var err error
	if dev.node, err = b.backend.Make(dev.Supply, b.state.NextNode); err != nil {
		return nil, err
	}
	b.state.NextNode = max(b.state.NextNode, dev.node+1)
	b.state.Devices = append(b.state.Devices, deviceState{Name: dev.Name, Node: dev.node, Size: dev.Size})
	b.devices[dev.Name] = dev
	return dev, nil
}

// close closes the files of content that nobody reads any more.
func (a *image) close() {
	for _, u := range a.uses {
		u.source.Close()
	}
}

func (a *image) use(d *device, s *supply.Source) {
	d.Add(s)
	a.uses = append(a.uses, use{d, s})
}

// names are those of a's devices, each once.
func (a *image) names() []string {
	names := []string{}
	seen := map[string]bool{}
	for _, u := range a.uses {
		if !seen[u.device.Name] {
			seen[u.device.Name] = true
			names = append(names, u.device.Name)
		}
	}
	return names
}

// withdraw takes a's content away, without waiting for reads that are under
// way, and forgets devices that no image has.
func (b *Book) withdraw(a *image) []<-chan struct{} {
	idle := make([]<-chan struct{}, 0, len(a.uses))
	for _, u := range a.uses {
		idle = append(idle, u.device.Drop(u.source))
	}
	b.forget()
	return idle
}

// forget drops the devices that no image of the state has.
func (b *Book) forget() {
	b.state.prune()
	keep := make(map[string]bool, len(b.state.Devices))
	for _, d := range b.state.Devices {
		keep[d.Name] = true
	}
	for name, d := range b.devices {
		if !keep[name] {
			b.backend.Remove(d.node)
			delete(b.devices, name)
		}
	}
}

// Adopt implements plane.Plane. A device that was attached with a Content may
// come with a File now: its reads still come here, and are answered from it.
func (b *Book) Adopt(ctx context.Context, img plane.Image, dir string) error {
	if err := img.Check(); err != nil {
		return fmt.Errorf("adopt %s: %w", dir, err)
	}
	dir, err := plane.CleanDir(dir)
	if err != nil {
		return fmt.Errorf("adopt: %w", err)
	}
	if err := b.Take(ctx); err != nil {
		return fmt.Errorf("adopt %s: %w", dir, err)
	}
	defer b.Give()
	if err := b.adoptable(dir); err != nil {
		return fmt.Errorf("adopt %s: %w", dir, err)
	}
	a, err := b.supply(img, b.state.Images[dir])
	if err != nil {
		return fmt.Errorf("adopt %s: %w", dir, err)
	}
	b.images[dir] = a
	return nil
}

func (b *Book) adoptable(dir string) error {
	m, err := plane.MountAt(dir)
	if err != nil {
		return err
	}
	img, known := b.state.Images[dir]
	switch {
	case m == nil || m.FSType != "erofs" || !known && !b.lost:
		return plane.ErrNotAttached
	case !known || b.stale(img):
		return plane.ErrStale
	case b.images[dir] != nil:
		return fmt.Errorf("%w, by this process", plane.ErrAttached)
	}
	if b.backend.Lost() {
		return plane.ErrStale
	}
	return nil
}

// supply gives the devices of known their content from img: all or none.
func (b *Book) supply(img plane.Image, known imageState) (*image, error) {
	have := make(map[string]plane.Device, len(img.Devices))
	for _, d := range img.Devices {
		have[d.Name] = d
	}
	a := &image{}
	for _, name := range known.Devices {
		d, ok := have[name]
		dev := b.devices[name]
		err := fmt.Errorf("it was attached with the device %s, which now is missing or has another size: %w", name, plane.ErrNotAttached)
		var s *supply.Source
		if ok && dev != nil && dev.Size == d.Size {
			s, err = supply.NewSource(d)
		}
		if err != nil {
			a.close()
			return nil, err
		}
		a.uses = append(a.uses, use{dev, s})
	}
	for _, u := range a.uses {
		u.device.Add(u.source)
	}
	return a, nil
}

// Ready implements plane.Plane.
func (b *Book) Ready() {
	if b.Take(context.Background()) != nil {
		return
	}
	defer b.Give()
	for _, d := range b.devices {
		d.Settle()
	}
}

// Detach implements plane.Plane.
func (b *Book) Detach(ctx context.Context, dir string) error {
	dir, err := plane.CleanDir(dir)
	if err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	a, idle, err := b.detach(ctx, dir)
	for _, ended := range idle {
		select {
		case <-ended:
		case <-ctx.Done():
			return fmt.Errorf("detach %s: it is unmounted, but its content is still being read: %w", dir, ctx.Err())
		}
	}
	if a != nil {
		a.close()
	}
	if err != nil {
		return fmt.Errorf("detach %s: %w", dir, err)
	}
	return nil
}

func (b *Book) detach(ctx context.Context, dir string) (*image, []<-chan struct{}, error) {
	if err := b.Take(ctx); err != nil {
		return nil, nil, err
	}
	defer b.Give()
	m, err := plane.MountAt(dir)
	if err != nil {
		return nil, nil, err
	}
	img, known := b.state.Images[dir]
	switch {
	case m == nil && !known:
		return nil, nil, plane.ErrNotAttached
	case m == nil: // somebody else unmounted it: only our part is left
	case m.FSType != "erofs":
		return nil, nil, fmt.Errorf("%w: %s is mounted over it", plane.ErrBusy, m.FSType)
	default:
		// Who still uses a stale mount gets only EIO from it: let go.
		if err := plane.Unmount(dir, known && b.stale(img) || !known && b.lost); err != nil {
			return nil, nil, err
		}
	}
	a := b.images[dir]
	delete(b.images, dir)
	delete(b.state.Images, dir)
	var idle []<-chan struct{}
	if a != nil {
		idle = b.withdraw(a)
	} else {
		b.forget()
	}
	return a, idle, b.state.save(b.dir)
}
