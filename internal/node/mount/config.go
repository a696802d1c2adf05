package mount

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"sluice/internal/durable"
	"sluice/oci"
)

// fileConfig is the image's config, once somebody needed it.
const fileConfig = "config.json"

// PullChecked is Pull for callers without a trusted source of the layers' diff
// IDs: it reads the image's own manifest and config, and fails with reason
// IntegrityFailure unless the artifact agrees with them. It returns the config
// too.
//
// Without the registry it takes the image that was last pulled under the same
// reference, if there's one.
func (m *Manager) PullChecked(ctx context.Context, ref string) (Image, []byte, error) {
	r, err := oci.ParseReference(ref)
	if err != nil {
		return Image{}, nil, err
	}
	img, config, err := m.pullChecked(ctx, r)
	if ReasonOf(err) != RegistryUnavailable {
		return img, config, err
	}
	local, lerr := m.local(ctx, r)
	if lerr != nil {
		return Image{}, nil, err
	}
	m.log.WarnContext(ctx, "the registry can't be asked: the image that was last pulled under this name is used", "image", ref, "error", err)
	config, cerr := durable.ReadFile(filepath.Join(m.imagesDir(), dirName(local.ID), fileConfig), oci.MaxManifestSize)
	if cerr != nil {
		return Image{}, nil, err
	}
	return local, config, nil
}

// local returns the newest image pulled under a reference, ready to be used.
func (m *Manager) local(ctx context.Context, r oci.Reference) (Image, error) {
	m.mu.Lock()
	var newest *image
	for _, img := range m.images {
		named := slices.ContainsFunc(img.origins, func(o origin) bool { return o.Reference == r.String() })
		if named && (newest == nil || img.created.After(newest.created)) {
			newest = img
		}
	}
	m.mu.Unlock()
	if newest == nil {
		return Image{}, ErrUnknownImage
	}
	return m.ready(ctx, newest, r.String())
}

func (m *Manager) pullChecked(ctx context.Context, r oci.Reference) (Image, []byte, error) {
	reg, err := m.opts.Registry(r.Registry, r.Repository)
	if err != nil {
		return Image{}, nil, notStreaming(RegistryUnavailable, "registry %s: %w", r.Registry, err)
	}
	dctx, cancel := context.WithTimeoutCause(ctx, m.opts.Decide, fmt.Errorf("the registry didn't send the image's manifest within %v", m.opts.Decide))
	defer cancel()
	manifest, err := try(dctx, m, "resolve", func(ctx context.Context) (oci.Manifest, error) { return m.platformManifest(ctx, reg, r) })
	if err != nil {
		return Image{}, nil, err
	}
	var parsed oci.ImageManifest
	if err := json.Unmarshal(manifest.Content, &parsed); err != nil {
		return Image{}, nil, notStreaming(IntegrityFailure, "manifest %s: %w", manifest.Descriptor.Digest, err)
	}
	type answer struct {
		config []byte
		err    error
	}
	configs := make(chan answer, 1)
	go func() {
		config, err := try(dctx, m, "config", func(ctx context.Context) ([]byte, error) { return readConfig(ctx, reg, r.Repository, parsed.Config) })
		configs <- answer{config, err}
	}()
	img, err := m.obtain(ctx, r, manifest.Descriptor.Digest)
	a := <-configs
	if err != nil {
		return Image{}, nil, err
	}
	if a.err != nil {
		return Image{}, nil, registryError("config of "+r.String(), a.err)
	}
	if err := checkDiffIDs(a.config, img); err != nil {
		return Image{}, nil, err
	}
	name := filepath.Join(m.imagesDir(), dirName(img.ID), fileConfig)
	if !exists(name) {
		if err := durable.WriteFile(name, a.config, 0o600); err != nil && !errors.Is(err, os.ErrNotExist) {
			return Image{}, nil, localError(err)
		}
	}
	return img, a.config, nil
}

// platformManifest returns the manifest that a reference names for this node's
// platform.
func (m *Manager) platformManifest(ctx context.Context, reg Registry, r oci.Reference) (oci.Manifest, error) {
	got, err := reg.GetManifest(ctx, r.Repository, r.Target())
	if errors.Is(err, oci.ErrNameUnknown) || errors.Is(err, oci.ErrManifestUnknown) {
		return got, fmt.Errorf("%s isn't in the registry: %w", r, err)
	}
	if err != nil {
		return got, registryError("manifest of "+r.String(), err)
	}
	if !oci.IsIndex(got.Descriptor.MediaType) {
		return got, nil
	}
	var index oci.Index
	if err := json.Unmarshal(got.Content, &index); err != nil {
		return got, notStreaming(IntegrityFailure, "index %s: %w", got.Descriptor.Digest, err)
	}
	for _, desc := range index.Manifests {
		if desc.Platform != nil && m.runs(*desc.Platform) && oci.IsManifest(desc.MediaType) {
			got, err := reg.GetManifest(ctx, r.Repository, desc.Digest.String())
			if err != nil {
				return got, registryError("manifest of "+r.String(), err)
			}
			return got, nil
		}
	}
	return got, notStreaming(PlatformUnsupported, "%s has no image for %s", r, platformName(m.opts.Platform))
}

// readConfig reads an image's config and verifies it.
func readConfig(ctx context.Context, reg Registry, repo string, desc oci.Descriptor) ([]byte, error) {
	if desc.Size < 0 || desc.Size > oci.MaxManifestSize {
		return nil, oci.ErrSizeInvalid.Withf("config %s of %d bytes: up to %d are allowed", desc.Digest, desc.Size, oci.MaxManifestSize)
	}
	if _, err := oci.ParseDigest(desc.Digest.String()); err != nil {
		return nil, err
	}
	r, err := reg.GetBlob(ctx, repo, desc.Digest)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(oci.VerifyReader(r, desc))
}

// checkDiffIDs compares an artifact's layers with the image's config.
func checkDiffIDs(config []byte, img Image) error {
	var c oci.ImageConfig
	if err := json.Unmarshal(config, &c); err != nil {
		return notStreaming(IntegrityFailure, "config of %s: %w", img.Reference, err)
	}
	if !slices.Equal(c.RootFS.DiffIDs, img.DiffIDs) {
		return notStreaming(IntegrityFailure, "the streaming artifact %s is of other layers than the image %s", img.ID, img.Reference)
	}
	return nil
}
