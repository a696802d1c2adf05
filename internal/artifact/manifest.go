package artifact

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"sluice/oci"
)

// Format and Version are what an artifact's manifest says it is. A change that
// a reader of this version would misunderstand gets a new Version; an addition
// that it can ignore is a descriptor of a media type that it doesn't know.
const (
	Format  = "erofs"
	Version = "v1"
)

// Media types of an artifact's blobs.
const (
	// MediaTypeLayer is that of a layer blob: any OCI client decodes it to
	// the layer's tar.
	MediaTypeLayer = oci.MediaTypeLayerZstd

	MediaTypeMetadata      = "application/vnd.sluice.metadata.v1.erofs+zstd"
	MediaTypeLayerMetadata = "application/vnd.sluice.layer.metadata.v1.erofs+zstd"
	MediaTypeTable         = "application/vnd.sluice.chunktable.v1"
	MediaTypeBootPack      = "application/vnd.sluice.bootpack.v1"
	MediaTypeSparse        = "application/vnd.sluice.layer.sparse.v1+zstd"
)

// Annotations of the manifest. The first four are the ones that Azure
// Container Registry's artifacts have.
const (
	AnnotationFormat  = "streaming.format"
	AnnotationVersion = "streaming.version"
	AnnotationOS      = "streaming.platform.os"
	AnnotationArch    = "streaming.platform.arch"
	AnnotationVariant = "streaming.platform.variant" // only if the platform has one
)

// Annotations of descriptors.
const (
	AnnotationDiffID         = "streaming.layer.diffid"     // layer blob: digest of the layer's tar
	AnnotationMetadataDigest = "streaming.metadata.digest"  // metadata: digest of the decoded EROFS image
	AnnotationMetadataSize   = "streaming.metadata.size"    // metadata: its size, decimal
	AnnotationDevices        = "streaming.metadata.devices" // metadata: device numbers in the order of its device slots, "0,1,2"
	AnnotationRootDigest     = "streaming.chunktable.root.digest"
	AnnotationRootSize       = "streaming.chunktable.root.size"
)

// Limits of a manifest's blobs, in bytes.
const (
	MaxLayers       = 512
	MaxMetadataSize = 512 << 20 // a decoded EROFS metadata image
	MaxBootPackSize = 64 << 20  // a boot pack
)

// Manifest is a parsed artifact manifest.
type Manifest struct {
	// Subject is what the artifact is for: the platform's image manifest, or
	// the index that has it.
	Subject oci.Descriptor

	// Config is the original image config, byte for byte; it pins the diff
	// IDs. Its Data, if not empty, is its content, verified.
	Config   oci.Descriptor
	Platform oci.Platform

	// Metadata is that of the merged image, and its Devices are all devices in
	// order.
	Metadata MetadataRef
	Table    TableRef
	BootPack *oci.Descriptor // nil if there's none
	Layers   []LayerRef      // the lowest first; at least one
}

// LayerRef is what an artifact has of one layer.
type LayerRef struct {
	DiffID   oci.Digest      // sha256 digest of the layer's tar
	Tar      oci.Descriptor  // the layer blob
	Sparse   *oci.Descriptor // nil if the layer has no sparse members
	Metadata MetadataRef     // the layer alone, whiteouts as overlayfs wants them
}

// MetadataRef says where EROFS metadata is and what it decodes to.
type MetadataRef struct {
	Blob   oci.Descriptor // one zstd frame
	Digest oci.Digest     // sha256 digest of the EROFS image
	Size   int64          // of the EROFS image, in bytes

	// Devices are the numbers of the image's devices that the EROFS image's
	// device slots stand for, in the order of the slots.
	Devices []int
}

// Devices returns how many devices the image has.
func (m *Manifest) Devices() int {
	n := len(m.Layers)
	for _, l := range m.Layers {
		if l.Sparse != nil {
			n++
		}
	}
	return n
}

// LayerDevices returns the device number of layer i's tar, and that of its
// sparse device or -1.
func (m *Manifest) LayerDevices(i int) (tar, sparse int) {
	for _, l := range m.Layers[:i] {
		tar++
		if l.Sparse != nil {
			tar++
		}
	}
	if m.Layers[i].Sparse != nil {
		return tar, tar + 1
	}
	return tar, -1
}

// CheckTable returns an error unless t is the table of the artifact's layers:
// the same blobs with the same diff IDs, in the same order.
func (m *Manifest) CheckTable(t *Table) error {
	if len(t.Devices) != m.Devices() {
		return fmt.Errorf("chunk table has %d devices, the manifest's layers have %d", len(t.Devices), m.Devices())
	}
	for i, l := range m.Layers {
		tar, sparse := m.LayerDevices(i)
		d := t.Devices[tar]
		if d.Sparse || d.DiffID != l.DiffID || d.Blob.Digest != l.Tar.Digest || d.Blob.Size != l.Tar.Size {
			return fmt.Errorf("chunk table's device %d (%s in blob %s, %d bytes) isn't the tar of layer %d (%s in blob %s, %d bytes)",
				tar, d.DiffID, d.Blob.Digest, d.Blob.Size, i, l.DiffID, l.Tar.Digest, l.Tar.Size)
		}
		if sparse < 0 {
			continue
		}
		if d = t.Devices[sparse]; !d.Sparse || d.Blob.Digest != l.Sparse.Digest || d.Blob.Size != l.Sparse.Size {
			return fmt.Errorf("chunk table's device %d (blob %s, %d bytes) isn't the sparse device of layer %d (blob %s, %d bytes)",
				sparse, d.Blob.Digest, d.Blob.Size, i, l.Sparse.Digest, l.Sparse.Size)
		}
	}
	return nil
}

// ParseManifest parses and checks an artifact manifest. Every size in the
// result is within the limits of this package, every digest well-formed, the
// device lists within the image's devices. What the blobs hold is checked when
// they are opened.
func ParseManifest(content []byte) (*Manifest, error) {
	m, err := parseManifest(content)
	if err != nil {
		return nil, fmt.Errorf("streaming artifact's manifest: %w", err)
	}
	return m, nil
}

func parseManifest(content []byte) (*Manifest, error) {
	// It refuses what two readers of the JSON could understand differently.
	if _, err := oci.ParseManifestInfo(content, oci.MediaTypeImageManifest); err != nil {
		return nil, err
	}
	var raw oci.ImageManifest
	if err := json.Unmarshal(content, &raw); err != nil {
		return nil, fmt.Errorf("is not JSON of an image manifest: %w", err)
	}
	switch {
	case raw.SchemaVersion != 2 || raw.MediaType != oci.MediaTypeImageManifest:
		return nil, fmt.Errorf("schema version %d, media type %q: want 2 and %q", raw.SchemaVersion, raw.MediaType, oci.MediaTypeImageManifest)
	case raw.ArtifactType != oci.ArtifactTypeStreaming:
		return nil, fmt.Errorf("artifact type %q: want %q", raw.ArtifactType, oci.ArtifactTypeStreaming)
	case raw.Annotations[AnnotationFormat] != Format || raw.Annotations[AnnotationVersion] != Version:
		return nil, fmt.Errorf("format %q version %q: only %q %q is known", raw.Annotations[AnnotationFormat], raw.Annotations[AnnotationVersion], Format, Version)
	case raw.Subject == nil:
		return nil, fmt.Errorf("has no subject")
	}
	m := &Manifest{
		Subject: *raw.Subject,
		Config:  raw.Config,
		Platform: oci.Platform{
			OS:           raw.Annotations[AnnotationOS],
			Architecture: raw.Annotations[AnnotationArch],
			Variant:      raw.Annotations[AnnotationVariant],
		},
	}
	if m.Platform.OS == "" || m.Platform.Architecture == "" {
		return nil, fmt.Errorf("annotations %q and %q must both be set", AnnotationOS, AnnotationArch)
	}
	if err := checkDescriptor("subject", m.Subject, oci.MaxManifestSize, false); err != nil {
		return nil, err
	}
	if err := checkDescriptor("config", m.Config, oci.MaxManifestSize, false); err != nil {
		return nil, err
	}
	if len(raw.Layers) > 4*MaxLayers {
		return nil, fmt.Errorf("has %d blobs, %d are allowed", len(raw.Layers), 4*MaxLayers)
	}
	if err := m.parseBlobs(raw.Layers); err != nil {
		return nil, err
	}
	return m, m.check()
}

// parseBlobs sorts the manifest's descriptors by what their media types say
// they are. Their order is fixed, those of unknown media types are skipped.
func (m *Manifest) parseBlobs(blobs []oci.Descriptor) error {
	for i, d := range blobs {
		var err error
		what := fmt.Sprintf("blob %d (%s)", i, d.MediaType)
		last := len(m.Layers) - 1
		open := last >= 0 && m.Layers[last].Metadata.Size == 0 // the layer still lacks its metadata
		switch {
		case d.MediaType == MediaTypeMetadata && m.Metadata.Size == 0 && last < 0:
			m.Metadata, err = parseMetadata(what, d)
		case d.MediaType == MediaTypeTable && m.Table.RootSize == 0 && last < 0:
			m.Table, err = parseTableRef(what, d)
		case d.MediaType == MediaTypeBootPack && m.BootPack == nil && last < 0:
			m.BootPack, err = &d, checkDescriptor(what, d, MaxBootPackSize, true)
		case d.MediaType == MediaTypeLayer && !open:
			var diffID oci.Digest
			if err = checkDescriptor(what, d, maxContentSize, true); err == nil {
				diffID, err = sha256Annotation(what, d, AnnotationDiffID)
			}
			m.Layers = append(m.Layers, LayerRef{DiffID: diffID, Tar: d})
		case d.MediaType == MediaTypeSparse && open && m.Layers[last].Sparse == nil:
			m.Layers[last].Sparse, err = &d, checkDescriptor(what, d, maxContentSize, true)
		case d.MediaType == MediaTypeLayerMetadata && open:
			m.Layers[last].Metadata, err = parseMetadata(what, d)
		case knownMediaType(d.MediaType):
			err = fmt.Errorf("%s is out of place", what)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func knownMediaType(s string) bool {
	switch s {
	case MediaTypeMetadata, MediaTypeTable, MediaTypeBootPack, MediaTypeLayer, MediaTypeSparse, MediaTypeLayerMetadata:
		return true
	}
	return false
}

// check checks what one descriptor alone doesn't show.
func (m *Manifest) check() error {
	switch n := len(m.Layers); {
	case m.Metadata.Size == 0:
		return fmt.Errorf("has no metadata (%s)", MediaTypeMetadata)
	case m.Table.RootSize == 0:
		return fmt.Errorf("has no chunk table (%s)", MediaTypeTable)
	case n == 0 || n > MaxLayers:
		return fmt.Errorf("has %d layers, 1 to %d are allowed", n, MaxLayers)
	case m.Layers[n-1].Metadata.Size == 0:
		return fmt.Errorf("layer %d has no metadata (%s)", n-1, MediaTypeLayerMetadata)
	}
	devices := m.Devices()
	if len(m.Metadata.Devices) != devices {
		return fmt.Errorf("metadata has %d devices, the layers have %d", len(m.Metadata.Devices), devices)
	}
	for i, d := range m.Metadata.Devices {
		if d != i {
			return fmt.Errorf("metadata's device slot %d is device %d: all devices in order are wanted", i, d)
		}
	}
	for i, l := range m.Layers {
		for _, d := range l.Metadata.Devices {
			if d >= devices {
				return fmt.Errorf("metadata of layer %d needs device %d of %d", i, d, devices)
			}
		}
	}
	return nil
}

// checkDescriptor checks a descriptor's digest and size; of our own blobs it
// wants sha256. Data, if there's any, must be the content.
func checkDescriptor(what string, d oci.Descriptor, maxSize int64, ours bool) error {
	if _, err := oci.ParseDigest(d.Digest.String()); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if ours && d.Digest.Algorithm() != oci.SHA256 {
		return fmt.Errorf("%s: digest %s is not sha256", what, d.Digest)
	}
	if d.Size < 0 || d.Size > maxSize {
		return fmt.Errorf("%s: size %d is not in 0..%d", what, d.Size, maxSize)
	}
	if len(d.Data) == 0 {
		return nil
	}
	if int64(len(d.Data)) != d.Size || d.Digest.Algorithm().FromBytes(d.Data) != d.Digest {
		return fmt.Errorf("%s: its embedded data of %d bytes isn't the content of %s, %d bytes", what, len(d.Data), d.Digest, d.Size)
	}
	return nil
}

func parseMetadata(what string, d oci.Descriptor) (MetadataRef, error) {
	// A zstd frame of a metadata image is never longer than this.
	if err := checkDescriptor(what, d, MaxMetadataSize+MaxMetadataSize/128+maxFrameOverhead, true); err != nil {
		return MetadataRef{}, err
	}
	ref := MetadataRef{Blob: d}
	var err error
	if ref.Digest, err = sha256Annotation(what, d, AnnotationMetadataDigest); err != nil {
		return MetadataRef{}, err
	}
	if ref.Size, err = sizeAnnotation(what, d, AnnotationMetadataSize, MaxMetadataSize); err != nil {
		return MetadataRef{}, err
	}
	list := d.Annotations[AnnotationDevices]
	if len(list) > 8*MaxDevices {
		return MetadataRef{}, fmt.Errorf("%s: annotation %q has %d characters", what, AnnotationDevices, len(list))
	}
	seen := make(map[int]bool)
	for s := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 || n >= MaxDevices || s != strconv.Itoa(n) || seen[n] {
			return MetadataRef{}, fmt.Errorf("%s: annotation %q: %q in %q is not a device number that comes once", what, AnnotationDevices, s, list)
		}
		seen[n] = true
		ref.Devices = append(ref.Devices, n)
	}
	return ref, nil
}

func parseTableRef(what string, d oci.Descriptor) (TableRef, error) {
	if err := checkDescriptor(what, d, MaxTableSize, true); err != nil {
		return TableRef{}, err
	}
	ref := TableRef{Blob: d}
	var err error
	if ref.RootDigest, err = sha256Annotation(what, d, AnnotationRootDigest); err != nil {
		return TableRef{}, err
	}
	if ref.RootSize, err = sizeAnnotation(what, d, AnnotationRootSize, MaxRootSize); err != nil {
		return TableRef{}, err
	}
	return ref, ref.check()
}

func sha256Annotation(what string, d oci.Descriptor, name string) (oci.Digest, error) {
	digest := oci.Digest(d.Annotations[name])
	if digest.Validate() != nil || digest.Algorithm() != oci.SHA256 {
		return "", fmt.Errorf("%s: annotation %q: %q is not a sha256 digest", what, name, digest)
	}
	return digest, nil
}

func sizeAnnotation(what string, d oci.Descriptor, name string, limit int64) (int64, error) {
	s := d.Annotations[name]
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n <= 0 || n > limit || s != strconv.FormatInt(n, 10) {
		return 0, fmt.Errorf("%s: annotation %q: %q is not a size in 1..%d", what, name, s, limit)
	}
	return n, nil
}
