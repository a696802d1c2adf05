package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"sluice/internal/artifact"
	"sluice/oci"
)

// Why an image can't be converted. The codes are Azure Container Registry's;
// errors.Is compares codes, the message of the error that Convert returns says
// more.
var (
	ErrResourceNotFound        = &oci.Error{Code: "RESOURCE_NOT_FOUND", Message: "the image doesn't exist"}
	ErrUnsupportedPlatform     = &oci.Error{Code: "UNSUPPORTED_PLATFORM", Message: "only linux images can be streamed"}
	ErrNoSupportedPlatform     = &oci.Error{Code: "NO_SUPPORTED_PLATFORM_FOUND", Message: "the index has no linux image"}
	ErrUnsupportedMediaType    = &oci.Error{Code: "UNSUPPORTED_MEDIATYPE", Message: "the media type can't be streamed"}
	ErrUnsupportedArtifactType = &oci.Error{Code: "UNSUPPORTED_ARTIFACT_TYPE", Message: "a streaming artifact can't be converted"}
	ErrImageNotRunnable        = &oci.Error{Code: "IMAGE_NOT_RUNNABLE", Message: "the image can't be run"}
)

// maxImages bounds the platforms of an index.
const maxImages = 256

// plan is what a reference turned out to be.
type plan struct {
	subject oci.Descriptor
	index   bool
	images  []*image
	skipped []Skipped
}

// image is an image manifest that can be converted.
type image struct {
	desc     oci.Descriptor
	platform oci.Platform
	config   oci.Descriptor
	content  []byte // of the config
	layers   []oci.Descriptor
	diffIDs  []oci.Digest // as many as layers
}

// size returns how many bytes the image's layers have in the registry.
func (img *image) size() int64 {
	var n int64
	for _, l := range img.layers {
		n += l.Size
	}
	return n
}

// plan resolves a reference and decides what to convert.
func (c *converter) plan(ctx context.Context, reference string) (*plan, error) {
	m, err := c.manifest(ctx, reference)
	if err != nil {
		return nil, err
	}
	p := &plan{subject: identity(m.Descriptor)}
	switch mt := m.Descriptor.MediaType; {
	case oci.IsManifest(mt):
		img, err := c.image(ctx, m)
		if err != nil {
			return nil, err
		}
		if !c.wanted(img.platform) {
			return nil, ErrUnsupportedPlatform.Withf("%s is for %s, which isn't among the platforms asked for", c.name(m), platformString(img.platform))
		}
		p.images = append(p.images, img)
		return p, nil
	case oci.IsIndex(mt):
		p.index = true
		return p, c.planIndex(ctx, m, p)
	default:
		return nil, ErrUnsupportedMediaType.Withf("%s is a %q: OCI image manifests and indexes, Docker schema 2 manifests and manifest lists can be streamed", c.name(m), mt)
	}
}

// planIndex adds the images of an index.
func (c *converter) planIndex(ctx context.Context, m oci.Manifest, p *plan) error {
	info, err := oci.ParseManifestInfo(m.Content, m.Descriptor.MediaType)
	if err != nil {
		return fmt.Errorf("%s: %w", c.name(m), err)
	}
	if len(info.Manifests) > maxImages {
		return ErrUnsupportedMediaType.Withf("%s has %d manifests, %d are allowed", c.name(m), len(info.Manifests), maxImages)
	}
	seen := make(map[oci.Digest]bool)
	for _, desc := range info.Manifests {
		if seen[desc.Digest] {
			continue // one image for two platforms, such as an old and a new variant
		}
		seen[desc.Digest] = true
		if reason := skip(desc); reason != "" {
			p.skipped = append(p.skipped, Skipped{desc, reason})
			continue
		}
		entry, err := c.manifest(ctx, desc.Digest.String())
		if errors.Is(err, ErrResourceNotFound) {
			p.skipped = append(p.skipped, Skipped{desc, "it isn't in the repository"}) // a sparse index
			continue
		}
		if err != nil {
			return err
		}
		img, err := c.image(ctx, entry)
		var why *oci.Error
		if Ineligible(err) && errors.As(err, &why) {
			p.skipped = append(p.skipped, Skipped{desc, why.Message})
			continue
		}
		if err != nil {
			return err
		}
		if !c.wanted(img.platform) {
			p.skipped = append(p.skipped, Skipped{desc, platformString(img.platform) + " isn't among the platforms asked for"})
			continue
		}
		p.images = append(p.images, img)
	}
	if len(p.images) == 0 {
		reason := "it is empty"
		if len(p.skipped) > 0 {
			reason = fmt.Sprintf("none of its %d entries can be streamed; the first because %s", len(p.skipped), p.skipped[0].Reason)
		}
		return ErrNoSupportedPlatform.Withf("%s: %s", c.name(m), reason)
	}
	return nil
}

// skip returns why an entry of an index needn't even be read, or nothing.
func skip(desc oci.Descriptor) string {
	// What BuildKit attaches to images this way is for reading, not for running.
	if t := desc.Annotations["vnd.docker.reference.type"]; t != "" {
		return fmt.Sprintf("it is no image but a %q", t)
	}
	if !oci.IsManifest(desc.MediaType) {
		return fmt.Sprintf("it is a %q", desc.MediaType)
	}
	if p := desc.Platform; p != nil && p.OS != "" && p.OS != "linux" {
		return fmt.Sprintf("it is for %s", platformString(*p))
	}
	return ""
}

// Ineligible reports whether err is about what the image is.
func Ineligible(err error) bool {
	for _, e := range []error{ErrResourceNotFound, ErrUnsupportedPlatform, ErrNoSupportedPlatform, ErrUnsupportedMediaType, ErrUnsupportedArtifactType, ErrImageNotRunnable} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// manifest reads a manifest of the repository.
func (c *converter) manifest(ctx context.Context, reference string) (oci.Manifest, error) {
	m, err := c.reg.GetManifest(ctx, c.repo, reference)
	if errors.Is(err, oci.ErrManifestUnknown) || errors.Is(err, oci.ErrNameUnknown) {
		return m, ErrResourceNotFound.Withf("the image doesn't exist: %v", err)
	}
	return m, err // it says what was read, and where
}

// image checks that an image manifest is one of an image that runs on Linux,
// with layers that can be read.
func (c *converter) image(ctx context.Context, m oci.Manifest) (*image, error) {
	info, err := oci.ParseManifestInfo(m.Content, m.Descriptor.MediaType)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.name(m), err)
	}
	var raw oci.ImageManifest
	if err := json.Unmarshal(m.Content, &raw); err != nil {
		return nil, oci.ErrManifestInvalid.Withf("%s: %v", c.name(m), err)
	}
	switch {
	case info.ArtifactType == oci.ArtifactTypeStreaming:
		return nil, ErrUnsupportedArtifactType.Withf("%s is a streaming artifact itself: convert its subject", c.name(m))
	case raw.Config.MediaType != oci.MediaTypeImageConfig && raw.Config.MediaType != oci.MediaTypeDockerConfig:
		return nil, ErrImageNotRunnable.Withf("%s is no image that can be run: its config is a %q", c.name(m), raw.Config.MediaType)
	case len(raw.Layers) == 0:
		return nil, ErrImageNotRunnable.Withf("%s has no layers", c.name(m))
	case len(raw.Layers) > artifact.MaxLayers:
		return nil, ErrUnsupportedMediaType.Withf("%s has %d layers, %d are allowed", c.name(m), len(raw.Layers), artifact.MaxLayers)
	}
	for i, l := range raw.Layers {
		if !readable(l.MediaType) {
			return nil, ErrUnsupportedMediaType.Withf("%s: layer %d is a %q, which can't be streamed", c.name(m), i, l.MediaType)
		}
	}
	img := &image{desc: identity(m.Descriptor), config: identity(raw.Config), layers: raw.Layers}
	if err := c.readConfig(ctx, m, img); err != nil {
		return nil, err
	}
	return img, nil
}

// readConfig reads the image's config and what it says.
func (c *converter) readConfig(ctx context.Context, m oci.Manifest, img *image) error {
	if img.config.Size > oci.MaxManifestSize {
		return ErrImageNotRunnable.Withf("%s: its config has %d bytes, %d are allowed", c.name(m), img.config.Size, oci.MaxManifestSize)
	}
	r, err := c.reg.GetBlob(ctx, c.repo, img.config.Digest)
	if err != nil {
		return fmt.Errorf("%s: reading its config %s: %w", c.name(m), img.config.Digest, err)
	}
	defer r.Close()
	if img.content, err = io.ReadAll(oci.VerifyReader(r, img.config)); err != nil {
		return fmt.Errorf("%s: reading its config: %w", c.name(m), err)
	}
	var config oci.ImageConfig
	if err := json.Unmarshal(img.content, &config); err != nil {
		return ErrImageNotRunnable.Withf("%s: its config %s is not JSON of an image config: %v", c.name(m), img.config.Digest, err)
	}
	// The platform is what the config says, not the index: an artifact must not
	// depend on the way to its image.
	img.platform = oci.Platform{OS: config.OS, Architecture: config.Architecture, Variant: config.Variant}
	img.diffIDs = config.RootFS.DiffIDs
	switch {
	case config.OS != "linux":
		return ErrUnsupportedPlatform.Withf("%s is for %s: only linux images can be streamed", c.name(m), platformString(img.platform))
	case config.Architecture == "":
		return ErrImageNotRunnable.Withf("%s: its config %s names no architecture", c.name(m), img.config.Digest)
	case len(img.diffIDs) != len(img.layers):
		return ErrImageNotRunnable.Withf("%s has %d layers, but its config %s has %d diff IDs", c.name(m), len(img.layers), img.config.Digest, len(img.diffIDs))
	}
	for i, id := range img.diffIDs {
		if _, err := oci.ParseDigest(id.String()); err != nil {
			return ErrImageNotRunnable.Withf("%s: diff ID of layer %d: %v", c.name(m), i, err)
		}
		if id.Algorithm() != oci.SHA256 {
			return ErrUnsupportedMediaType.Withf("%s: diff ID of layer %d is %s: only sha256 can be streamed", c.name(m), i, id)
		}
	}
	return nil
}

// readable reports whether layers of the media type are tars that we can read.
func readable(mediaType string) bool {
	switch mediaType {
	case oci.MediaTypeLayer, oci.MediaTypeLayerGzip, oci.MediaTypeLayerZstd,
		oci.MediaTypeDockerLayer, oci.MediaTypeDockerLayerGzip, oci.MediaTypeDockerLayerZstd:
		return true
	}
	return false
}

// wanted reports whether the options ask for the platform.
func (c *converter) wanted(p oci.Platform) bool {
	for _, w := range c.opts.Platforms {
		if w.OS == p.OS && w.Architecture == p.Architecture && (w.Variant == "" || w.Variant == p.Variant) {
			return true
		}
	}
	return len(c.opts.Platforms) == 0
}

func (c *converter) name(m oci.Manifest) string {
	return c.repo + "@" + m.Descriptor.Digest.String()
}

// identity returns what identifies content, and nothing else of its descriptor.
func identity(d oci.Descriptor) oci.Descriptor {
	return oci.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

// platformString returns "linux/arm/v7".
func platformString(p oci.Platform) string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}
