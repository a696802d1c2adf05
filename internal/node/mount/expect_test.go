package mount_test

import (
	"context"
	"sync"
	"testing"

	"sluice/internal/artifact"
	"sluice/oci"
)

// A pull that was expected finds everything here.
func TestExpect(t *testing.T) {
	n, manifest := prepared(t)
	m := n.start()
	m.Expect(testRef)
	eventually(t, "the image is here", func() bool { return len(m.Status(t.Context()).Pulls) == 1 })
	n.reg.down.Store(true)
	if _, err := m.Pull(t.Context(), testRef, manifest); err != nil {
		t.Errorf("without the registry: %v", err)
	}
	for _, ref := range []string{"NOT A REFERENCE", "other.test/app:1", testHost + "/other:1"} {
		m.Expect(ref) // and nothing comes of it
	}
}

// Of an index, too, it's the manifest by which the client will pull.
func TestExpectIndex(t *testing.T) {
	n := newNode(t)
	n.opts.Platform = here
	descs := n.push(testRepo, "v1", testLayers(), here, oci.Platform{OS: "linux", Architecture: "arm64"})
	m := n.start()
	m.Expect(testRef)
	eventually(t, "it's known that nothing streams", func() bool { return n.reg.listings.Load() == 1 })
	n.convert(testRepo, "v1")
	eventually(t, "the image is here", func() bool {
		m.Expect(testRef)
		return len(m.Status(t.Context()).Images) == 1
	})
	n.reg.down.Store(true)
	if _, err := m.Pull(t.Context(), testRef, descs[0].Digest); err != nil {
		t.Errorf("without the registry: %v", err)
	}
}

// What is expected can't occupy a node.
func TestExpectIsBounded(t *testing.T) {
	n, _ := prepared(t)
	m := n.start()
	n.reg.hang.Store(true)
	for range 100 {
		m.Expect(testRef)
	}
	eventually(t, "some are asked for", func() bool { return n.reg.requests.Load() > 0 })
	if got := n.reg.requests.Load(); got > 8 {
		t.Errorf("%d requests at a time", got)
	}
}

// Metadata and chunk table are asked for at once, and the boot pack when the
// table is there, whatever the metadata takes.
func TestPartsDoNotWaitForEachOther(t *testing.T) {
	n, manifest := prepared(t)
	n.unembed(manifest)
	kinds, asked := make(map[oci.Digest]string), make(map[string]chan struct{})
	for _, d := range blobsOf(t, n.manifest(testRepo, n.artifactOf(manifest).Digest)) {
		kinds[d.Digest] = d.MediaType
		asked[d.MediaType] = make(chan struct{})
	}
	var mu sync.Mutex
	n.reg.asked = func(ctx context.Context, d oci.Digest) {
		kind := kinds[d]
		if kind == "" {
			return // the image's own
		}
		mu.Lock()
		select {
		case <-asked[kind]:
		default:
			close(asked[kind])
		}
		mu.Unlock()
		await := map[string]string{artifact.MediaTypeTable: artifact.MediaTypeMetadata, artifact.MediaTypeMetadata: artifact.MediaTypeBootPack}[kind]
		if await == "" {
			return
		}
		select {
		case <-asked[await]:
		case <-ctx.Done():
		}
	}
	n.start()
	if _, err := n.m.Pull(t.Context(), testRef, manifest); err != nil {
		t.Error(err)
	}
}
