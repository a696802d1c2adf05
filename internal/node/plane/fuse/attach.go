package fuse

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/internal/supply"
)

// Attach implements plane.Plane.
//
//	state.json: image at dir, its devices with new nodes
//	fsopen … device=DIR/blobs/NAME …   (LOOKUP and OPEN come back to us)
//	move_mount(dir)
//
// A kill in between leaves an image in the state which is not mounted; the next
// Open forgets it.
func (p *Plane) Attach(ctx context.Context, img plane.Image, dir string) error {
	if err := img.Check(); err != nil {
		return fmt.Errorf("attach at %s: %w", dir, err)
	}
	dir, err := plane.CleanDir(dir)
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if err := p.take(ctx); err != nil {
		return fmt.Errorf("attach at %s: %w", dir, err)
	}
	defer func() { p.turn <- struct{}{} }()
	if err := p.vacate(dir); err != nil {
		return fmt.Errorf("attach at %s: %w", dir, err)
	}
	select {
	case <-p.server.lost:
		return fmt.Errorf("attach at %s: the FUSE connection is lost, the plane must be opened again: %w", dir, plane.ErrStale)
	default:
	}
	a, paths, err := p.enlist(img)
	if err != nil {
		return fmt.Errorf("attach at %s: %w", dir, err)
	}
	p.state.Images[dir] = imageState{Epoch: p.state.Epoch, Devices: a.names()}
	if err = p.state.save(p.dir); err == nil {
		err = p.mount(img.Metadata, paths, dir)
	}
	if err != nil {
		delete(p.state.Images, dir)
		p.withdraw(a)
		a.close()
		err = errors.Join(err, p.state.save(p.dir))
		return fmt.Errorf("attach at %s: %w", dir, err)
	}
	p.images[dir] = a
	return nil
}

// vacate makes sure that nothing of use is mounted at dir.
func (p *Plane) vacate(dir string) error {
	m, err := plane.MountAt(dir)
	if err != nil {
		return err
	}
	old, known := p.state.Images[dir]
	switch {
	case m == nil:
		// Somebody else unmounted it.
		if a := p.images[dir]; a != nil {
			for _, ended := range p.withdraw(a) {
				<-ended // bounded by ReadTimeout
			}
			a.close()
			delete(p.images, dir)
		}
		delete(p.state.Images, dir)
		p.forget()
		return nil
	case known && m.FSType == "erofs" && p.stale(old):
		if err := plane.Unmount(dir, true); err != nil {
			return err
		}
		delete(p.state.Images, dir)
		return nil
	default:
		return fmt.Errorf("%w (%s)", plane.ErrAttached, m.FSType)
	}
}

// enlist gives each device of img that isn't a file a node, and its content to
// it. paths is what EROFS is to open.
func (p *Plane) enlist(img plane.Image) (a *image, paths []string, err error) {
	a = &image{}
	defer func() {
		if err != nil {
			p.withdraw(a)
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
				paths = append(paths, d.File)
				continue
			}
		}
		dev := p.server.table.name([]byte(d.Name))
		if dev != nil && dev.Size != d.Size {
			return a, nil, fmt.Errorf("device %s has %d bytes, but %d in another image", d.Name, d.Size, dev.Size)
		}
		s, err := supply.NewSource(d)
		if err != nil {
			return a, nil, err
		}
		if dev == nil {
			dev = &device{supply.New(d.Name, d.Size, true), p.state.NextNode}
			p.state.NextNode++
			p.state.Devices = append(p.state.Devices, deviceState{Name: dev.Name, Node: dev.node, Size: dev.Size})
			p.server.table.add(dev)
		}
		a.use(dev, s)
		paths = append(paths, filepath.Join(p.blobs(), d.Name))
	}
	return a, paths, nil
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
func (p *Plane) withdraw(a *image) []<-chan struct{} {
	idle := make([]<-chan struct{}, 0, len(a.uses))
	for _, u := range a.uses {
		idle = append(idle, u.device.Drop(u.source))
	}
	p.forget()
	return idle
}

// forget drops the devices that no image of the state has.
func (p *Plane) forget() {
	p.state.prune()
	keep := make(map[uint64]bool, len(p.state.Devices))
	for _, d := range p.state.Devices {
		keep[d.Node] = true
	}
	for _, d := range p.server.table.all() {
		if !keep[d.node] && d.node >= firstNode {
			p.server.table.remove(d)
		}
	}
}

// prune drops devices that no image on this connection has.
func (s *state) prune() {
	used := map[string]bool{}
	for _, img := range s.Images {
		if img.Epoch == s.Epoch {
			for _, name := range img.Devices {
				used[name] = true
			}
		}
	}
	var devices []deviceState
	for _, d := range s.Devices {
		if used[d.Name] {
			devices = append(devices, d)
		}
	}
	s.Devices = devices
}

// mount mounts an image. Its readahead, which stays within a file, is the
// kernel's default.
func (p *Plane) mount(metadata string, paths []string, dir string) error {
	var options []string
	if p.opts.DirectIO {
		options = append(options, "directio")
	}
	return plane.MountEROFS(metadata, paths, dir, options...)
}

// Adopt implements plane.Plane. A device that was attached with a Content may
// come with a File now: its reads still come here, and are answered from it.
func (p *Plane) Adopt(ctx context.Context, img plane.Image, dir string) error {
	if err := img.Check(); err != nil {
		return fmt.Errorf("adopt %s: %w", dir, err)
	}
	dir, err := plane.CleanDir(dir)
	if err != nil {
		return fmt.Errorf("adopt: %w", err)
	}
	if err := p.take(ctx); err != nil {
		return fmt.Errorf("adopt %s: %w", dir, err)
	}
	defer func() { p.turn <- struct{}{} }()
	if err := p.adoptable(dir); err != nil {
		return fmt.Errorf("adopt %s: %w", dir, err)
	}
	a, err := p.supply(img, p.state.Images[dir])
	if err != nil {
		return fmt.Errorf("adopt %s: %w", dir, err)
	}
	p.images[dir] = a
	return nil
}

func (p *Plane) adoptable(dir string) error {
	m, err := plane.MountAt(dir)
	if err != nil {
		return err
	}
	img, known := p.state.Images[dir]
	switch {
	case m == nil || m.FSType != "erofs" || !known:
		return plane.ErrNotAttached
	case p.stale(img):
		return plane.ErrStale
	case p.images[dir] != nil:
		return fmt.Errorf("%w, by this process", plane.ErrAttached)
	}
	select {
	case <-p.server.lost:
		return plane.ErrStale
	default:
		return nil
	}
}

// supply gives the devices of known their content from img: all or none.
func (p *Plane) supply(img plane.Image, known imageState) (*image, error) {
	have := make(map[string]plane.Device, len(img.Devices))
	for _, d := range img.Devices {
		have[d.Name] = d
	}
	a := &image{}
	for _, name := range known.Devices {
		d, ok := have[name]
		dev := p.server.table.name([]byte(name))
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
func (p *Plane) Ready() {
	for _, d := range p.server.table.all() {
		d.Settle()
	}
}

// Detach implements plane.Plane.
func (p *Plane) Detach(ctx context.Context, dir string) error {
	dir, err := plane.CleanDir(dir)
	if err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	a, idle, err := p.detach(ctx, dir)
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

func (p *Plane) detach(ctx context.Context, dir string) (*image, []<-chan struct{}, error) {
	if err := p.take(ctx); err != nil {
		return nil, nil, err
	}
	defer func() { p.turn <- struct{}{} }()
	m, err := plane.MountAt(dir)
	if err != nil {
		return nil, nil, err
	}
	img, known := p.state.Images[dir]
	switch {
	case m == nil && !known:
		return nil, nil, plane.ErrNotAttached
	case m == nil: // somebody else unmounted it: only our part is left
	case m.FSType != "erofs":
		return nil, nil, fmt.Errorf("%w: %s is mounted over it", plane.ErrBusy, m.FSType)
	default:
		// Who still uses a stale mount gets only EIO from it: let go.
		if err := plane.Unmount(dir, known && p.stale(img)); err != nil {
			return nil, nil, err
		}
	}
	a := p.images[dir]
	delete(p.images, dir)
	delete(p.state.Images, dir)
	var idle []<-chan struct{}
	if a != nil {
		idle = p.withdraw(a)
	} else {
		p.forget()
	}
	return a, idle, p.state.save(p.dir)
}
