package peers

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"sluice/oci"
)

// clients is how many push and pull at the same time.
const clients = 200

// TestMemory looks at the registries' memory while clients push blobs and
// manifests and pull blobs.
func TestMemory(t *testing.T) {
	const pulled = 8 << 20
	v, err := newVariants(random(4, 2<<20))
	if err != nil {
		t.Fatal(err)
	}
	blob := random(5, pulled)
	blobs, err := newVariants(blob)
	if err != nil {
		t.Fatal(err)
	}
	end, digest, err := blobs.another()
	if err != nil {
		t.Fatal(err)
	}
	blob = append(blob, end...)
	for _, s := range registries(t) {
		c, err := dial(t.Context(), s.addr)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.pushBlob(repo, digest, blob); err != nil {
			t.Fatal(err)
		}
		if err := c.pushBlob(repo, emptyConfig.Digest.String(), []byte("{}")); err != nil {
			t.Fatal(err)
		}
		c.Close()
		before, err := status(s.process, "VmRSS")
		if err != nil {
			t.Fatal(err)
		}
		requests, rate, err := load(t.Context(), s, clients, 5*time.Second, func(i int, c *conn) (int64, error) {
			if i%2 == 0 {
				return int64(len(blob)), c.get(s.path(digest), whole, blob)
			}
			end, layer, err := v.another()
			if err != nil {
				return 0, err
			}
			size := int64(len(v.base) + len(end))
			if err := c.pushBlob(repo, layer, v.base, end); err != nil {
				return 0, err
			}
			m, err := manifest(oci.Descriptor{MediaType: oci.MediaTypeLayer, Digest: oci.Digest(layer), Size: size}, nil)
			if err != nil {
				return 0, err
			}
			return size, c.pushManifest(repo, fmt.Sprintf("client-%d", i), oci.MediaTypeImageManifest, m)
		})
		if err != nil {
			t.Fatal(err)
		}
		peak, err := status(s.process, "VmHWM")
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("FIGURE memory of %s while %d clients push and pull (%.0f/s, %.0f MB/s): at most %.0f MB, %.0f before",
			s.name, clients, requests, rate/1e6, peak, before)
	}
}

// emptyConfig describes the configuration of images that have none.
var emptyConfig = oci.Descriptor{
	MediaType: "application/vnd.oci.empty.v1+json", Size: 2,
	Digest: "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
}

// manifest returns the manifest of an image of one layer.
func manifest(layer oci.Descriptor, subject *oci.Descriptor) ([]byte, error) {
	return json.Marshal(oci.ImageManifest{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest, ArtifactType: "application/vnd.example.test",
		Config: emptyConfig, Layers: []oci.Descriptor{layer}, Subject: subject,
	})
}
