package oci_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sluice/oci"
)

const imageManifest = `{
	"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
	"config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", "size": 2, "data": "e30="},
	"layers": [
		{"mediaType": "l", "digest": "` + someDigest + `", "size": 5, "annotations": {"k": "v", "K": "V"}},
		{"mediaType": "l", "digest": "` + someDigest + `", "size": 5, "urls": ["https://example.com"]}],
	"subject": {"mediaType": "s", "digest": "` + someDigest + `", "size": 6},
	"annotations": {"a": "b"}, "x-extension": {"Layers": [1, null, {}]}
}`

func TestParseManifestInfo(t *testing.T) {
	config := oci.Descriptor{MediaType: "application/vnd.oci.empty.v1+json", Digest: oci.DigestOf([]byte("{}")), Size: 2, Data: []byte("{}")}
	subject := oci.Descriptor{MediaType: "s", Digest: someDigest, Size: 6}
	image := oci.ManifestInfo{
		Blobs:        []oci.Descriptor{config, {MediaType: "l", Digest: someDigest, Size: 5, Annotations: map[string]string{"k": "v", "K": "V"}}},
		Foreign:      []oci.Descriptor{{MediaType: "l", Digest: someDigest, Size: 5, URLs: []string{"https://example.com"}}},
		Subject:      &subject,
		ArtifactType: config.MediaType,
		Annotations:  map[string]string{"a": "b"},
	}
	typed, docker := image, image
	typed.ArtifactType = "t"
	docker.Subject = nil
	nulls := oci.ManifestInfo{Blobs: []oci.Descriptor{config}, ArtifactType: config.MediaType}
	index := oci.ManifestInfo{
		Manifests:    []oci.Descriptor{{MediaType: oci.MediaTypeDockerManifest, Digest: someDigest, Size: 1, Platform: &oci.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}}},
		Blobs:        []oci.Descriptor{{MediaType: "blob", Digest: someDigest, Size: 2, ArtifactType: "x"}},
		Subject:      &subject,
		ArtifactType: "t",
	}
	for name, test := range map[string]struct {
		mediaType, content string
		want               oci.ManifestInfo
	}{
		"image":        {oci.MediaTypeImageManifest, imageManifest, image},
		"artifactType": {oci.MediaTypeImageManifest, strings.Replace(imageManifest, `{`, `{"artifactType": "t",`, 1), typed},
		"docker":       {oci.MediaTypeDockerManifest, strings.Replace(imageManifest, oci.MediaTypeImageManifest, oci.MediaTypeDockerManifest, 1), docker},
		"nulls": {oci.MediaTypeImageManifest, `{"schemaVersion":2,"mediaType":null,"subject":null,"annotations":null,"layers":null,"manifests":null,
			"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"` + config.Digest.String() + `","size":2,"data":"e30=","urls":null,"platform":null}}`, nulls},
		"index": {oci.MediaTypeIndex, `{"schemaVersion":2,"artifactType":"t","manifests":[
			{"mediaType":"` + oci.MediaTypeDockerManifest + `","digest":"` + someDigest + `","size":1,"platform":{"os":"linux","architecture":"arm","variant":"v7"}},
			{"mediaType":"blob","digest":"` + someDigest + `","size":2,"artifactType":"x"}],
			"subject":{"mediaType":"s","digest":"` + someDigest + `","size":6}}`, index},
	} {
		got, err := oci.ParseManifestInfo([]byte(test.content), test.mediaType)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if diff := cmp.Diff(&test.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", name, diff)
		}
	}
}

func TestParseManifestInfoErrors(t *testing.T) {
	// ocitest has the long list; these are the messages.
	for want, content := range map[string]string{
		"repeated":               strings.Replace(imageManifest, `{`, `{"config": {},`, 1),
		`"Config" is a misspelt`: strings.Replace(imageManifest, `{`, `{"Config": {},`, 1),
		"nested deeper":          strings.Replace(imageManifest, `{`, `{"x": `+strings.Repeat("[", 100)+strings.Repeat("]", 100)+`,`, 1),
		"layers[0]: size: a":     strings.Replace(imageManifest, `"size": 5`, `"size": "5"`, 1),
		"layers[1]: urls: a":     strings.Replace(imageManifest, `["https://example.com"]`, `[1]`, 1),
		"config: data":           strings.Replace(imageManifest, `"e30="`, `"e3w="`, 1),
		"something follows":      imageManifest + "x",
		"unexpected EOF":         imageManifest[:len(imageManifest)/2],
		"schemaVersion":          `{}`,
		"must be an object":      strings.Replace(imageManifest, `"layers": [`, `"layers": [null,`, 1),
		"bytes: 4194304":         strings.Repeat(" ", oci.MaxManifestSize+1),
	} {
		_, err := oci.ParseManifestInfo([]byte(content), oci.MediaTypeImageManifest)
		switch {
		case !errors.Is(err, oci.ErrManifestInvalid):
			t.Errorf("want an error with %q, got %v", want, err)
		case !strings.Contains(err.Error(), want):
			t.Errorf("error %q doesn't contain %q", err, want)
		}
	}
}

func TestCheckReferences(t *testing.T) {
	info := oci.ManifestInfo{
		Blobs:     []oci.Descriptor{{Digest: someDigest, Size: 5}},
		Manifests: []oci.Descriptor{{Digest: someDigest, Size: 7}},
	}
	broken := errors.New("broken")
	size := func(n int64, err error) func(oci.Digest) (int64, error) {
		return func(oci.Digest) (int64, error) { return n, err }
	}
	for name, test := range map[string]struct {
		blob, manifest func(oci.Digest) (int64, error)
		want           error
	}{
		"good":             {size(5, nil), size(7, nil), nil},
		"no blob":          {size(0, oci.ErrBlobUnknown), size(7, nil), oci.ErrManifestBlobUnknown},
		"no manifest":      {size(5, nil), size(0, oci.ErrManifestUnknown), oci.ErrManifestBlobUnknown},
		"no repository":    {size(0, oci.ErrNameUnknown), size(7, nil), oci.ErrManifestBlobUnknown},
		"size of blob":     {size(6, nil), size(7, nil), oci.ErrManifestInvalid},
		"size of manifest": {size(5, nil), size(8, nil), oci.ErrManifestInvalid},
		"broken":           {size(5, nil), size(0, broken), broken},
	} {
		if err := info.CheckReferences(test.blob, test.manifest); !errors.Is(err, test.want) || (test.want == nil) != (err == nil) {
			t.Errorf("%s: got error %v, want %v", name, err, test.want)
		}
	}
}

func FuzzParseManifestInfo(f *testing.F) {
	f.Add([]byte(imageManifest), byte(0))
	f.Add([]byte(`{"schemaVersion":2,"manifests":[]}`), byte(1))
	f.Add([]byte(`{"schemaVersion":2,"layers":[{"size":-1}],"config":null}`), byte(0))
	f.Add([]byte(`[[[{"a":{"a":1},"a":2}]]]`), byte(3))
	types := []string{oci.MediaTypeImageManifest, oci.MediaTypeIndex, oci.MediaTypeDockerManifest, oci.MediaTypeDockerManifestList}
	f.Fuzz(func(t *testing.T, content []byte, kind byte) {
		mediaType := types[int(kind)%len(types)]
		info, err := oci.ParseManifestInfo(content, mediaType)
		if err != nil {
			if !errors.Is(err, oci.ErrManifestInvalid) {
				t.Errorf("%v is not ErrManifestInvalid", err)
			}
			return
		}
		all := append(append(info.Blobs, info.Foreign...), info.Manifests...)
		if info.Subject != nil {
			all = append(all, *info.Subject)
		}
		for _, desc := range all {
			if _, err := oci.ParseDigest(desc.Digest.String()); err != nil || desc.Size < 0 || desc.MediaType == "" {
				t.Errorf("accepted the descriptor %+v", desc)
			}
		}
	})
}
