package transfer

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"sluice/oci"
)

// Annotations of index.json that name images: of image-spec 1.1
// (annotations.md), a tag for most writers; and containerd's, which docker save
// writes too, a whole reference.
const (
	annotationRefName        = "org.opencontainers.image.ref.name"
	annotationContainerdName = "io.containerd.image.name"
)

// readLayout reads the index of an OCI image layout.
func (a *Archive) readLayout(ctx context.Context) error {
	content, err := readFile(a.files, layoutFile, 64<<10)
	if err != nil {
		return err
	}
	var layout struct {
		Version string `json:"imageLayoutVersion"`
	}
	if err := json.Unmarshal(content, &layout); err != nil {
		return fmt.Errorf("file %s is not usable JSON: %w", layoutFile, err)
	}
	if !strings.HasPrefix(layout.Version, "1.") {
		return fmt.Errorf("file %s: version %.40q of layouts is unknown: 1.0.0 is supported", layoutFile, layout.Version)
	}
	if content, err = readFile(a.files, indexFile, oci.MaxManifestSize); err != nil {
		return err
	}
	index, err := oci.ParseManifestInfo(content, oci.MediaTypeIndex)
	if err != nil {
		return fmt.Errorf("file %s: %w", indexFile, err)
	}
	if len(index.Manifests) > maxImages {
		return fmt.Errorf("file %s: %d images are too many: %d are allowed", indexFile, len(index.Manifests), maxImages)
	}
	a.known = make(map[oci.Digest]string)
	at := make(map[oci.Digest]int) // index in images
	for _, desc := range index.Manifests {
		a.known[desc.Digest] = desc.MediaType
		i, ok := at[desc.Digest]
		if !ok {
			i = len(a.images)
			at[desc.Digest] = i
			a.images = append(a.images, Image{Descriptor: oci.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size, Platform: desc.Platform}})
		}
		a.images[i].addName(desc.Annotations)
	}
	return a.readReferrers(ctx)
}

// addName adds the name that annotations of index.json give an image.
func (m *Image) addName(annotations map[string]string) {
	full, ref := annotations[annotationContainerdName], annotations[annotationRefName]
	if full == "" || len(full) > maxNameSize {
		full = ref
	}
	if full == "" || len(full) > maxNameSize {
		return
	}
	m.Names = append(m.Names, full)
}

// readReferrers finds those manifests of index.json that have a subject. They
// are images to offer only if they have a name.
func (a *Archive) readReferrers(ctx context.Context) error {
	a.referrers = make(map[oci.Digest][]oci.Descriptor)
	var roots []Image
	size := 0
	for _, image := range a.images {
		m, err := a.GetManifest(ctx, "", image.Descriptor.Digest.String())
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if size += len(m.Content); size > maxManifestBytes {
			return fmt.Errorf("file %s: its manifests have more than %d MiB together", indexFile, maxManifestBytes>>20)
		}
		info, perr := oci.ParseManifestInfo(m.Content, m.Descriptor.MediaType)
		if err != nil || perr != nil || info.Subject == nil {
			roots = append(roots, image) // if it's damaged, whoever asks for it will hear how
			continue
		}
		subject := info.Subject.Digest
		a.referrers[subject] = append(a.referrers[subject], info.Referrer(m.Descriptor))
		if len(image.Names) > 0 {
			roots = append(roots, image)
		}
	}
	for _, list := range a.referrers {
		slices.SortFunc(list, func(x, y oci.Descriptor) int { return strings.Compare(x.Digest.String(), y.Digest.String()) })
	}
	a.images = roots
	return nil
}

// typeOf returns the media type that a manifest says it has or, since OCI allows
// it to say nothing, that its members tell.
func typeOf(content []byte) string {
	var document struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(content, &document); err != nil {
		return ""
	}
	switch {
	case document.MediaType != "":
		return document.MediaType
	case document.Manifests != nil:
		return oci.MediaTypeIndex
	}
	return oci.MediaTypeImageManifest
}
