// Program stargz-convert makes an eStargz image of an ordinary one, both in OCI
// image layouts with one image each.
//
//	stargz-convert FROM TO [FILE...]
//
// The FILEs are what start-up reads, in that order: they come first in their
// layers and are prefetched, which stargz calls optimized.
package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: stargz-convert FROM TO [FILE...]")
		os.Exit(2)
	}
	c := converter{from: blobs(os.Args[1]), to: blobs(os.Args[2]), files: os.Args[3:]}
	if err := c.convert(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func blobs(layout string) string { return filepath.Join(layout, "blobs", "sha256") }

// converter copies an image from one directory of blobs to another.
type converter struct {
	from, to string
	files    []string
}

func (c converter) convert(from, to string) error {
	if err := os.MkdirAll(c.to, 0o755); err != nil {
		return err
	}
	var index ocispec.Index
	if err := readJSON(filepath.Join(from, "index.json"), &index); err != nil {
		return err
	}
	if len(index.Manifests) != 1 {
		return fmt.Errorf("%s has %d images, want one", from, len(index.Manifests))
	}
	var manifest ocispec.Manifest
	if err := readJSON(c.path(index.Manifests[0].Digest), &manifest); err != nil {
		return err
	}
	var config ocispec.Image
	if err := readJSON(c.path(manifest.Config.Digest), &config); err != nil {
		return err
	}
	for i := range manifest.Layers {
		desc, diffID, err := c.layer(manifest.Layers[i])
		if err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
		manifest.Layers[i], config.RootFS.DiffIDs[i] = desc, diffID
	}
	var err error
	if manifest.Config, err = c.write(ocispec.MediaTypeImageConfig, config); err != nil {
		return err
	}
	platform := index.Manifests[0].Platform
	if index.Manifests[0], err = c.write(ocispec.MediaTypeImageManifest, manifest); err != nil {
		return err
	}
	index.Manifests[0].Platform = platform
	content, err := json.Marshal(index)
	if err != nil {
		return err
	}
	layout, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(filepath.Join(to, "index.json"), content, 0o644),
		os.WriteFile(filepath.Join(to, "oci-layout"), layout, 0o644))
}

func (c converter) path(d digest.Digest) string { return filepath.Join(c.from, d.Encoded()) }

// layer converts one layer.
func (c converter) layer(old ocispec.Descriptor) (ocispec.Descriptor, digest.Digest, error) {
	in, err := os.Open(c.path(old.Digest))
	if err != nil {
		return old, "", err
	}
	defer in.Close()
	var missing []string // those of other layers
	blob, err := estargz.Build(io.NewSectionReader(in, 0, old.Size),
		estargz.WithPrioritizedFiles(c.files), estargz.WithAllowPrioritizeNotFound(&missing))
	if err != nil {
		return old, "", err
	}
	out, err := os.CreateTemp(c.to, ".layer-")
	if err != nil {
		return old, "", errors.Join(err, blob.Close())
	}
	defer out.Close()
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(out, sum), blob)
	if err := errors.Join(err, blob.Close()); err != nil {
		return old, "", err
	}
	size, err := blob.UncompressedSize()
	if err != nil {
		return old, "", err
	}
	d := digest.NewDigest(digest.SHA256, sum)
	return ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayerGzip, Digest: d, Size: n,
		Annotations: map[string]string{
			estargz.TOCJSONDigestAnnotation:         blob.TOCDigest().String(),
			estargz.StoreUncompressedSizeAnnotation: fmt.Sprint(size),
		},
	}, blob.DiffID(), os.Rename(out.Name(), filepath.Join(c.to, d.Encoded()))
}

// write writes v as a blob.
func (c converter) write(mediaType string, v any) (ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := digest.FromBytes(b)
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))},
		os.WriteFile(filepath.Join(c.to, d.Encoded()), b, 0o644)
}

func readJSON(name string, v any) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}
