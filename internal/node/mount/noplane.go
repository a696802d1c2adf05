package mount

import (
	"context"

	"sluice/internal/node/plane"
)

// NoPlane returns the plane of a machine that can't have one, for the reason
// reason. With it a Manager lets every image be pulled the ordinary way and
// says why.
func NoPlane(reason error) plane.Plane { return noPlane{reason} }

type noPlane struct{ reason error }

// Attach fails with the reason.
func (p noPlane) Attach(context.Context, plane.Image, string) error { return p.reason }

// Adopt fails with the reason.
func (p noPlane) Adopt(context.Context, plane.Image, string) error { return p.reason }

// Ready does nothing.
func (noPlane) Ready() {}

// Detach says that nothing is attached.
func (noPlane) Detach(context.Context, string) error { return plane.ErrNotAttached }

// Close does nothing.
func (noPlane) Close() error { return nil }

// unusable returns why p can't mount anything, nil if it may.
func unusable(p plane.Plane) error {
	if n, ok := p.(noPlane); ok {
		return n.reason
	}
	return nil
}
