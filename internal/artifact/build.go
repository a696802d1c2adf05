package artifact

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strconv"
	"strings"

	"sluice/internal/blob"
	"sluice/internal/layer"
	"sluice/oci"
)

// maxEmbedded is up to what size, in bytes, a blob travels in the manifest as
// well.
const maxEmbedded = 8 << 10

// BuildInput is what an artifact is made of.
type BuildInput struct {
	// Subject is the platform's image manifest: media type, digest and size.
	Subject oci.Descriptor

	// Config is the image's config, and ConfigContent its content, whose diff
	// IDs must be the Layers'. The config's blob isn't written: it's the
	// original one, which the repository has.
	Config        oci.Descriptor
	ConfigContent []byte

	Platform oci.Platform

	// Layers are the image's layers, converted, the lowest first. The same
	// Layer may be there several times.
	Layers []*Layer

	// Sources, if not nil, has for each layer the blobs that EncodeLayer wrote,
	// from which the boot pack's chunks are taken. Without it there is no boot
	// pack.
	Sources []LayerSource
}

// LayerSource is where a converted layer's blobs can be read.
type LayerSource struct {
	Tar    blob.Source
	Sparse blob.Source // nil if the layer has none
}

// Built is a finished artifact: everything but its manifest has been written.
type Built struct {
	Manifest *Manifest

	// Content is the manifest as JSON, and Descriptor describes it.
	Content    []byte
	Descriptor oci.Descriptor
}

// Build makes an artifact: metadata, chunk table and boot pack go to sink, the
// manifest is returned for the caller to push. It depends on the input alone,
// and so does every digest.
func Build(ctx context.Context, in BuildInput, sink Sink) (*Built, error) {
	if err := in.check(); err != nil {
		return nil, err
	}
	trees := make([]*layer.Tree, len(in.Layers))
	for i, l := range in.Layers {
		trees[i] = l.Tree
	}
	merged, err := layer.Merge(trees)
	if err != nil {
		return nil, fmt.Errorf("merging %d layers: %w", len(trees), err)
	}
	m := &Manifest{Subject: in.Subject, Config: in.Config, Platform: in.Platform}
	if len(in.ConfigContent) <= maxEmbedded {
		m.Config.Data = in.ConfigContent
	}
	meta, err := mergedMetadata(merged, in.Layers)
	if err != nil {
		return nil, fmt.Errorf("merged metadata: %w", err)
	}
	if m.Metadata, err = meta.store(ctx, sink, MediaTypeMetadata); err != nil {
		return nil, fmt.Errorf("merged metadata: %w", err)
	}
	var table *Table
	if m.Table, table, err = storeTable(ctx, in.Layers, sink); err != nil {
		return nil, fmt.Errorf("chunk table: %w", err)
	}
	if in.Sources != nil {
		var config oci.ImageConfig
		if err := json.Unmarshal(in.ConfigContent, &config); err != nil {
			return nil, fmt.Errorf("image config %s: %w", in.Config.Digest, err)
		}
		files := newBootFiles(ctx, merged.Tree.Root, table, in.Layers, in.Sources)
		if m.BootPack, err = buildBootPack(ctx, files, config, sink); err != nil {
			return nil, fmt.Errorf("boot pack: %w", err)
		}
	}
	for i, l := range in.Layers {
		ref := LayerRef{DiffID: l.DiffID, Tar: l.Tar.Blob}
		if l.Sparse != nil {
			ref.Sparse = &l.Sparse.Blob
		}
		if meta, err = layerMetadata(merged, i, in.Layers); err != nil {
			return nil, fmt.Errorf("metadata of layer %d: %w", i, err)
		}
		if ref.Metadata, err = meta.store(ctx, sink, MediaTypeLayerMetadata); err != nil {
			return nil, fmt.Errorf("metadata of layer %d: %w", i, err)
		}
		m.Layers = append(m.Layers, ref)
	}
	return finish(m)
}

// check returns an error unless the layers are those of the config.
func (in BuildInput) check() error {
	if got := in.Config.Digest.Algorithm().FromBytes(in.ConfigContent); got != in.Config.Digest {
		return fmt.Errorf("image config has digest %s, its descriptor says %s", got, in.Config.Digest)
	}
	var config oci.ImageConfig
	if err := json.Unmarshal(in.ConfigContent, &config); err != nil {
		return fmt.Errorf("image config %s: %w", in.Config.Digest, err)
	}
	ids := config.RootFS.DiffIDs
	if len(ids) != len(in.Layers) {
		return fmt.Errorf("image config %s has %d diff IDs, the image has %d layers", in.Config.Digest, len(ids), len(in.Layers))
	}
	if len(ids) == 0 || len(ids) > MaxLayers {
		return fmt.Errorf("image has %d layers, 1 to %d are allowed", len(ids), MaxLayers)
	}
	if in.Sources != nil && len(in.Sources) != len(in.Layers) {
		return fmt.Errorf("sources for %d of %d layers", len(in.Sources), len(in.Layers))
	}
	for i, l := range in.Layers {
		if l.DiffID != ids[i] {
			return fmt.Errorf("layer %d: %w", i, &DiffIDError{Want: ids[i], Got: l.DiffID})
		}
	}
	return nil
}

// storeTable writes the chunk table of the layers' devices, and opens it.
func storeTable(ctx context.Context, layers []*Layer, sink Sink) (TableRef, *Table, error) {
	var devices []*DeviceData
	for _, id := range imageDevices(layers) {
		devices = append(devices, id.data(layers))
	}
	root, pages, err := encodeTable(devices)
	if err != nil {
		return TableRef{}, nil, err
	}
	desc, err := store(ctx, sink, MediaTypeTable, root, pages)
	if err != nil {
		return TableRef{}, nil, err
	}
	ref := TableRef{Blob: desc, RootDigest: oci.DigestOf(root), RootSize: int64(len(root))}
	table, err := OpenTable(ctx, ref, blob.FromBytes(append(root, pages...)))
	return ref, table, err
}

// For returns the same artifact for another subject, such as the index that
// has the platform's manifest.
func (b *Built) For(subject oci.Descriptor) (*Built, error) {
	m := *b.Manifest
	m.Subject = subject
	return finish(&m)
}

// finish encodes the manifest, and checks that it can be parsed.
func finish(m *Manifest) (*Built, error) {
	content, err := m.encode()
	if err != nil {
		return nil, fmt.Errorf("encoding the manifest: %w", err)
	}
	parsed, err := ParseManifest(content)
	if err != nil {
		return nil, err
	}
	return &Built{
		Manifest: parsed,
		Content:  content,
		Descriptor: oci.Descriptor{
			MediaType: oci.MediaTypeImageManifest, ArtifactType: oci.ArtifactTypeStreaming,
			Digest: oci.DigestOf(content), Size: int64(len(content)),
		},
	}, nil
}

// encode returns the manifest as JSON. encoding/json orders struct members as
// declared and map members by name, so equal manifests are equal bytes.
func (m *Manifest) encode() ([]byte, error) {
	raw := oci.ImageManifest{
		Versioned:    oci.Versioned{SchemaVersion: 2},
		MediaType:    oci.MediaTypeImageManifest,
		ArtifactType: oci.ArtifactTypeStreaming,
		Config:       plain(m.Config),
		Annotations: map[string]string{
			AnnotationFormat:  Format,
			AnnotationVersion: Version,
			AnnotationOS:      m.Platform.OS,
			AnnotationArch:    m.Platform.Architecture,
		},
	}
	raw.Config.Data = m.Config.Data
	subject := plain(m.Subject)
	raw.Subject = &subject
	if m.Platform.Variant != "" {
		raw.Annotations[AnnotationVariant] = m.Platform.Variant
	}
	raw.Layers = append(raw.Layers, m.Metadata.descriptor(), with(m.Table.Blob, map[string]string{
		AnnotationRootDigest: m.Table.RootDigest.String(),
		AnnotationRootSize:   strconv.FormatInt(m.Table.RootSize, 10),
	}))
	if m.BootPack != nil {
		raw.Layers = append(raw.Layers, plain(*m.BootPack))
	}
	for _, l := range m.Layers {
		raw.Layers = append(raw.Layers, with(l.Tar, map[string]string{AnnotationDiffID: l.DiffID.String()}))
		if l.Sparse != nil {
			raw.Layers = append(raw.Layers, plain(*l.Sparse))
		}
		raw.Layers = append(raw.Layers, l.Metadata.descriptor())
	}
	return json.Marshal(raw)
}

// descriptor returns the metadata's descriptor with its annotations.
func (ref MetadataRef) descriptor() oci.Descriptor {
	var devices []string
	for _, d := range ref.Devices {
		devices = append(devices, strconv.Itoa(d))
	}
	return with(ref.Blob, map[string]string{
		AnnotationMetadataDigest: ref.Digest.String(),
		AnnotationMetadataSize:   strconv.FormatInt(ref.Size, 10),
		AnnotationDevices:        strings.Join(devices, ","),
	})
}

// plain returns what identifies a blob, without what else its descriptor had
// where it came from, so that it can't make a difference.
func plain(d oci.Descriptor) oci.Descriptor {
	return oci.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

func with(d oci.Descriptor, annotations map[string]string) oci.Descriptor {
	d = plain(d)
	d.Annotations = maps.Clone(annotations)
	return d
}
