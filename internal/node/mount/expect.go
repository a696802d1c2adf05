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
	case m.expecting <- struct{}{}:
	default:
		return
	}
	m.background.Go(func(ctx context.Context) {
		defer func() { <-m.expecting }()
		if err := m.expect(ctx, ref); err != nil {
			m.log.DebugContext(ctx, "an image can't be looked up ahead of its pull", "image", ref, "error", err)
		}
	})
}

func (m *Manager) expect(ctx context.Context, ref string) error {
	r, err := oci.ParseReference(ref)
	if err != nil {
		return err
	}
	reg, err := m.registry(r.Registry, r.Repository)
	if err != nil {
		return err
	}
	rctx, cancel := context.WithTimeoutCause(ctx, m.opts.Decide, fmt.Errorf("the registry didn't send the image's manifest within %v", m.opts.Decide))
	defer cancel()
	digest, err := m.expected(rctx, reg, r)
	if err != nil || digest == "" {
		return err
	}
	_, err = m.Pull(ctx, ref, digest)
	return err
}

// expected returns the manifest for this platform, by which a client will pull
// what r names; none if there's nothing to stream. Registries that ration pulls
// count reads of manifests, so none is read for an image that doesn't stream.
func (m *Manager) expected(ctx context.Context, reg Registry, r oci.Reference) (oci.Digest, error) {
	desc, err := reg.ResolveManifest(ctx, r.Repository, r.Target())
	if err != nil || !oci.IsIndex(desc.MediaType) {
		return desc.Digest, err
	}
	mine, _, err := m.candidates(ctx, reg, r.Repository, desc.Digest)
	if err != nil || len(mine) == 0 {
		return "", err
	}
	manifest, err := m.platformManifest(ctx, reg, r)
	return manifest.Descriptor.Digest, err
}
