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

// The steps of a pull that need nothing of each other don't wait for each
// other: metadata, chunk table and boot pack are asked for at once.
func TestPartsAreAskedForAtOnce(t *testing.T) {
	n, manifest := prepared(t)
	n.unembed(manifest)
	parts := make(map[oci.Digest]bool)
	for _, d := range blobsOf(t, n.manifest(testRepo, n.artifactOf(manifest).Digest)) {
		switch d.MediaType {
		case artifact.MediaTypeMetadata, artifact.MediaTypeTable, artifact.MediaTypeBootPack:
			parts[d.Digest] = true
		}
	}
	if len(parts) != 3 {
		t.Fatalf("the artifact has %d of 3 parts", len(parts))
	}
	var mu sync.Mutex
	asked, all := make(map[oci.Digest]bool), make(chan struct{})
	n.reg.asked = func(ctx context.Context, d oci.Digest) {
		if !parts[d] {
			return
		}
		mu.Lock()
		if !asked[d] {
			if asked[d] = true; len(asked) == len(parts) {
				close(all)
			}
		}
		mu.Unlock()
		select {
		case <-all:
		case <-ctx.Done():
		}
	}
	n.start()
	if _, err := n.m.Pull(t.Context(), testRef, manifest); err != nil {
		t.Error(err)
	}
}
