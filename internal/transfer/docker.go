package transfer

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"sluice/oci"
)

const maxLayers = 1000 // of one image

// dockerImage is an element of the file manifest.json of docker save (moby,
// "Image specification v1.2", "Combined Image JSON + Filesystem Changeset
// Format").
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// readDocker makes a manifest for each image of docker save's older form, which
// has none. The same archive always gives the same manifests: OCI's, with the
// layers as they are in the archive.
func (a *Archive) readDocker(ctx context.Context) error {
	content, err := readFile(a.files, dockerFile, oci.MaxManifestSize)
	if err != nil {
		return err
	}
	var images []dockerImage
	if err := json.Unmarshal(content, &images); err != nil {
		return fmt.Errorf("file %s is not usable JSON: %w", dockerFile, err)
	}
	if len(images) > maxImages {
		return fmt.Errorf("file %s: %d images are too many: %d are allowed", dockerFile, len(images), maxImages)
	}
	a.manifests = make(map[oci.Digest]oci.Manifest)
	a.blobs = make(map[oci.Digest]string)
	hashed := make(map[string]oci.Descriptor) // compressed layers by where they are
	size := 0
	for _, image := range images {
		m, err := a.synthesize(ctx, image, hashed)
		if err != nil {
			return fmt.Errorf("image %.200q: %w", image.RepoTags, err)
		}
		if size += len(m.Content); size > maxManifestBytes {
			return fmt.Errorf("file %s: the images are too many", dockerFile)
		}
		i := a.indexOf(m.Descriptor.Digest)
		if i < 0 {
			i = len(a.images)
			a.images = append(a.images, Image{Descriptor: m.Descriptor})
		}
		for _, tag := range image.RepoTags {
			if len(tag) <= maxNameSize && len(a.images[i].Names) < maxImages {
				a.images[i].Names = append(a.images[i].Names, tag)
			}
		}
		a.manifests[m.Descriptor.Digest] = m
	}
	return nil
}

func (a *Archive) indexOf(digest oci.Digest) int {
	for i, m := range a.images {
		if m.Descriptor.Digest == digest {
			return i
		}
	}
	return -1
}

// synthesize makes the manifest of an image.
func (a *Archive) synthesize(ctx context.Context, image dockerImage, hashed map[string]oci.Descriptor) (oci.Manifest, error) {
	config, err := readFile(a.files, image.Config, maxConfig)
	if err != nil {
		return oci.Manifest{}, fmt.Errorf("its config: %w", err)
	}
	var parsed oci.ImageConfig
	if err := json.Unmarshal(config, &parsed); err != nil {
		return oci.Manifest{}, fmt.Errorf("its config %.100q is not usable JSON: %w", image.Config, err)
	}
	ids := parsed.RootFS.DiffIDs
	if len(ids) != len(image.Layers) || len(ids) > maxLayers {
		return oci.Manifest{}, fmt.Errorf("it has %d layers, and its config %d; up to %d are allowed", len(image.Layers), len(ids), maxLayers)
	}
	m := oci.ImageManifest{
		Versioned: oci.Versioned{SchemaVersion: 2},
		MediaType: oci.MediaTypeImageManifest,
		Config:    oci.Descriptor{MediaType: oci.MediaTypeImageConfig, Digest: oci.DigestOf(config), Size: int64(len(config))},
		Layers:    []oci.Descriptor{},
	}
	a.blobs[m.Config.Digest] = image.Config
	for i, name := range image.Layers {
		desc, err := a.layer(ctx, name, ids[i], hashed)
		if err != nil {
			return oci.Manifest{}, fmt.Errorf("layer %d: %w", i+1, err)
		}
		m.Layers = append(m.Layers, desc)
	}
	content, err := json.Marshal(m)
	if err != nil {
		return oci.Manifest{}, err
	}
	desc := oci.Descriptor{MediaType: m.MediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
	return oci.Manifest{Descriptor: desc, Content: content}, nil
}

// layer returns the descriptor of the layer in a file. A layer that isn't
// compressed has its diff ID for a digest, which is verified when it is copied
// like every other; only compressed ones, of other tools than docker, have to
// be read.
func (a *Archive) layer(ctx context.Context, name string, diffID oci.Digest, hashed map[string]oci.Descriptor) (oci.Descriptor, error) {
	name, err := a.files.find(name)
	if err != nil {
		return oci.Descriptor{}, err
	}
	if desc, ok := hashed[name]; ok {
		return desc, nil
	}
	f, err := a.files.open(name)
	if err != nil {
		return oci.Descriptor{}, err
	}
	defer f.Close()
	magic := make([]byte, 4)
	if _, err := f.ReadAt(magic, 0); err != nil && err != io.EOF {
		return oci.Descriptor{}, err
	}
	desc := oci.Descriptor{MediaType: oci.MediaTypeLayer, Digest: diffID, Size: f.Size()}
	switch {
	case isGzip(magic):
		desc.MediaType = oci.MediaTypeLayerGzip
	case isZstd(magic):
		desc.MediaType = oci.MediaTypeLayerZstd
	}
	if desc.MediaType == oci.MediaTypeLayer {
		if _, err := oci.ParseDigest(diffID.String()); err != nil {
			return oci.Descriptor{}, err
		}
		if other, ok := a.blobs[diffID]; ok && other != name {
			return desc, a.checkSize(other, desc)
		}
		a.blobs[diffID] = name
		return desc, nil
	}
	if desc.Digest, err = oci.SHA256.FromReader(&checkedReader{r: f, err: ctx.Err}); err != nil {
		return oci.Descriptor{}, err
	}
	hashed[name], a.blobs[desc.Digest] = desc, name
	return desc, nil
}

// checkSize checks that the file which has a blob has it in the size that
// another file has.
func (a *Archive) checkSize(name string, desc oci.Descriptor) error {
	f, err := a.files.open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if f.Size() != desc.Size {
		return oci.ErrSizeInvalid.Withf("files that should both be %s have %d and %d bytes", desc.Digest, f.Size(), desc.Size)
	}
	return nil
}
