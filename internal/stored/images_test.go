package stored_test

import (
	"encoding/json"
	"testing"

	"sluice/internal/index"
	"sluice/internal/stored"
	"sluice/oci"
)

// pushImage pushes an image with one layer.
func pushImage(t *testing.T, reg *stored.Registry, repo, tag, layer string) index.Manifest {
	t.Helper()
	return push(t, reg, reg, repo, tag, layer, nil)
}

// pushArtifact pushes a streaming artifact of an image.
func pushArtifact(t *testing.T, reg *stored.Registry, repo, layer string, subject index.Manifest) index.Manifest {
	t.Helper()
	return push(t, reg, reg.Generator(), repo, "", layer, func(m *oci.ImageManifest) {
		m.ArtifactType = oci.ArtifactTypeStreaming
		m.Subject = &oci.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size}
	})
}

func push(t *testing.T, reg *stored.Registry, by oci.Registry, repo, reference, layer string, edit func(*oci.ImageManifest)) index.Manifest {
	t.Helper()
	config := `{"os":"linux","architecture":"arm64"}`
	m := oci.ImageManifest{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest,
		Config: oci.Descriptor{MediaType: oci.MediaTypeImageConfig, Digest: pushBlob(t, by, repo, config), Size: int64(len(config))},
		Layers: []oci.Descriptor{{MediaType: oci.MediaTypeLayer, Digest: pushBlob(t, by, repo, layer), Size: int64(len(layer))}},
	}
	if edit != nil {
		edit(&m)
	}
	content, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if reference == "" {
		reference = oci.DigestOf(content).String()
	}
	desc, err := by.PushManifest(t.Context(), repo, reference, m.MediaType, content)
	if err != nil {
		t.Fatal(err)
	}
	row, err := reg.Manifest(t.Context(), repo, desc.Digest)
	if err != nil {
		t.Fatal(err)
	}
	return row
}
