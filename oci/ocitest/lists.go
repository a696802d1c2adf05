package ocitest

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"

	"sluice/oci"
)

func checkTags(t *testing.T, reg oci.Registry, repo, last string, want ...string) {
	t.Helper()
	got, err := collect(t, reg.Tags(t.Context(), repo, last))
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("Tags(%s, %q): %q, %v; want %q", repo, last, got, err, want)
	}
}

func testRepositories(t *testing.T, reg oci.Registry) {
	check := func(last string, want ...string) {
		t.Helper()
		got, err := collect(t, reg.Repositories(t.Context(), last))
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("Repositories(%q): %q, %v; want %q", last, got, err, want)
		}
	}
	check("")
	blob := pushBlob(t, reg, "only/blob", oci.MediaTypeLayer, []byte("blob"))
	m := pushManifest(t, reg, "a/b", "x", oci.MediaTypeIndex, index())
	for _, repo := range []string{"b", "a", "a-b", "a/b/c", "a0", "z"} {
		pushManifest(t, reg, repo, "x", oci.MediaTypeIndex, index())
	}
	check("", "a", "a-b", "a/b", "a/b/c", "a0", "b", "only/blob", "z") // "-" < "/" < "0"
	check("a-b", "a/b", "a/b/c", "a0", "b", "only/blob", "z")
	check("a/", "a/b", "a/b/c", "a0", "b", "only/blob", "z")
	check("y", "z")
	check("z")
	check("zz")
	for repo, err := range reg.Repositories(t.Context(), "") { // stopping early is fine
		if err != nil || repo != "a" {
			t.Errorf("first repository: %q, %v", repo, err)
		}
		break
	}
	// A repository is gone with the last thing in it.
	if err := reg.DeleteBlob(t.Context(), "only/blob", blob.Digest); err != nil {
		t.Fatal(err)
	}
	if err := reg.DeleteManifest(t.Context(), "a/b", m.Descriptor.Digest); err != nil {
		t.Fatal(err)
	}
	check("", "a", "a-b", "a/b/c", "a0", "b", "z")
}

func testTags(t *testing.T, reg oci.Registry) {
	_, err := collect(t, reg.Tags(t.Context(), "tags", ""))
	checkError(t, "Tags of an unknown repository", err, oci.ErrNameUnknown)
	pushManifest(t, reg, "tags", "", oci.MediaTypeIndex, index())
	checkTags(t, reg, "tags", "")
	for _, tag := range []string{"b", "a", "B", "_", "1.10", "1.9", "a-1"} {
		pushManifest(t, reg, "tags", tag, oci.MediaTypeIndex, index())
	}
	checkTags(t, reg, "tags", "", "1.10", "1.9", "B", "_", "a", "a-1", "b")
	checkTags(t, reg, "tags", "B", "_", "a", "a-1", "b")
	checkTags(t, reg, "tags", "C", "_", "a", "a-1", "b")
	checkTags(t, reg, "tags", "b")
	checkTags(t, reg, "tags", "zzz")
	for tag, err := range reg.Tags(t.Context(), "tags", "B") { // stopping early is fine
		if err != nil || tag != "_" {
			t.Errorf("first tag: %q, %v", tag, err)
		}
		break
	}
}

func testManyTags(t *testing.T, reg oci.Registry) {
	var want []string
	for i := range 300 {
		tag := fmt.Sprintf("t%04d", i)
		want = append(want, tag)
		pushManifest(t, reg, "many", tag, oci.MediaTypeIndex, index())
	}
	checkTags(t, reg, "many", "", want...)
	checkTags(t, reg, "many", "t0149", want[150:]...)
}

func testListContext(t *testing.T, reg oci.Registry) {
	m := pushManifest(t, reg, "context", "tag", oci.MediaTypeIndex, index())
	_, err := collect(t, reg.Repositories(canceled(t), ""))
	checkError(t, "Repositories", err, context.Canceled)
	_, err = collect(t, reg.Tags(canceled(t), "context", ""))
	checkError(t, "Tags", err, context.Canceled)
	_, err = collect(t, reg.Referrers(canceled(t), "context", m.Descriptor.Digest, ""))
	checkError(t, "Referrers", err, context.Canceled)
}

// referrer is an image with a subject.
func referrer(t *testing.T, reg oci.Registry, repo string, subject oci.Manifest, artifactType string, seed byte) oci.Manifest {
	t.Helper()
	return pushImage(t, reg, repo, "", seed, func(m *oci.ImageManifest) {
		m.Subject = &subject.Descriptor
		m.ArtifactType = artifactType
		m.Annotations = map[string]string{"seed": fmt.Sprint(seed), "org.example.text": "a \"b\"\n<c>"}
	})
}

// checkReferrers compares Referrers with the descriptors wanted, in any order.
func checkReferrers(t *testing.T, reg oci.Registry, repo string, subject oci.Digest, artifactType string, want ...oci.Descriptor) {
	t.Helper()
	got, err := collect(t, reg.Referrers(t.Context(), repo, subject, artifactType))
	if err != nil {
		t.Fatalf("Referrers(%s, %s, %q): %v", repo, subject, artifactType, err)
	}
	slices.SortFunc(want, func(a, b oci.Descriptor) int { return cmp.Compare(a.Digest, b.Digest) })
	same := func(a, b oci.Descriptor) bool {
		return a.MediaType == b.MediaType && a.Digest == b.Digest && a.Size == b.Size &&
			a.ArtifactType == b.ArtifactType && maps.Equal(a.Annotations, b.Annotations)
	}
	if !slices.EqualFunc(got, want, same) {
		t.Errorf("Referrers(%s, %s, %q):\n%+v\nwant\n%+v", repo, subject, artifactType, got, want)
	}
}

// asReferrer is what Referrers yields for a manifest that referrer pushed.
func asReferrer(m oci.Manifest, artifactType string, seed byte) oci.Descriptor {
	desc := m.Descriptor
	desc.ArtifactType = artifactType
	desc.Annotations = map[string]string{"seed": fmt.Sprint(seed), "org.example.text": "a \"b\"\n<c>"}
	return desc
}

func testReferrers(t *testing.T, reg oci.Registry) {
	const repo = "ref/errers"
	subject := oci.Manifest{Descriptor: describe(oci.MediaTypeImageManifest, []byte("not pushed yet"))}
	checkReferrers(t, reg, repo, subject.Descriptor.Digest, "") // an unknown repository has none
	a := referrer(t, reg, repo, subject, oci.ArtifactTypeStreaming, 1)
	checkReferrers(t, reg, repo, subject.Descriptor.Digest, "", asReferrer(a, oci.ArtifactTypeStreaming, 1))
	b := referrer(t, reg, repo, subject, "application/vnd.example+json; x=1", 2)
	c := referrer(t, reg, repo, subject, "", 3) // the config's media type stands in
	da, db, dc := asReferrer(a, oci.ArtifactTypeStreaming, 1), asReferrer(b, "application/vnd.example+json; x=1", 2), asReferrer(c, oci.MediaTypeImageConfig, 3)
	checkReferrers(t, reg, repo, subject.Descriptor.Digest, "", da, db, dc)
	checkReferrers(t, reg, repo, subject.Descriptor.Digest, oci.ArtifactTypeStreaming, da)
	checkReferrers(t, reg, repo, subject.Descriptor.Digest, "application/vnd.example+json; x=1", db)
	checkReferrers(t, reg, repo, subject.Descriptor.Digest, oci.MediaTypeImageConfig, dc)
	checkReferrers(t, reg, repo, subject.Descriptor.Digest, "application/none")
	checkReferrers(t, reg, repo, a.Descriptor.Digest, "")
	checkReferrers(t, reg, "ref", subject.Descriptor.Digest, "")

	referrer(t, reg, repo, subject, oci.ArtifactTypeStreaming, 1) // again: still once
	checkReferrers(t, reg, repo, subject.Descriptor.Digest, "", da, db, dc)

	if err := reg.DeleteManifest(t.Context(), repo, b.Descriptor.Digest); err != nil {
		t.Fatal(err)
	}
	checkReferrers(t, reg, repo, subject.Descriptor.Digest, "", da, dc)

	// Deleting the subject leaves them.
	real := pushImage(t, reg, repo, "real", 4, nil)
	d := referrer(t, reg, repo, real, "application/vnd.example", 5)
	if err := reg.DeleteManifest(t.Context(), repo, real.Descriptor.Digest); err != nil {
		t.Fatal(err)
	}
	checkReferrers(t, reg, repo, real.Descriptor.Digest, "", asReferrer(d, "application/vnd.example", 5))

	// A subject by sha512.
	long := oci.Manifest{Descriptor: oci.Descriptor{MediaType: oci.MediaTypeImageManifest, Digest: oci.SHA512.FromString("long"), Size: 4}}
	e := referrer(t, reg, repo, long, oci.ArtifactTypeStreaming, 6)
	checkReferrers(t, reg, repo, long.Descriptor.Digest, "", asReferrer(e, oci.ArtifactTypeStreaming, 6))
	if err := reg.DeleteManifest(t.Context(), repo, e.Descriptor.Digest); err != nil {
		t.Fatal(err)
	}
	checkReferrers(t, reg, repo, long.Descriptor.Digest, "")
}

func testReferrerIndex(t *testing.T, reg oci.Registry) {
	subject := pushImage(t, reg, "refix", "v1", 1, nil)
	ix := index(subject)
	ix.Subject = &subject.Descriptor
	ix.ArtifactType = "application/vnd.example"
	ix.Annotations = map[string]string{"k": "v"}
	m := pushManifest(t, reg, "refix", "", oci.MediaTypeIndex, ix)
	want := m.Descriptor
	want.ArtifactType, want.Annotations = "application/vnd.example", map[string]string{"k": "v"}
	checkReferrers(t, reg, "refix", subject.Descriptor.Digest, "", want)

	// A referrer of the referrer, and one without any type.
	second := index()
	second.Subject = &m.Descriptor
	n := pushManifest(t, reg, "refix", "tagged", oci.MediaTypeIndex, second)
	checkReferrers(t, reg, "refix", m.Descriptor.Digest, "", n.Descriptor)
	checkReferrers(t, reg, "refix", m.Descriptor.Digest, "application/vnd.example")
	checkReferrers(t, reg, "refix", subject.Descriptor.Digest, "application/vnd.example", want)
}

func testManyReferrers(t *testing.T, reg oci.Registry) {
	subject := pushImage(t, reg, "many", "v1", 1, nil)
	var want []oci.Descriptor
	for i := range byte(60) {
		want = append(want, asReferrer(referrer(t, reg, "many", subject, oci.ArtifactTypeStreaming, i), oci.ArtifactTypeStreaming, i))
	}
	checkReferrers(t, reg, "many", subject.Descriptor.Digest, "", want...)
	checkReferrers(t, reg, "many", subject.Descriptor.Digest, oci.ArtifactTypeStreaming, want...)
	for _, err := range reg.Referrers(t.Context(), "many", subject.Descriptor.Digest, "") { // stopping early is fine
		if err != nil {
			t.Error(err)
		}
		break
	}
}

func testConcurrentReferrers(t *testing.T, reg oci.Registry) {
	subject := pushImage(t, reg, "con", "v1", 1, nil)
	const pushers = 8
	want := make([]oci.Descriptor, pushers)
	docs := make([][]byte, pushers)
	for i := range docs {
		ix := index()
		ix.Subject = &subject.Descriptor
		ix.ArtifactType = "application/vnd.example"
		ix.Annotations = map[string]string{"i": fmt.Sprint(i)}
		docs[i] = encode(t, ix)
		want[i] = describe(oci.MediaTypeIndex, docs[i])
		want[i].ArtifactType, want[i].Annotations = ix.ArtifactType, ix.Annotations
	}
	var wait sync.WaitGroup
	for i, doc := range docs {
		wait.Go(func() {
			if _, err := reg.PushManifest(t.Context(), "con", want[i].Digest.String(), oci.MediaTypeIndex, doc); err != nil {
				t.Errorf("PushManifest: %v", err)
			}
		})
	}
	wait.Wait()
	checkReferrers(t, reg, "con", subject.Descriptor.Digest, "", want...)
}
