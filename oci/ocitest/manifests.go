package ocitest

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"sluice/oci"
)

func testManifest(t *testing.T, reg oci.Registry) {
	m := pushImage(t, reg, "img", "v1", 1, nil)
	digest := m.Descriptor.Digest
	checkManifest(t, reg, "img", "v1", m)
	checkManifest(t, reg, "img", digest.String(), m)
	checkNoManifest(t, reg, "img", "v2")
	checkNoManifest(t, reg, "img", oci.DigestOf([]byte("other")).String())
	checkNoManifest(t, reg, "img2", "v1")
	checkNoBlob(t, reg, "img", digest) // a manifest isn't a blob

	// The bytes are kept as they came, whatever the JSON looks like.
	spaced := append([]byte(" \n"), bytes.ReplaceAll(m.Content, []byte(`,`), []byte(" ,\n\t"))...)
	desc, err := reg.PushManifest(t.Context(), "img", "Spaced_1.0-x", oci.MediaTypeImageManifest, spaced)
	if err != nil {
		t.Fatal(err)
	}
	checkManifest(t, reg, "img", "Spaced_1.0-x", oci.Manifest{Descriptor: desc, Content: spaced})

	// Without a tag, and again with one.
	untagged := pushImage(t, reg, "img", "", 2, nil)
	checkManifest(t, reg, "img", untagged.Descriptor.Digest.String(), untagged)
	pushImage(t, reg, "img", strings.Repeat("t", 128), 2, nil)
	checkManifest(t, reg, "img", strings.Repeat("t", 128), untagged)

	_, err = reg.PushManifest(t.Context(), "img", oci.DigestOf([]byte("x")).String(), oci.MediaTypeImageManifest, m.Content)
	checkError(t, "PushManifest with another manifest's digest", err, oci.ErrDigestInvalid)
	checkNoManifest(t, reg, "img", oci.DigestOf([]byte("x")).String())

	_, err = reg.PushManifest(canceled(t), "img", "canceled", oci.MediaTypeImageManifest, m.Content)
	checkError(t, "PushManifest", err, context.Canceled)
	_, err = reg.GetManifest(canceled(t), "img", "v1")
	checkError(t, "GetManifest", err, context.Canceled)
	_, err = reg.ResolveManifest(canceled(t), "img", "v1")
	checkError(t, "ResolveManifest", err, context.Canceled)
	checkNoManifest(t, reg, "img", "canceled")
}

func testDockerManifest(t *testing.T, reg oci.Registry) {
	docker := func(m *oci.ImageManifest) {
		m.MediaType = oci.MediaTypeDockerManifest
		m.Config.MediaType = oci.MediaTypeDockerConfig
		m.Layers[0].MediaType = oci.MediaTypeDockerLayerGzip
	}
	m := pushImage(t, reg, "docker", "v1", 1, docker)
	checkManifest(t, reg, "docker", "v1", m)
	list := pushManifest(t, reg, "docker", "list", oci.MediaTypeDockerManifestList, oci.Index{
		Versioned: oci.Versioned{SchemaVersion: 2},
		MediaType: oci.MediaTypeDockerManifestList,
		Manifests: []oci.Descriptor{m.Descriptor},
	})
	checkManifest(t, reg, "docker", "list", list)
	checkManifest(t, reg, "docker", list.Descriptor.Digest.String(), list)
}

// index returns an index of manifests.
func index(manifests ...oci.Manifest) oci.Index {
	ix := oci.Index{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex, Manifests: []oci.Descriptor{}}
	for _, m := range manifests {
		desc := m.Descriptor
		desc.Platform = &oci.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
		ix.Manifests = append(ix.Manifests, desc)
	}
	return ix
}

func testIndex(t *testing.T, reg oci.Registry) {
	a := pushImage(t, reg, "index", "", 1, nil)
	b := pushImage(t, reg, "index", "", 2, nil)
	both := pushManifest(t, reg, "index", "both", oci.MediaTypeIndex, index(a, b))
	checkManifest(t, reg, "index", "both", both)
	nested := pushManifest(t, reg, "index", "nested", oci.MediaTypeIndex, index(both))
	checkManifest(t, reg, "index", "nested", nested)
	empty := pushManifest(t, reg, "index", "empty", oci.MediaTypeIndex, index())
	checkManifest(t, reg, "index", "empty", empty)

	// Build caches are indexes of blobs.
	cache := index()
	cache.Manifests = append(cache.Manifests, pushBlob(t, reg, "index", oci.MediaTypeLayerGzip, []byte("cached")))
	checkManifest(t, reg, "index", "cache", pushManifest(t, reg, "index", "cache", oci.MediaTypeIndex, cache))

	// The media type may be told by the request alone.
	bare := index(a)
	bare.MediaType = ""
	checkManifest(t, reg, "index", "bare", pushManifest(t, reg, "index", "bare", oci.MediaTypeIndex, bare))
}

func testManifestSHA512(t *testing.T, reg oci.Registry) {
	layer := random(30, 500)
	m := pushImage(t, reg, "sha512", "v1", 1, func(m *oci.ImageManifest) {
		desc := oci.Descriptor{MediaType: oci.MediaTypeLayer, Digest: oci.SHA512.FromBytes(layer), Size: 500}
		if _, err := reg.PushBlob(t.Context(), "sha512", desc, bytes.NewReader(layer)); err != nil {
			t.Fatal(err)
		}
		m.Layers[0] = desc
	})
	checkManifest(t, reg, "sha512", "v1", m)
	digest := oci.SHA512.FromBytes(m.Content)
	desc, err := reg.PushManifest(t.Context(), "sha512", digest.String(), oci.MediaTypeImageManifest, m.Content)
	if err != nil || desc.Digest != digest {
		t.Fatalf("PushManifest: %+v, %v", desc, err)
	}
	checkManifest(t, reg, "sha512", digest.String(), oci.Manifest{Descriptor: desc, Content: m.Content})
	checkManifest(t, reg, "sha512", "v1", m)
	if err := reg.DeleteManifest(t.Context(), "sha512", digest); err != nil {
		t.Fatal(err)
	}
	checkNoManifest(t, reg, "sha512", digest.String())
	checkManifest(t, reg, "sha512", "v1", m)
}

func testTagMoves(t *testing.T, reg oci.Registry) {
	first := pushImage(t, reg, "tags", "latest", 1, nil)
	second := pushImage(t, reg, "tags", "latest", 2, nil)
	checkManifest(t, reg, "tags", "latest", second)
	checkManifest(t, reg, "tags", first.Descriptor.Digest.String(), first)
	pushImage(t, reg, "tags", "latest", 1, nil)
	checkManifest(t, reg, "tags", "latest", first)
}

func testInvalidManifest(t *testing.T, reg oci.Registry) {
	good := string(pushImage(t, reg, "invalid", "good", 1, nil).Content)
	edit := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("%s\ndoesn't contain %q", good, old)
		}
		return strings.Replace(good, old, new, 1)
	}
	for name, test := range map[string]struct{ mediaType, content string }{
		"nothing":            {oci.MediaTypeImageManifest, ""},
		"not JSON":           {oci.MediaTypeImageManifest, "<html>"},
		"cut":                {oci.MediaTypeImageManifest, good[:len(good)-1]},
		"more":               {oci.MediaTypeImageManifest, good + "{}"},
		"null":               {oci.MediaTypeImageManifest, "null"},
		"array":              {oci.MediaTypeImageManifest, "[" + good + "]"},
		"not UTF-8":          {oci.MediaTypeImageManifest, edit(`{`, "{\"x\":\"\xff\",")},
		"repeated":           {oci.MediaTypeImageManifest, edit(`{`, `{"layers":[],`)},
		"repeated, unknown":  {oci.MediaTypeImageManifest, edit(`{`, `{"x":{"y":1,"y":2},`)},
		"misspelt":           {oci.MediaTypeImageManifest, edit(`"layers"`, `"Layers"`)},
		"deep":               {oci.MediaTypeImageManifest, edit(`{`, `{"x":`+strings.Repeat("[", 10_000)+strings.Repeat("]", 10_000)+`,`)},
		"schema 1":           {oci.MediaTypeImageManifest, edit(`"schemaVersion":2`, `"schemaVersion":1`)},
		"no schema":          {oci.MediaTypeImageManifest, edit(`"schemaVersion":2,`, ``)},
		"schema as string":   {oci.MediaTypeImageManifest, edit(`"schemaVersion":2`, `"schemaVersion":"2"`)},
		"other media type":   {oci.MediaTypeDockerManifest, good},
		"index as image":     {oci.MediaTypeIndex, good},
		"unknown type":       {"application/json", good},
		"layer type":         {oci.MediaTypeLayer, good},
		"no type":            {"", good},
		"no config":          {oci.MediaTypeImageManifest, edit(`"config"`, `"conf"`)},
		"config is a string": {oci.MediaTypeImageManifest, edit(`"config":`, `"config":"x","was":`)},
		"layers an object":   {oci.MediaTypeImageManifest, edit(`"layers":`, `"layers":{},"was":`)},
		"null layer":         {oci.MediaTypeImageManifest, edit(`"layers":[`, `"layers":[null,`)},
		"negative size":      {oci.MediaTypeImageManifest, edit(`"size":`, `"size":-`)},
		"fraction":           {oci.MediaTypeImageManifest, edit(`"size":`, `"size":0.5,"was":`)},
		"huge size":          {oci.MediaTypeImageManifest, edit(`"size":`, `"size":9223372036854775808,"was":`)},
		"no size":            {oci.MediaTypeImageManifest, edit(`"size":`, `"was":`)},
		"bad digest":         {oci.MediaTypeImageManifest, edit(`"digest":"sha256:`, `"digest":"sha256:z`)},
		"md5 digest":         {oci.MediaTypeImageManifest, edit(`"digest":"sha256:`, `"digest":"md5:d41d8cd98f00b204e9800998ecf8427e","was":"`)},
		"no digest":          {oci.MediaTypeImageManifest, edit(`"digest":`, `"was":`)},
		"annotation":         {oci.MediaTypeImageManifest, edit(`{`, `{"annotations":{"a":1},`)},
		"subject":            {oci.MediaTypeImageManifest, edit(`{`, `{"subject":{"digest":"x"},`)},
		"data":               {oci.MediaTypeImageManifest, edit(`"size":`, `"data":"bGll","size":`)},
		"image and index":    {oci.MediaTypeImageManifest, edit(`{`, `{"manifests":[],`)},
		"index and image":    {oci.MediaTypeIndex, `{"schemaVersion":2,"manifests":[],"layers":[]}`},
	} {
		_, err := reg.PushManifest(t.Context(), "invalid", "bad", test.mediaType, []byte(test.content))
		checkError(t, "PushManifest, "+name, err, oci.ErrManifestInvalid)
	}
	checkNoManifest(t, reg, "invalid", "bad")
}

func testMissingReferences(t *testing.T, reg oci.Registry) {
	good := pushImage(t, reg, "missing", "good", 1, nil)
	absent := describe(oci.MediaTypeLayer, []byte("absent"))
	elsewhere := pushBlob(t, reg, "elsewhere", oci.MediaTypeLayer, []byte("elsewhere"))
	image := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest}
	config := pushBlob(t, reg, "missing", oci.MediaTypeImageConfig, []byte(`{}`))
	for name, test := range map[string]struct {
		mediaType string
		doc       any
	}{
		"config":           {oci.MediaTypeImageManifest, oci.ImageManifest{Versioned: image.Versioned, Config: absent}},
		"layer":            {oci.MediaTypeImageManifest, oci.ImageManifest{Versioned: image.Versioned, Config: config, Layers: []oci.Descriptor{config, absent}}},
		"other repository": {oci.MediaTypeImageManifest, oci.ImageManifest{Versioned: image.Versioned, Config: config, Layers: []oci.Descriptor{elsewhere}}},
		"manifest as blob": {oci.MediaTypeImageManifest, oci.ImageManifest{Versioned: image.Versioned, Config: config, Layers: []oci.Descriptor{{MediaType: oci.MediaTypeLayer, Digest: good.Descriptor.Digest, Size: good.Descriptor.Size}}}},
		"manifest":         {oci.MediaTypeIndex, index(good, oci.Manifest{Descriptor: describe(oci.MediaTypeImageManifest, []byte("absent"))})},
		"blob of index":    {oci.MediaTypeIndex, index(oci.Manifest{Descriptor: absent})},
	} {
		_, err := reg.PushManifest(t.Context(), "missing", "bad", test.mediaType, encode(t, test.doc))
		checkError(t, "PushManifest, missing "+name, err, oci.ErrManifestBlobUnknown)
	}
	wrong := config
	wrong.Size++
	_, err := reg.PushManifest(t.Context(), "missing", "bad", oci.MediaTypeImageManifest,
		encode(t, oci.ImageManifest{Versioned: image.Versioned, Config: wrong, Layers: []oci.Descriptor{}}))
	checkError(t, "PushManifest, wrong size of config", err, oci.ErrManifestInvalid)
	checkNoManifest(t, reg, "missing", "bad")
}

func testForeignLayers(t *testing.T, reg oci.Registry) {
	m := pushImage(t, reg, "foreign", "v1", 1, func(m *oci.ImageManifest) {
		linked := describe(oci.MediaTypeLayer, []byte("linked"))
		linked.URLs = []string{"https://example.com/layer"}
		m.Layers = append(m.Layers, linked,
			describe(oci.MediaTypeDockerForeignLayer, []byte("docker")),
			describe("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", []byte("oci")))
	})
	checkManifest(t, reg, "foreign", "v1", m)
}

func testManifestSize(t *testing.T, reg oci.Registry) {
	padded := func(size int) []byte {
		content := []byte(`{"schemaVersion":2,"manifests":[]}`)
		return append(content, bytes.Repeat([]byte(" "), size-len(content))...)
	}
	largest := padded(oci.MaxManifestSize)
	desc, err := reg.PushManifest(t.Context(), "size", "largest", oci.MediaTypeIndex, largest)
	if err != nil {
		t.Fatalf("a manifest of MaxManifestSize: %v", err)
	}
	checkManifest(t, reg, "size", "largest", oci.Manifest{Descriptor: desc, Content: largest})
	_, err = reg.PushManifest(t.Context(), "size", "larger", oci.MediaTypeIndex, padded(oci.MaxManifestSize+1))
	checkError(t, "a manifest larger than MaxManifestSize", err, oci.ErrManifestInvalid, oci.ErrSizeInvalid)
	checkNoManifest(t, reg, "size", "larger")
}

func testDeleteManifest(t *testing.T, reg oci.Registry) {
	gone := pushImage(t, reg, "delete", "one", 1, nil)
	pushImage(t, reg, "delete", "two", 1, nil)
	kept := pushImage(t, reg, "delete", "three", 2, nil)
	digest := gone.Descriptor.Digest
	if err := reg.DeleteManifest(t.Context(), "delete", digest); err != nil {
		t.Fatal(err)
	}
	for _, reference := range []string{"one", "two", digest.String()} {
		checkNoManifest(t, reg, "delete", reference)
	}
	checkManifest(t, reg, "delete", "three", kept)
	checkTags(t, reg, "delete", "", "three")
	err := reg.DeleteManifest(t.Context(), "delete", digest)
	checkError(t, "DeleteManifest again", err, oci.ErrManifestUnknown)
	err = reg.DeleteManifest(t.Context(), "nowhere", digest)
	checkError(t, "DeleteManifest in an unknown repository", err, oci.ErrManifestUnknown, oci.ErrNameUnknown)
	// What it referred to is still there, so it can be pushed again.
	again, err := reg.PushManifest(t.Context(), "delete", "one", gone.Descriptor.MediaType, gone.Content)
	if err != nil || again.Digest != digest {
		t.Fatalf("PushManifest after DeleteManifest: %v, %v", again, err)
	}
	checkManifest(t, reg, "delete", "one", gone)
	checkNoManifest(t, reg, "delete", "two")
}

func testDeleteTag(t *testing.T, reg oci.Registry) {
	m := pushImage(t, reg, "delete", "one", 1, nil)
	pushImage(t, reg, "delete", "two", 1, nil)
	if err := reg.DeleteTag(t.Context(), "delete", "one"); err != nil {
		t.Fatal(err)
	}
	checkNoManifest(t, reg, "delete", "one")
	checkManifest(t, reg, "delete", "two", m)
	if err := reg.DeleteTag(t.Context(), "delete", "two"); err != nil {
		t.Fatal(err)
	}
	checkManifest(t, reg, "delete", m.Descriptor.Digest.String(), m)
	checkTags(t, reg, "delete", "")
	err := reg.DeleteTag(t.Context(), "delete", "one")
	checkError(t, "DeleteTag again", err, oci.ErrManifestUnknown)
	err = reg.DeleteTag(t.Context(), "nowhere", "one")
	checkError(t, "DeleteTag in an unknown repository", err, oci.ErrManifestUnknown, oci.ErrNameUnknown)
}

func testConcurrentManifests(t *testing.T, reg oci.Registry) {
	// Writers move one tag between two manifests; readers must always find
	// one of them, whole.
	manifests := []oci.Manifest{pushImage(t, reg, "con", "tag", 1, nil), pushImage(t, reg, "con", "tag", 2, nil)}
	var wait sync.WaitGroup
	for i := range 4 {
		wait.Go(func() {
			for round := range 5 {
				m := manifests[(i+round)%2]
				for _, tag := range []string{"tag", fmt.Sprintf("tag-%d", i)} {
					if _, err := reg.PushManifest(t.Context(), "con", tag, m.Descriptor.MediaType, m.Content); err != nil {
						t.Errorf("PushManifest: %v", err)
					}
				}
			}
		})
		wait.Go(func() {
			for range 10 {
				m, err := reg.GetManifest(t.Context(), "con", "tag")
				if err != nil {
					t.Errorf("GetManifest: %v", err)
				} else if !bytes.Equal(m.Content, manifests[0].Content) && !bytes.Equal(m.Content, manifests[1].Content) {
					t.Errorf("GetManifest: got a manifest that nobody pushed:\n%s", m.Content)
				}
			}
		})
	}
	wait.Wait()
	for i := range 4 {
		checkManifest(t, reg, "con", fmt.Sprintf("tag-%d", i), manifests[i%2])
	}
}
