package mount

import (
	"context"
	"fmt"

	"sluice/oci"
)

// maxExpected bounds the images that are looked up ahead of their pull at a time.
const maxExpected = 8

// Expect tells that an image is about to be pulled, by the name ref: Pull then
// has its answer sooner, because it's being looked up while the client still
// resolves the name and reads manifest and config. It returns at once, and is a
// hint: what fails is left to Pull.
func (m *Manager) Expect(ref string) {
	select {
	case m.expected <- struct{}{}:
	default:
		return
	}
	m.background(func(ctx context.Context) {
		defer func() { <-m.expected }()
		if err := m.expect(ctx, ref); err != nil {
			m.log.DebugContext(ctx, "an image can't be looked up ahead of its pull", "image", ref, "error", err)
		}
	})
}

func (m *Manager) expect(ctx context.Context, ref string) error {
	r, err := oci.ParseReference(ref)
	if err == nil {
		err = m.refused(r.Registry)
	}
	if err != nil {
		return err
	}
	reg, err := m.opts.Registry(r.Registry, r.Repository)
	if err != nil {
		return err
	}
	rctx, cancel := context.WithTimeoutCause(ctx, m.opts.Decide, fmt.Errorf("the registry didn't send the image's manifest within %v", m.opts.Decide))
	defer cancel()
	// By the manifest for this platform, which is what a client pulls by.
	manifest, err := again(rctx, func(ctx context.Context) (oci.Manifest, error) { return m.platformManifest(ctx, reg, r) })
	if err != nil {
		return err
	}
	_, err = m.Pull(ctx, ref, manifest.Descriptor.Digest)
	return err
}
