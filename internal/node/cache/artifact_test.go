package cache

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/oci"
)

// TestRealArtifact puts a layer through everything: a tar converted, its
// chunk table opened, its boot pack put, read in part, filled.
func TestRealArtifact(t *testing.T) {
	f := newFixture(t, 3, 3_000_000, 1000) // for its content
	layerTar := tarOf(t, f.content)
	sink := &memorySink{blobs: map[oci.Digest][]byte{}}
	converted, err := artifact.EncodeLayer(t.Context(), bytes.NewReader(layerTar), sink, artifact.EncodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	built, err := artifact.Build(t.Context(), buildInput(t, converted), sink)
	if err != nil {
		t.Fatal(err)
	}
	ref := built.Manifest.Table
	table, err := artifact.OpenTable(t.Context(), ref, blob.FromBytes(sink.blobs[ref.Blob.Digest]))
	if err != nil {
		t.Fatal(err)
	}
	dev := table.Devices[0]
	l, err := openCache(t, Options{}).Acquire(t.Context(), dev, blob.FromBytes(sink.blobs[dev.Blob.Digest]), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	want := &fixture{content: layerTar, padded: layerTar} // a tar is whole blocks
	mustRead(t, l, want, 1_000_000, 300_000)
	for i := 0; i < dev.Chunks; i += 3 {
		ch, err := dev.Chunk(t.Context(), i)
		if err != nil {
			t.Fatal(err)
		}
		frame := sink.blobs[dev.Blob.Digest][ch.BlobOffset:][:ch.BlobLength]
		if err := l.PutFrame(t.Context(), i, frame); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Fill(t.Context()); err != nil || !l.Complete() {
		t.Fatalf("Fill: %v, complete: %v", err, l.Complete())
	}
	mustRead(t, l, want, 0, l.Size())
}

func tarOf(t *testing.T, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := range 3 {
		part := content[i*len(content)/3 : (i+1)*len(content)/3]
		err := w.WriteHeader(&tar.Header{Name: fmt.Sprint("file", i), Mode: 0o644, Size: int64(len(part))})
		if _, werr := w.Write(part); err != nil || werr != nil {
			t.Fatal(errors.Join(err, werr))
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func buildInput(t *testing.T, l *artifact.Layer) artifact.BuildInput {
	t.Helper()
	var config oci.ImageConfig
	config.OS, config.Architecture = "linux", "amd64"
	config.RootFS.Type = "layers"
	config.RootFS.DiffIDs = []oci.Digest{l.DiffID}
	content, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	return artifact.BuildInput{
		Subject:       oci.Descriptor{MediaType: oci.MediaTypeImageManifest, Digest: oci.DigestOf([]byte("subject")), Size: 7},
		Config:        oci.Descriptor{MediaType: oci.MediaTypeImageConfig, Digest: oci.DigestOf(content), Size: int64(len(content))},
		ConfigContent: content,
		Platform:      oci.Platform{OS: "linux", Architecture: "amd64"},
		Layers:        []*artifact.Layer{l},
	}
}

// memorySink keeps what is written to it.
type memorySink struct {
	mu    sync.Mutex
	blobs map[oci.Digest][]byte
}

func (s *memorySink) Create(context.Context) (artifact.BlobWriter, error) {
	return &memoryBlob{sink: s}, nil
}

type memoryBlob struct {
	bytes.Buffer
	sink *memorySink
}

func (b *memoryBlob) Commit(_ context.Context, digest oci.Digest) error {
	b.sink.mu.Lock()
	defer b.sink.mu.Unlock()
	b.sink.blobs[digest] = b.Bytes()
	return nil
}

func (b *memoryBlob) Cancel() {}
