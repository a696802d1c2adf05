package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"
)

// maxManifestDepth bounds how deeply objects and arrays of a manifest nest. The
// specified members need six levels; the rest is for members that extensions add.
const maxManifestDepth = 64

// ManifestInfo is what a registry must know of a manifest to store it.
type ManifestInfo struct {
	// Blobs are the blobs that must be in the repository before the manifest:
	// for an image the config, then the layers; for an index those of its
	// entries that aren't manifests (a build cache, for example).
	Blobs []Descriptor

	// Foreign are the layers that need not be in the repository, because
	// they have URLs or a non-distributable media type.
	Foreign []Descriptor

	// Manifests are the manifests of an index, which must be in the repository
	// before it.
	Manifests []Descriptor

	// Subject is the manifest that this one refers to, or nil. It need not
	// exist. Only OCI media types have one.
	Subject *Descriptor

	// ArtifactType is what Referrers filters by: the manifest's artifactType
	// or, where an image has none, its config's media type.
	ArtifactType string

	// Annotations are those of the manifest itself.
	Annotations map[string]string
}

// ParseManifestInfo parses and checks a manifest of one of the four media
// types for which IsManifest or IsIndex holds. content is hostile input:
// anything that two readers of the document could understand differently, such
// as a repeated member or one in a different case, is rejected too.
//
// Sources: image-spec 1.1 manifest.md, image-index.md and descriptor.md;
// "Image Manifest Version 2, Schema 2" of Docker; distribution-spec 1.1,
// "Pushing Manifests" and "Listing Referrers". That a document must not be
// image and index at once is CVE-2021-41190.
//
// Every error is ErrManifestInvalid.
func ParseManifestInfo(content []byte, mediaType string) (*ManifestInfo, error) {
	if !IsManifest(mediaType) && !IsIndex(mediaType) {
		return nil, ErrManifestInvalid.Withf("media type %.100q is not that of a manifest: push OCI or Docker schema 2 manifests and indexes", mediaType)
	}
	if len(content) > MaxManifestSize {
		return nil, ErrManifestInvalid.Withf("manifest of %d bytes: %d are allowed", len(content), MaxManifestSize)
	}
	if err := checkJSON(content); err != nil {
		return nil, ErrManifestInvalid.Withf("manifest is not usable JSON: %v", err)
	}
	doc, err := parseDocument(content)
	if err != nil {
		return nil, ErrManifestInvalid.Withf("manifest: %v", err)
	}
	info, err := doc.info(mediaType)
	if err != nil {
		return nil, ErrManifestInvalid.Withf("manifest of type %s: %v", mediaType, err)
	}
	return info, nil
}

// CheckReferences checks that what the manifest needs is there. blob and
// manifest tell the size of one in the manifest's repository, or an error that
// is ErrBlobUnknown, ErrManifestUnknown or ErrNameUnknown if there is none.
//
// Errors: ErrManifestBlobUnknown, ErrManifestInvalid if a size differs, and
// those of blob and manifest that mean something else.
func (m *ManifestInfo) CheckReferences(blob, manifest func(Digest) (size int64, err error)) error {
	check := func(kind string, descs []Descriptor, stat func(Digest) (int64, error)) error {
		for _, desc := range descs {
			size, err := stat(desc.Digest)
			switch {
			case errors.Is(err, ErrBlobUnknown), errors.Is(err, ErrManifestUnknown), errors.Is(err, ErrNameUnknown):
				return ErrManifestBlobUnknown.Withf("%s %s is not in the repository: push it before the manifest", kind, desc.Digest)
			case err != nil:
				return fmt.Errorf("%s %s: %w", kind, desc.Digest, err)
			case size != desc.Size:
				return ErrManifestInvalid.Withf("%s %s has %d bytes, and its descriptor says %d", kind, desc.Digest, size, desc.Size)
			}
		}
		return nil
	}
	if err := check("blob", m.Blobs, blob); err != nil {
		return err
	}
	return check("manifest", m.Manifests, manifest)
}

// Referrer is what Referrers yields for the manifest of this descriptor.
func (m *ManifestInfo) Referrer(desc Descriptor) Descriptor {
	return Descriptor{
		MediaType:    desc.MediaType,
		Digest:       desc.Digest,
		Size:         desc.Size,
		ArtifactType: m.ArtifactType,
		Annotations:  m.Annotations,
	}
}

// document is a manifest of any kind. A nil pointer is an absent member.
type document struct {
	SchemaVersion *int
	MediaType     *string
	ArtifactType  *string
	Config        *Descriptor
	Layers        []Descriptor
	Manifests     []Descriptor
	Subject       *Descriptor
	Annotations   map[string]string

	has map[string]bool // the members that are present and not null
}

func parseDocument(content []byte) (*document, error) {
	d := &document{}
	var config, subject json.RawMessage
	var layers, manifests []json.RawMessage
	has, err := parseObject(content, map[string]any{
		"schemaVersion": &d.SchemaVersion,
		"mediaType":     &d.MediaType,
		"artifactType":  &d.ArtifactType,
		"config":        &config,
		"layers":        &layers,
		"manifests":     &manifests,
		"subject":       &subject,
		"annotations":   &d.Annotations,
	})
	if err != nil {
		return nil, err
	}
	d.has = has
	if has["config"] {
		if d.Config, err = parseDescriptor(config); err != nil {
			return nil, fmt.Errorf("config: %w", err)
		}
	}
	if has["subject"] {
		if d.Subject, err = parseDescriptor(subject); err != nil {
			return nil, fmt.Errorf("subject: %w", err)
		}
	}
	if d.Layers, err = parseDescriptors("layers", layers); err != nil {
		return nil, err
	}
	if d.Manifests, err = parseDescriptors("manifests", manifests); err != nil {
		return nil, err
	}
	return d, nil
}

// info checks what only the document as a whole can tell.
func (d *document) info(mediaType string) (*ManifestInfo, error) {
	docker := mediaType == MediaTypeDockerManifest || mediaType == MediaTypeDockerManifestList
	switch {
	case d.SchemaVersion == nil || *d.SchemaVersion != 2:
		return nil, errors.New("schemaVersion must be 2")
	case d.MediaType == nil && docker:
		return nil, errors.New("mediaType is missing")
	case d.MediaType != nil && *d.MediaType != mediaType:
		return nil, fmt.Errorf("mediaType says %.100q", *d.MediaType)
	}
	info := &ManifestInfo{Annotations: d.Annotations}
	if d.ArtifactType != nil {
		info.ArtifactType = *d.ArtifactType
	}
	if !docker {
		info.Subject = d.Subject
	}
	if IsIndex(mediaType) {
		if d.has["config"] || d.has["layers"] {
			return nil, errors.New("an index must not have the members config and layers of an image")
		}
		for _, desc := range d.Manifests {
			if IsManifest(desc.MediaType) || IsIndex(desc.MediaType) {
				info.Manifests = append(info.Manifests, desc)
			} else {
				info.Blobs = append(info.Blobs, desc)
			}
		}
		return info, nil
	}
	if d.has["manifests"] {
		return nil, errors.New("an image must not have the member manifests of an index")
	}
	if d.Config == nil {
		return nil, errors.New("config is missing")
	}
	if info.ArtifactType == "" {
		info.ArtifactType = d.Config.MediaType
	}
	info.Blobs = append(info.Blobs, *d.Config)
	for _, desc := range d.Layers {
		if isForeign(desc) {
			info.Foreign = append(info.Foreign, desc)
		} else {
			info.Blobs = append(info.Blobs, desc)
		}
	}
	return info, nil
}

// isForeign reports whether a layer is kept elsewhere.
func isForeign(desc Descriptor) bool {
	return len(desc.URLs) > 0 || desc.MediaType == MediaTypeDockerForeignLayer ||
		strings.HasPrefix(desc.MediaType, "application/vnd.oci.image.layer.nondistributable.v1.")
}

func parseDescriptors(name string, raw []json.RawMessage) ([]Descriptor, error) {
	descs := make([]Descriptor, 0, len(raw))
	for i, r := range raw {
		desc, err := parseDescriptor(r)
		if err != nil {
			return nil, fmt.Errorf("%s[%d]: %w", name, i, err)
		}
		descs = append(descs, *desc)
	}
	return descs, nil
}

func parseDescriptor(raw json.RawMessage) (*Descriptor, error) {
	desc := &Descriptor{}
	var platform json.RawMessage
	has, err := parseObject(raw, map[string]any{
		"mediaType":    &desc.MediaType,
		"digest":       &desc.Digest,
		"size":         &desc.Size,
		"urls":         &desc.URLs,
		"annotations":  &desc.Annotations,
		"data":         &desc.Data,
		"platform":     &platform,
		"artifactType": &desc.ArtifactType,
	})
	if err != nil {
		return nil, err
	}
	switch {
	case desc.MediaType == "":
		return nil, errors.New("mediaType is missing")
	case !has["size"]:
		return nil, errors.New("size is missing")
	case desc.Size < 0:
		return nil, fmt.Errorf("size is negative: %d", desc.Size)
	}
	if _, err := ParseDigest(desc.Digest.String()); err != nil {
		return nil, err
	}
	if has["platform"] {
		desc.Platform = &Platform{}
		_, err := parseObject(platform, map[string]any{
			"architecture": &desc.Platform.Architecture,
			"os":           &desc.Platform.OS,
			"os.version":   &desc.Platform.OSVersion,
			"os.features":  &desc.Platform.OSFeatures,
			"variant":      &desc.Platform.Variant,
		})
		if err != nil {
			return nil, fmt.Errorf("platform: %w", err)
		}
	}
	if has["data"] {
		if int64(len(desc.Data)) != desc.Size || desc.Digest.Algorithm().FromBytes(desc.Data) != desc.Digest {
			return nil, errors.New("data is not the content that digest and size describe")
		}
	}
	return desc, nil
}

// parseObject decodes the named members of a JSON object into what members
// points at, and reports which of them are present and not null. Unlike package
// encoding/json it insists on their exact spelling, because other readers might.
// Members of other names are ignored.
func parseObject(raw json.RawMessage, members map[string]any) (map[string]bool, error) {
	var object map[string]json.RawMessage
	if err := json.Unmarshal(raw, &object); err != nil {
		return nil, jsonError(err)
	}
	if object == nil {
		return nil, errors.New("must be an object, not null")
	}
	has := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(object)) {
		into, known := members[name]
		if !known {
			for m := range members {
				if strings.EqualFold(m, name) {
					return nil, fmt.Errorf("%q is a misspelt %q", name, m)
				}
			}
			continue
		}
		value := object[name]
		if bytes.Equal(bytes.TrimSpace(value), []byte("null")) {
			continue
		}
		if err := json.Unmarshal(value, into); err != nil {
			return nil, fmt.Errorf("%s: %w", name, jsonError(err))
		}
		has[name] = true
	}
	return has, nil
}

// jsonError says what is wrong without the names of Go types.
func jsonError(err error) error {
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) {
		return fmt.Errorf("a %s is of the wrong type or out of range", wrong.Value)
	}
	return err
}

// checkJSON checks that content is one JSON value in UTF-8, not nested too
// deeply and without repeated members.
func checkJSON(content []byte) error {
	if !utf8.Valid(content) {
		return errors.New("not UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(content))
	dec.UseNumber()
	var open []*level
	for {
		token, err := dec.Token()
		if err != nil {
			if err == io.EOF {
				return io.ErrUnexpectedEOF
			}
			return err
		}
		var in *level
		if len(open) > 0 {
			in = open[len(open)-1]
		}
		delim, _ := token.(json.Delim)
		switch {
		case delim == '}' || delim == ']':
			open = open[:len(open)-1]
		case in != nil && in.names != nil && !in.value:
			name := token.(string) // the decoder allows nothing else here
			if in.names[name] {
				return fmt.Errorf("member %.100q is repeated", name)
			}
			in.names[name], in.value = true, true
			continue
		default:
			if in != nil {
				in.value = false
			}
			if delim == '{' {
				open = append(open, &level{names: map[string]bool{}})
			} else if delim == '[' {
				open = append(open, &level{})
			}
			if len(open) > maxManifestDepth {
				return fmt.Errorf("nested deeper than %d levels", maxManifestDepth)
			}
		}
		if len(open) == 0 {
			break
		}
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("something follows the document")
	}
	return nil
}

// level is an object or array that checkJSON is in.
type level struct {
	names map[string]bool // members of the object so far; nil for an array
	value bool            // the next token is a member's value
}
