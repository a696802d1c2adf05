package transfer

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"sluice/oci"
)

// Annotations by which BuildKit marks a manifest in an index as the attestation
// of another in it (moby/buildkit, docs/attestations/attestation-storage.md).
const (
	annotationReferenceType   = "vnd.docker.reference.type"
	annotationReferenceDigest = "vnd.docker.reference.digest"
	attestationManifest       = "attestation-manifest"
)

// choose returns what is to be copied of what the reference names, and whether
// it has been made here.
func (c *copier) choose(ctx context.Context, p *plan, m oci.Manifest) (root oci.Manifest, made bool, err error) {
	info, err := oci.ParseManifestInfo(m.Content, m.Descriptor.MediaType)
	if err != nil {
		return m, false, fmt.Errorf("manifest %s of the source: %w", m.Descriptor.Digest, err)
	}
	if !oci.IsIndex(m.Descriptor.MediaType) {
		p.platforms, err = c.platformOf(ctx, info)
		if err == nil && !matchesAny(c.opts.Platforms, p.platforms) {
			err = oci.ErrManifestUnknown.Withf("the image is for %s only", platformNames(p.platforms))
		}
		return m, false, err
	}
	var images, chosen []oci.Descriptor
	for _, desc := range info.Manifests {
		if isImage(desc) {
			images = append(images, desc)
		}
	}
	wanted, whole := c.opts.Platforms, false
	if len(wanted) == 0 {
		if chosen = c.present(ctx, images); len(chosen) == len(images) {
			whole = len(c.present(ctx, info.Manifests)) == len(info.Manifests)
		} else {
			p.note("Only %s was copied: the image's other platforms are not in the source.", platformNames(platformsOf(chosen)))
		}
		if len(images) > 0 && len(chosen) == 0 {
			err = oci.ErrManifestUnknown.Withf("the source has the index of the image, but none of its platforms completely: %s", platformNames(platformsOf(images)))
		}
	} else {
		chosen, err = matching(images, wanted)
	}
	if err != nil {
		return m, false, err
	}
	p.platforms = platformsOf(chosen)
	switch {
	case whole, len(chosen) == 0:
		return m, false, nil
	case len(chosen) == 1:
		root, err := c.read(ctx, chosen[0])
		return root, false, err
	}
	root, err = subset(m, append(chosen, c.present(ctx, attestations(info.Manifests, chosen))...))
	p.note("An index of %s was made. Its digest is not that of the original, %s.", platformNames(p.platforms), m.Descriptor.Digest)
	return root, true, err
}

// present returns those of an index's manifests that the source has with all
// they need. Registries have all, but `docker save` writes the whole index of an
// image whose other platforms, or attestations, were never pulled.
func (c *copier) present(ctx context.Context, all []oci.Descriptor) []oci.Descriptor {
	archive, ok := c.src.Registry.(*Archive)
	if !ok {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), func(desc oci.Descriptor) bool { return !archive.complete(ctx, desc, 0) })
}

// attestations returns the attestations of images that are in the same index.
func attestations(all, images []oci.Descriptor) []oci.Descriptor {
	return slices.DeleteFunc(slices.Clone(all), func(desc oci.Descriptor) bool {
		return desc.Annotations[annotationReferenceType] != attestationManifest || !slices.ContainsFunc(images, func(image oci.Descriptor) bool {
			return image.Digest.String() == desc.Annotations[annotationReferenceDigest]
		})
	})
}

// isImage reports whether an index's entry is an image, not an attestation.
func isImage(desc oci.Descriptor) bool {
	return desc.Platform != nil && desc.Annotations[annotationReferenceType] == "" && desc.Platform.OS != "unknown"
}

// matching returns the images for the platforms, of which each must have one.
func matching(images []oci.Descriptor, wanted []oci.Platform) ([]oci.Descriptor, error) {
	var chosen []oci.Descriptor
	for _, w := range wanted {
		found := false
		for _, desc := range images {
			if !matches(w, *desc.Platform) {
				continue
			}
			found = true
			if !slices.ContainsFunc(chosen, func(d oci.Descriptor) bool { return d.Digest == desc.Digest }) {
				chosen = append(chosen, desc)
			}
		}
		if !found {
			return nil, oci.ErrManifestUnknown.Withf("the image isn't for %s; it is for %s", platformNames([]oci.Platform{w}), platformNames(platformsOf(images)))
		}
	}
	return chosen, nil
}

func matches(want, have oci.Platform) bool {
	return want.OS == have.OS && want.Architecture == have.Architecture && (want.Variant == "" || want.Variant == have.Variant)
}

// matchesAny reports whether an image for the platforms have is wanted: it must
// be all that is.
func matchesAny(wanted, have []oci.Platform) bool {
	for _, w := range wanted {
		if !slices.ContainsFunc(have, func(h oci.Platform) bool { return matches(w, h) }) {
			return false
		}
	}
	return true
}

// subset returns an index that has only the chosen manifests of m. Everything
// else in it stays as it is.
func subset(m oci.Manifest, chosen []oci.Descriptor) (oci.Manifest, error) {
	keep := make(map[oci.Digest]bool)
	for _, desc := range chosen {
		keep[desc.Digest] = true
	}
	var document map[string]json.RawMessage
	var entries, kept []json.RawMessage
	if err := json.Unmarshal(m.Content, &document); err != nil {
		return m, oci.ErrManifestInvalid.Withf("index %s: %v", m.Descriptor.Digest, err)
	}
	if err := json.Unmarshal(document["manifests"], &entries); err != nil {
		return m, oci.ErrManifestInvalid.Withf("index %s: %v", m.Descriptor.Digest, err)
	}
	for _, entry := range entries {
		var desc oci.Descriptor
		if err := json.Unmarshal(entry, &desc); err != nil {
			return m, oci.ErrManifestInvalid.Withf("index %s: %v", m.Descriptor.Digest, err)
		}
		if keep[desc.Digest] {
			kept = append(kept, entry)
		}
	}
	list, err := json.Marshal(kept)
	if err != nil {
		return m, err
	}
	document["manifests"] = list
	content, err := json.Marshal(document)
	if err != nil {
		return m, err
	}
	desc := oci.Descriptor{MediaType: m.Descriptor.MediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
	return oci.Manifest{Descriptor: desc, Content: content}, nil
}

// platformOf returns the platform in an image's config; none if the manifest
// isn't that of a container image.
func (c *copier) platformOf(ctx context.Context, info *oci.ManifestInfo) ([]oci.Platform, error) {
	config := info.Blobs[0]
	if config.MediaType != oci.MediaTypeImageConfig && config.MediaType != oci.MediaTypeDockerConfig {
		return nil, nil
	}
	r, err := c.src.Registry.GetBlob(ctx, c.src.Repo, config.Digest)
	if err != nil {
		return nil, fmt.Errorf("reading the image's config from the source: %w", err)
	}
	defer r.Close()
	content, err := readBounded(oci.VerifyReader(r, config), config.Size, maxConfig)
	if err != nil {
		return nil, fmt.Errorf("reading the image's config from the source: %w", err)
	}
	var parsed oci.ImageConfig
	if err := json.Unmarshal(content, &parsed); err != nil {
		return nil, oci.ErrManifestInvalid.Withf("config %s of the image is not usable JSON: %v", config.Digest, err)
	}
	if parsed.OS == "" {
		return nil, nil
	}
	return []oci.Platform{parsed.Platform}, nil
}

func platformsOf(images []oci.Descriptor) []oci.Platform {
	var all []oci.Platform
	for _, desc := range images {
		all = append(all, *desc.Platform)
	}
	return all
}

// platformNames lists platforms for people.
func platformNames(list []oci.Platform) string {
	if len(list) == 0 {
		return "no platform"
	}
	var names []string
	for _, p := range list {
		name := p.OS + "/" + p.Architecture
		if p.Variant != "" {
			name += "/" + p.Variant
		}
		names = append(names, fmt.Sprintf("%.100s", name))
	}
	const shown = 20
	if len(names) > shown {
		names = append(names[:shown], fmt.Sprintf("%d more", len(names)-shown))
	}
	return strings.Join(names, ", ")
}
