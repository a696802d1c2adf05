package disks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"sluice/internal/durable"
	"sluice/internal/node/mount"
	"sluice/oci"
)

// Config returns an image's config, for who runs it without containerd. It's the one of
// the image's manifest, and has the diff IDs that the registry gave with the disks; an
// image that was asked for by a digest is that one, or one of that index. It is asked
// for once, and is here from then on. Errors are *mount.NotStreaming and
// mount.ErrUnknownImage.
func (m *Manager) Config(ctx context.Context, id oci.Digest) ([]byte, error) {
	img, err := m.lookup(id)
	if err != nil {
		return nil, err
	}
	if config, err := m.storedConfig(img); err == nil {
		return config, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		m.log.WarnContext(ctx, "an image's config isn't what was stored: it is fetched again", "image", id, "error", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, m.opts.Decide, fmt.Errorf("the registry didn't send manifest and config within %v", m.opts.Decide))
	defer cancel()
	m.mu.Lock()
	origins := slices.Clone(img.origins)
	m.mu.Unlock()
	var errs []error
	for _, o := range origins {
		manifest, config, err := m.fetchConfig(ctx, img, o)
		if err == nil {
			m.storeConfig(img, manifest, config)
			return config, nil
		}
		errs = append(errs, fmt.Errorf("%s/%s: %w", o.Registry, o.Repository, err))
		if ctx.Err() != nil {
			errs = append(errs, context.Cause(ctx))
			break
		}
	}
	err = errors.Join(errs...)
	return nil, &mount.NotStreaming{Reason: reasonFor(err), Err: fmt.Errorf("config of %s: %w", img.record.Manifest, err)}
}

// parts checks an image's manifest and config by the image's record.
func (img *image) parts(manifest, config []byte) error {
	if got := img.record.Manifest.Algorithm().FromBytes(manifest); got != img.record.Manifest {
		return oci.ErrDigestInvalid.Withf("its manifest has digest %s, not %s", got, img.record.Manifest)
	}
	desc, err := configOf(manifest)
	if err != nil {
		return err
	}
	if got := desc.Digest.Algorithm().FromBytes(config); got != desc.Digest {
		return oci.ErrDigestInvalid.Withf("its config has digest %s, not %s", got, desc.Digest)
	}
	var c oci.ImageConfig
	if err := json.Unmarshal(config, &c); err != nil {
		return oci.ErrManifestInvalid.Withf("its config: %v", err)
	}
	var diffIDs []oci.Digest
	for _, l := range img.record.Layers {
		diffIDs = append(diffIDs, l.DiffID)
	}
	if !slices.Equal(c.RootFS.DiffIDs, diffIDs) {
		return oci.ErrDigestInvalid.Withf("the disks are of other layers than the image has, by its config %s", desc.Digest)
	}
	return nil
}

// configOf returns which config a manifest has.
func configOf(manifest []byte) (oci.Descriptor, error) {
	var parsed oci.ImageManifest
	if err := json.Unmarshal(manifest, &parsed); err != nil {
		return oci.Descriptor{}, oci.ErrManifestInvalid.Withf("its manifest: %v", err)
	}
	desc := parsed.Config
	if _, err := oci.ParseDigest(desc.Digest.String()); err != nil {
		return desc, err
	}
	if desc.Size < 0 || desc.Size > oci.MaxManifestSize {
		return desc, oci.ErrSizeInvalid.Withf("config %s of %d bytes: up to %d are allowed", desc.Digest, desc.Size, oci.MaxManifestSize)
	}
	return desc, nil
}

// fetchConfig gets an image's manifest and config from where it was found.
func (m *Manager) fetchConfig(ctx context.Context, img *image, o origin) (manifest, config []byte, err error) {
	reg, err := m.opts.Registry(o.Registry, o.Repository)
	if err != nil {
		return nil, nil, err
	}
	if err := m.checkPinned(ctx, reg, img, o); err != nil {
		return nil, nil, err
	}
	got, err := reg.GetManifest(ctx, o.Repository, img.record.Manifest.String())
	if err != nil {
		return nil, nil, err
	}
	desc, err := configOf(got.Content)
	if err != nil {
		return nil, nil, err
	}
	r, err := reg.GetBlob(ctx, o.Repository, desc.Digest)
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	if config, err = io.ReadAll(oci.VerifyReader(r, desc)); err != nil {
		return nil, nil, err
	}
	return got.Content, config, img.parts(got.Content, config)
}

// checkPinned checks that an image that was asked for by a digest is what that names.
func (m *Manager) checkPinned(ctx context.Context, reg oci.Reader, img *image, o origin) error {
	ref, err := oci.ParseReference(o.Reference)
	if err != nil || ref.Digest == "" || ref.Digest == img.record.Manifest {
		return err
	}
	got, err := reg.GetManifest(ctx, o.Repository, ref.Digest.String())
	if err != nil {
		return err
	}
	if ref.Digest.Algorithm().FromBytes(got.Content) != ref.Digest {
		return oci.ErrDigestInvalid.Withf("what the registry sent as %s is something else", ref.Digest)
	}
	var index oci.Index
	if err := json.Unmarshal(got.Content, &index); err != nil {
		return oci.ErrManifestInvalid.Withf("index %s: %v", ref.Digest, err)
	}
	for _, desc := range index.Manifests {
		if desc.Digest == img.record.Manifest {
			return nil
		}
	}
	return oci.ErrDigestInvalid.Withf("the disks are of the image %s, which isn't one of %s", img.record.Manifest, ref.Digest)
}

// storedConfig reads an image's config from the disk.
func (m *Manager) storedConfig(img *image) ([]byte, error) {
	manifest, err := durable.ReadFile(m.fileName(img.id, manifestSuffix), oci.MaxManifestSize)
	if err != nil {
		return nil, err
	}
	config, err := durable.ReadFile(m.fileName(img.id, configSuffix), oci.MaxManifestSize)
	if err != nil {
		return nil, err
	}
	return config, img.parts(manifest, config)
}

// storeConfig keeps an image's manifest and config. What the disk doesn't take is
// fetched again.
func (m *Manager) storeConfig(img *image, manifest, config []byte) {
	m.files.Lock()
	defer m.files.Unlock()
	if _, err := m.lookup(img.id); err != nil {
		return // it was removed meanwhile
	}
	err := durable.WriteFile(m.fileName(img.id, manifestSuffix), manifest, 0o600)
	if err == nil {
		err = durable.WriteFile(m.fileName(img.id, configSuffix), config, 0o600)
	}
	if err != nil {
		m.log.Warn("an image's config can't be stored", "image", img.id, "error", err)
	}
}
