// Package ocitest is the conformance suite of oci.Registry: what the contract
// promises, as tests. Every implementation calls Run from a test of its own.
//
// The suite knows a registry only by the interface, so it runs against one at
// the far end of an HTTP connection as well.
package ocitest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"testing"

	"sluice/oci"
)

// Run tests a registry. newRegistry returns an empty one; it is called once for
// each part of the suite.
func Run(t *testing.T, newRegistry func(t *testing.T) oci.Registry) {
	parts := []struct {
		name string
		test func(t *testing.T, reg oci.Registry)
	}{
		{"blob", testBlob},
		{"blob/empty", testEmptyBlob},
		{"blob/large", testLargeBlob},
		{"blob/wrong", testWrongBlob},
		{"blob/range", testBlobRange},
		{"blob/mount", testMountBlob},
		{"blob/context", testBlobContext},
		{"blob/delete", testDeleteBlob},
		{"blob/concurrent", testConcurrentBlob},
		{"upload", testUpload},
		{"upload/resume", testResumeUpload},
		{"upload/wrong-offset", testUploadOffset},
		{"upload/broken-reader", testUploadBroken},
		{"upload/commit", testUploadCommit},
		{"upload/cancel", testUploadCancel},
		{"upload/context", testUploadContext},
		{"manifest", testManifest},
		{"manifest/docker", testDockerManifest},
		{"manifest/index", testIndex},
		{"manifest/sha512", testManifestSHA512},
		{"manifest/tags", testTagMoves},
		{"manifest/invalid", testInvalidManifest},
		{"manifest/missing", testMissingReferences},
		{"manifest/foreign", testForeignLayers},
		{"manifest/size", testManifestSize},
		{"manifest/delete", testDeleteManifest},
		{"manifest/delete-tag", testDeleteTag},
		{"manifest/concurrent", testConcurrentManifests},
		{"list/repositories", testRepositories},
		{"list/tags", testTags},
		{"list/many-tags", testManyTags},
		{"list/context", testListContext},
		{"referrers", testReferrers},
		{"referrers/index", testReferrerIndex},
		{"referrers/many", testManyReferrers},
		{"referrers/concurrent", testConcurrentReferrers},
		{"names", testNames},
		{"names/invalid", testInvalidNames},
		{"names/unknown", testUnknown},
	}
	for _, part := range parts {
		t.Run(part.name, func(t *testing.T) { part.test(t, newRegistry(t)) })
	}
}

// random returns n bytes that are the same for the same seed.
func random(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b) // never fails
	return b
}

// describe returns the descriptor of content.
func describe(mediaType string, content []byte) oci.Descriptor {
	return oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
}

// pushBlob pushes content and returns its descriptor.
func pushBlob(t *testing.T, reg oci.Registry, repo, mediaType string, content []byte) oci.Descriptor {
	t.Helper()
	desc := describe(mediaType, content)
	got, err := reg.PushBlob(t.Context(), repo, desc, bytes.NewReader(content))
	if err != nil {
		t.Fatalf("PushBlob(%s, %s): %v", repo, desc.Digest, err)
	}
	if got.Digest != desc.Digest || got.Size != desc.Size {
		t.Fatalf("PushBlob(%s) returned %s, %d bytes; want %s, %d bytes", repo, got.Digest, got.Size, desc.Digest, desc.Size)
	}
	return desc
}

// pushImage pushes an image with one layer that depends on seed. edit, which
// may be nil, changes the manifest before it is pushed.
func pushImage(t *testing.T, reg oci.Registry, repo, reference string, seed byte, edit func(*oci.ImageManifest)) oci.Manifest {
	t.Helper()
	m := oci.ImageManifest{
		Versioned: oci.Versioned{SchemaVersion: 2},
		MediaType: oci.MediaTypeImageManifest,
		Config:    pushBlob(t, reg, repo, oci.MediaTypeImageConfig, []byte(`{"architecture":"amd64","os":"linux"}`)),
		Layers:    []oci.Descriptor{pushBlob(t, reg, repo, oci.MediaTypeLayerGzip, random(seed, 1000))},
	}
	if edit != nil {
		edit(&m)
	}
	return pushManifest(t, reg, repo, reference, m.MediaType, m)
}

// pushManifest pushes doc as JSON. An empty reference means its digest.
func pushManifest(t *testing.T, reg oci.Registry, repo, reference, mediaType string, doc any) oci.Manifest {
	t.Helper()
	content := encode(t, doc)
	want := describe(mediaType, content)
	if reference == "" {
		reference = want.Digest.String()
	}
	got, err := reg.PushManifest(t.Context(), repo, reference, mediaType, content)
	if err != nil {
		t.Fatalf("PushManifest(%s, %s): %v", repo, reference, err)
	}
	if got.MediaType != want.MediaType || got.Digest != want.Digest || got.Size != want.Size {
		t.Fatalf("PushManifest(%s, %s) returned %+v, want %+v", repo, reference, got, want)
	}
	return oci.Manifest{Descriptor: want, Content: content}
}

func encode(t *testing.T, doc any) []byte {
	t.Helper()
	content, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// checkManifest checks that reference names want.
func checkManifest(t *testing.T, reg oci.Registry, repo, reference string, want oci.Manifest) {
	t.Helper()
	got, err := reg.GetManifest(t.Context(), repo, reference)
	if err != nil {
		t.Fatalf("GetManifest(%s, %s): %v", repo, reference, err)
	}
	if !bytes.Equal(got.Content, want.Content) {
		t.Errorf("GetManifest(%s, %s): content is\n%s\nwant\n%s", repo, reference, got.Content, want.Content)
	}
	desc, err := reg.ResolveManifest(t.Context(), repo, reference)
	if err != nil {
		t.Fatalf("ResolveManifest(%s, %s): %v", repo, reference, err)
	}
	for method, d := range map[string]oci.Descriptor{"GetManifest": got.Descriptor, "ResolveManifest": desc} {
		if d.MediaType != want.Descriptor.MediaType || d.Digest != want.Descriptor.Digest || d.Size != want.Descriptor.Size {
			t.Errorf("%s(%s, %s): %+v, want %+v", method, repo, reference, d, want.Descriptor)
		}
	}
}

// checkBlob checks that a blob is there and what it is.
func checkBlob(t *testing.T, reg oci.Registry, repo string, digest oci.Digest, want []byte) {
	t.Helper()
	r, err := reg.GetBlob(t.Context(), repo, digest)
	if err != nil {
		t.Fatalf("GetBlob(%s, %s): %v", repo, digest, err)
	}
	checkReader(t, r, digest, int64(len(want)), want)
	desc, err := reg.ResolveBlob(t.Context(), repo, digest)
	if err != nil {
		t.Fatalf("ResolveBlob(%s, %s): %v", repo, digest, err)
	}
	if desc.Digest != digest || desc.Size != int64(len(want)) {
		t.Errorf("ResolveBlob(%s): %s, %d bytes; want %s, %d bytes", repo, desc.Digest, desc.Size, digest, len(want))
	}
}

// checkReader checks what an open blob, or range of one, says and yields, and
// closes it.
func checkReader(t *testing.T, r oci.BlobReader, digest oci.Digest, size int64, want []byte) {
	t.Helper()
	defer r.Close()
	if d := r.Descriptor(); d.Digest != digest || d.Size != size {
		t.Errorf("descriptor of the reader: %s, %d bytes; want %s, %d bytes", d.Digest, d.Size, digest, size)
	}
	got, err := io.ReadAll(r)
	if err != nil {
		t.Errorf("reading %s: %v", digest, err)
	} else if !bytes.Equal(got, want) {
		t.Errorf("reading %s: got %d bytes that differ from the %d wanted", digest, len(got), len(want))
	}
}

// checkNoBlob checks that no trace of a blob is visible.
func checkNoBlob(t *testing.T, reg oci.Registry, repo string, digest oci.Digest) {
	t.Helper()
	r, err := reg.GetBlob(t.Context(), repo, digest)
	checkError(t, "GetBlob", err, oci.ErrBlobUnknown, oci.ErrNameUnknown)
	if err == nil {
		r.Close()
	}
	r, err = reg.GetBlobRange(t.Context(), repo, digest, 0, 1)
	checkError(t, "GetBlobRange", err, oci.ErrBlobUnknown, oci.ErrNameUnknown)
	if err == nil {
		r.Close()
	}
	_, err = reg.ResolveBlob(t.Context(), repo, digest)
	checkError(t, "ResolveBlob", err, oci.ErrBlobUnknown, oci.ErrNameUnknown)
}

// checkNoManifest checks that a tag or digest names nothing.
func checkNoManifest(t *testing.T, reg oci.Registry, repo, reference string) {
	t.Helper()
	_, err := reg.GetManifest(t.Context(), repo, reference)
	checkError(t, "GetManifest", err, oci.ErrManifestUnknown, oci.ErrNameUnknown)
	_, err = reg.ResolveManifest(t.Context(), repo, reference)
	checkError(t, "ResolveManifest", err, oci.ErrManifestUnknown, oci.ErrNameUnknown)
}

// checkError checks that err is one of those wanted.
func checkError(t *testing.T, what string, err error, want ...error) {
	t.Helper()
	for _, w := range want {
		if errors.Is(err, w) {
			return
		}
	}
	t.Errorf("%s: got error %v, want one that is %v", what, err, want)
}

// collect reads a whole sequence and checks that an error is its last element.
func collect[T any](t *testing.T, seq iter.Seq2[T, error]) ([]T, error) {
	t.Helper()
	var all []T
	var failed error
	for item, err := range seq {
		if failed != nil {
			t.Fatalf("the sequence goes on after the error %v", failed)
		}
		if failed = err; err == nil {
			all = append(all, item)
		}
	}
	return all, failed
}

// canceled returns a context that is done.
func canceled(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

// brokenReader yields content and then fails with errBroken.
type brokenReader struct{ content io.Reader }

var errBroken = errors.New("the source broke")

func (b brokenReader) Read(p []byte) (int, error) {
	n, err := b.content.Read(p)
	if err == io.EOF {
		err = errBroken
	}
	return n, err
}
