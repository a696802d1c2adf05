package boot

import (
	"context"
	"slices"
	"sync"

	"sluice/internal/node/plane"
)

// recorder is a plane that remembers what the kernel reads.
type recorder struct {
	plane.Plane

	mu    sync.Mutex
	reads []read
}

// read is a part of a device that the kernel asked for.
type read struct {
	device string // its Name
	off, n int64
}

// Attach implements plane.Plane.
func (r *recorder) Attach(ctx context.Context, img plane.Image, dir string) error {
	img.Devices = slices.Clone(img.Devices)
	for i, d := range img.Devices {
		if d.Content != nil {
			img.Devices[i].Content = recorded{d.Content, d.Name, r}
		}
	}
	return r.Plane.Attach(ctx, img, dir)
}

// so far returns the reads up to now.
func (r *recorder) soFar() []read {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.reads)
}

type recorded struct {
	plane.Content
	name string
	to   *recorder
}

// ReadAt implements plane.Content.
func (c recorded) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	c.to.mu.Lock()
	c.to.reads = append(c.to.reads, read{c.name, off, int64(len(p))})
	c.to.mu.Unlock()
	return c.Content.ReadAt(ctx, p, off)
}
