package convert

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/oci"
	"sluice/oci/ocimem"
)

const repo = "some/image"

// fixture is a registry with a repository to push test images to.
type fixture struct {
	*ocimem.Registry
	t testing.TB
}

func newFixture(t testing.TB) *fixture { return &fixture{ocimem.New(), t} }

func (f *fixture) blob(mediaType string, content []byte) oci.Descriptor {
	f.t.Helper()
	desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
	if _, err := f.PushBlob(f.t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
		f.t.Fatal(err)
	}
	return desc
}

func (f *fixture) push(reference, mediaType string, doc any) oci.Descriptor {
	f.t.Helper()
	content, err := json.Marshal(doc)
	if err != nil {
		f.t.Fatal(err)
	}
	if reference == "" {
		reference = oci.DigestOf(content).String()
	}
	desc, err := f.PushManifest(f.t.Context(), repo, reference, mediaType, content)
	if err != nil {
		f.t.Fatal(err)
	}
	desc.MediaType = mediaType
	return desc
}

// tarOf makes a tar with one file for each name and content, in order.
func tarOf(t testing.TB, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		if err := w.WriteHeader(&tar.Header{Name: files[i], Size: int64(len(files[i+1])), Mode: 0o755, ModTime: time.Unix(1e9, 0)}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t testing.TB, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zstded(t testing.TB, content []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(content, nil)
}

// imageSpec says what image to push.
type imageSpec struct {
	os, arch, variant string
	tars              [][]byte
	docker            bool
	tag               string
	change            func(m *oci.ImageManifest, config *oci.ImageConfig)
}

// image pushes an image, whose layers are gzip, zstd and plain tars in turn.
func (f *fixture) image(s imageSpec) oci.Descriptor {
	f.t.Helper()
	config := oci.ImageConfig{}
	config.OS, config.Architecture, config.Variant = s.os, s.arch, s.variant
	config.RootFS.Type = "layers"
	m := oci.ImageManifest{MediaType: oci.MediaTypeImageManifest}
	m.SchemaVersion = 2
	types := []string{oci.MediaTypeLayerGzip, oci.MediaTypeLayerZstd, oci.MediaTypeLayer}
	configType := oci.MediaTypeImageConfig
	if s.docker {
		m.MediaType = oci.MediaTypeDockerManifest
		types = []string{oci.MediaTypeDockerLayerGzip, oci.MediaTypeDockerLayerZstd, oci.MediaTypeDockerLayer}
		configType = oci.MediaTypeDockerConfig
	}
	for i, content := range s.tars {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf(content))
		stored := [][]byte{gzipped(f.t, content), zstded(f.t, content), content}[i%3]
		m.Layers = append(m.Layers, f.blob(types[i%3], stored))
	}
	if s.change != nil {
		s.change(&m, &config)
	}
	content, err := json.Marshal(config)
	if err != nil {
		f.t.Fatal(err)
	}
	if m.Config.MediaType == "" {
		m.Config = f.blob(configType, content)
	}
	return f.push(s.tag, m.MediaType, m)
}

func linux(arch string, tars ...[]byte) imageSpec {
	return imageSpec{os: "linux", arch: arch, tars: tars}
}

// referrers returns the streaming artifacts of a subject.
func (f *fixture) referrers(subject oci.Digest) []oci.Descriptor {
	f.t.Helper()
	var all []oci.Descriptor
	for d, err := range f.Referrers(f.t.Context(), repo, subject, oci.ArtifactTypeStreaming) {
		if err != nil {
			f.t.Fatal(err)
		}
		all = append(all, d)
	}
	return all
}

// verify proves the artifact that a referrer names.
func (f *fixture) verify(desc oci.Descriptor) *artifact.Manifest {
	f.t.Helper()
	m, err := f.GetManifest(f.t.Context(), repo, desc.Digest.String())
	if err != nil {
		f.t.Fatal(err)
	}
	parsed, err := artifact.ParseManifest(m.Content)
	if err != nil {
		f.t.Fatal(err)
	}
	config, err := f.GetBlob(f.t.Context(), repo, parsed.Config.Digest)
	if err != nil {
		f.t.Fatal(err)
	}
	defer config.Close()
	content, err := io.ReadAll(config)
	if err != nil {
		f.t.Fatal(err)
	}
	_, err = artifact.Verify(f.t.Context(), parsed, content, func(d oci.Descriptor) blob.Source { return blob.FromRegistry(f.Registry, repo, d) })
	if err != nil {
		f.t.Fatal(err)
	}
	return parsed
}

func layers(t testing.TB) [][]byte {
	big := strings.Repeat("some content that goes on and on; ", 50_000)
	base, same := tarOf(t, "bin/sh", "#!", "etc/passwd", "root", "big", big), tarOf(t, "twice", "twice")
	return [][]byte{base, tarOf(t, "etc/passwd", "me"), same, tarOf(t, ".wh.big", "", "empty", ""), same}
}

func TestConvertImage(t *testing.T) {
	for _, docker := range []bool{false, true} {
		t.Run(fmt.Sprintf("docker %t", docker), func(t *testing.T) {
			f := newFixture(t)
			spec := linux("amd64", layers(t)...)
			spec.docker, spec.tag = docker, "v1"
			subject := f.image(spec)
			var seen []Progress
			r, err := Convert(t.Context(), f, repo, "v1", Options{Progress: func(p Progress) { seen = append(seen, p) }})
			if err != nil {
				t.Fatal(err)
			}
			refs := f.referrers(subject.Digest)
			if len(refs) != 1 || len(r.Artifacts) != 1 || r.Artifacts[0].Descriptor.Digest != refs[0].Digest || r.Artifacts[0].ForIndex != nil || r.Existed() {
				t.Fatalf("referrers %v, result %+v", refs, r)
			}
			for k, v := range map[string]string{artifact.AnnotationFormat: "erofs", artifact.AnnotationVersion: "v1", artifact.AnnotationOS: "linux", artifact.AnnotationArch: "amd64"} {
				if refs[0].Annotations[k] != v {
					t.Errorf("the referrer's annotation %s is %q", k, refs[0].Annotations[k])
				}
			}
			m := f.verify(refs[0])
			if m.Subject.Digest != subject.Digest || m.Subject.MediaType != subject.MediaType || len(m.Layers) != 5 {
				t.Errorf("got %+v", m)
			}
			finished, read := 0, int64(0)
			for _, p := range seen {
				if p.Stage == StageLayer && p.Finished {
					finished, read = finished+1, read+p.Done
				}
			}
			a, end := r.Artifacts[0], seen[len(seen)-1]
			if finished != 5 || read != a.OriginalSize || end.Stage != StageDone || end.Size != read {
				t.Errorf("%d layers with %d bytes finished, the end was %+v", finished, read, end)
			}
			if a.Layers != 5 || a.TarSize == 0 || a.OriginalSize == 0 || a.LayersSize == 0 || a.MetadataSize == 0 {
				t.Errorf("got %+v", a)
			}
		})
	}
}

// The second time there's nothing to do, and nothing is written.
func TestConvertSkipsWhatExists(t *testing.T) {
	f := newFixture(t)
	subject := f.image(linux("amd64", layers(t)...))
	first, err := Convert(t.Context(), f, repo, subject.Digest.String(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	second, err := Convert(t.Context(), &faulty{Registry: f, denyWrites: true}, repo, subject.Digest.String(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if !second.Existed() || second.Artifacts[0].Descriptor.Digest != first.Artifacts[0].Descriptor.Digest {
		t.Errorf("got %+v", second)
	}
}

// Another format's artifact, or a damaged one, is no reason not to convert.
func TestConvertIsNotFooledByOtherReferrers(t *testing.T) {
	f := newFixture(t)
	subject := f.image(linux("amd64", layers(t)...))
	empty := f.blob("application/vnd.oci.empty.v1+json", []byte("{}"))
	for _, format := range []string{"overlaybd", "erofs"} {
		m := oci.ImageManifest{MediaType: oci.MediaTypeImageManifest, ArtifactType: oci.ArtifactTypeStreaming, Config: empty, Layers: []oci.Descriptor{empty},
			Subject: &subject, Annotations: map[string]string{artifact.AnnotationFormat: format, artifact.AnnotationVersion: "v1"}}
		m.SchemaVersion = 2
		f.push("", oci.MediaTypeImageManifest, m)
	}
	r, err := Convert(t.Context(), f, repo, subject.Digest.String(), Options{})
	if err != nil || r.Existed() {
		t.Fatalf("%+v, %v", r, err)
	}
	f.verify(r.Artifacts[0].Descriptor)
}

func (f *fixture) index(mediaType, tag string, entries ...oci.Descriptor) oci.Descriptor {
	ix := oci.Index{MediaType: mediaType, Manifests: entries}
	ix.SchemaVersion = 2
	return f.push(tag, mediaType, ix)
}

func on(desc oci.Descriptor, os, arch string) oci.Descriptor {
	desc.Platform = &oci.Platform{OS: os, Architecture: arch}
	return desc
}

func TestConvertIndex(t *testing.T) {
	for _, mediaType := range []string{oci.MediaTypeIndex, oci.MediaTypeDockerManifestList} {
		t.Run(mediaType, func(t *testing.T) {
			f := newFixture(t)
			tars := layers(t)
			amd := f.image(linux("amd64", tars...))
			arm := f.image(linux("arm64", tars[0]))
			windows := f.image(imageSpec{os: "windows", arch: "amd64", tars: tars[:1]})
			attestation := on(f.image(imageSpec{os: "unknown", arch: "unknown", tars: tars[1:2]}), "unknown", "unknown")
			attestation.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
			index := f.index(mediaType, "latest", on(amd, "linux", "amd64"), on(windows, "windows", "amd64"), arm, attestation, on(amd, "linux", "amd64"))
			r, err := Convert(t.Context(), f, repo, "latest", Options{})
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Artifacts) != 2 || len(r.Skipped) != 2 || r.Subject.Digest != index.Digest {
				t.Fatalf("got %+v", r)
			}
			ofIndex := f.referrers(index.Digest)
			if len(ofIndex) != 2 {
				t.Errorf("the index has %d artifacts", len(ofIndex))
			}
			for i, img := range []oci.Descriptor{amd, arm} {
				own, a := f.referrers(img.Digest), r.Artifacts[i]
				if len(own) != 1 || own[0].Digest != a.Descriptor.Digest || a.ForIndex == nil {
					t.Fatalf("image %d has %v", i, own)
				}
				m, again := f.verify(own[0]), f.verify(*a.ForIndex)
				if m.Subject.Digest != img.Digest || again.Subject.Digest != index.Digest {
					t.Errorf("subjects are %s and %s", m.Subject.Digest, again.Subject.Digest)
				}
				again.Subject = m.Subject
				if diff := cmp.Diff(m, again); diff != "" {
					t.Error(diff)
				}
			}
			for _, img := range []oci.Digest{windows.Digest, attestation.Digest} {
				if len(f.referrers(img)) != 0 {
					t.Errorf("%s was converted", img)
				}
			}
			again, err := Convert(t.Context(), &faulty{Registry: f, denyWrites: true}, repo, "latest", Options{})
			if err != nil || !again.Existed() {
				t.Errorf("again: %+v, %v", again, err)
			}
		})
	}
}

// An image that was converted alone is only linked when its index is converted.
func TestConvertIndexOfConvertedImages(t *testing.T) {
	f := newFixture(t)
	amd := f.image(linux("amd64", layers(t)...))
	alone, err := Convert(t.Context(), f, repo, amd.Digest.String(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	f.index(oci.MediaTypeIndex, "latest", on(amd, "linux", "amd64"))
	r, err := Convert(t.Context(), &faulty{Registry: f, denyUploads: true}, repo, "latest", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if r.Artifacts[0].Descriptor.Digest != alone.Artifacts[0].Descriptor.Digest || r.Artifacts[0].ForIndex == nil {
		t.Errorf("got %+v", r)
	}
}

// The way to an image makes no difference, nor do workers.
func TestConvertIsDeterministic(t *testing.T) {
	var digests []oci.Digest
	for i, opts := range []Options{{}, {Layers: 1, Workers: 1}, {Layers: 8, Workers: 4}} {
		f := newFixture(t)
		amd := f.image(linux("amd64", layers(t)...))
		reference := amd.Digest.String()
		if i > 0 {
			f.index(oci.MediaTypeIndex, "latest", on(f.image(linux("arm64", layers(t)[:2]...)), "linux", "arm64"), on(amd, "linux", "amd64"))
			reference = "latest"
		}
		r, err := Convert(t.Context(), f, repo, reference, opts)
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, r.Artifacts[len(r.Artifacts)-1].Descriptor.Digest)
	}
	if digests[0] != digests[1] || digests[0] != digests[2] {
		t.Errorf("got %v", digests)
	}
}

func TestConvertPlatforms(t *testing.T) {
	f := newFixture(t)
	amd, arm := f.image(linux("amd64", layers(t)...)), f.image(linux("arm64", layers(t)...))
	f.index(oci.MediaTypeIndex, "latest", on(amd, "linux", "amd64"), on(arm, "linux", "arm64"))
	r, err := Convert(t.Context(), f, repo, "latest", Options{Platforms: []oci.Platform{{OS: "linux", Architecture: "arm64"}}})
	if err != nil || len(r.Artifacts) != 1 || r.Artifacts[0].Image.Digest != arm.Digest || len(r.Skipped) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestConvertSaysWhyNot(t *testing.T) {
	f := newFixture(t)
	tars := layers(t)
	spec := func(change func(*oci.ImageManifest, *oci.ImageConfig)) imageSpec {
		return imageSpec{os: "linux", arch: "amd64", tars: tars[:2], change: change}
	}
	empty := f.blob("application/vnd.oci.empty.v1+json", []byte("{}"))
	converted := f.image(linux("s390x", tars...))
	r, err := Convert(t.Context(), f, repo, converted.Digest.String(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	windows := f.image(imageSpec{os: "windows", arch: "amd64", tars: tars[:1]})
	for what, c := range map[string]struct {
		reference string
		want      error
	}{
		"no tag":     {"nonesuch", ErrResourceNotFound},
		"no digest":  {oci.DigestOf([]byte("nonesuch")).String(), ErrResourceNotFound},
		"artifact":   {r.Artifacts[0].Descriptor.Digest.String(), ErrUnsupportedArtifactType},
		"windows":    {windows.Digest.String(), ErrUnsupportedPlatform},
		"no linux":   {f.index(oci.MediaTypeIndex, "", on(windows, "windows", "amd64")).Digest.String(), ErrNoSupportedPlatform},
		"no entries": {f.index(oci.MediaTypeIndex, "").Digest.String(), ErrNoSupportedPlatform},
		"chart":      {f.image(spec(func(m *oci.ImageManifest, _ *oci.ImageConfig) { m.Config = empty })).Digest.String(), ErrImageNotRunnable},
		"no layers":  {f.image(linux("amd64")).Digest.String(), ErrImageNotRunnable},
		"diff IDs": {f.image(spec(func(_ *oci.ImageManifest, c *oci.ImageConfig) { c.RootFS.DiffIDs = c.RootFS.DiffIDs[:1] })).Digest.String(),
			ErrImageNotRunnable},
		"bad diff ID": {f.image(spec(func(_ *oci.ImageManifest, c *oci.ImageConfig) { c.RootFS.DiffIDs[0] = "sha256:x" })).Digest.String(),
			ErrImageNotRunnable},
		"sha512": {f.image(spec(func(_ *oci.ImageManifest, c *oci.ImageConfig) { c.RootFS.DiffIDs[0] = oci.SHA512.FromString("x") })).Digest.String(),
			ErrUnsupportedMediaType},
		"encrypted": {f.image(spec(func(m *oci.ImageManifest, _ *oci.ImageConfig) { m.Layers[1].MediaType += "+encrypted" })).Digest.String(),
			ErrUnsupportedMediaType},
	} {
		_, err := Convert(t.Context(), f, repo, c.reference, Options{})
		if !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", what, err, c.want)
		} else {
			t.Log(err)
		}
	}
	if _, err := Convert(t.Context(), f, "other/image", "latest", Options{}); !errors.Is(err, ErrResourceNotFound) {
		t.Errorf("no repository: %v", err)
	}
}

// A layer that isn't what the config says stops everything, and names itself.
func TestConvertWrongDiffID(t *testing.T) {
	f := newFixture(t)
	spec := linux("amd64", layers(t)...)
	wrong := oci.DigestOf([]byte("something else"))
	spec.change = func(_ *oci.ImageManifest, c *oci.ImageConfig) { c.RootFS.DiffIDs[1] = wrong }
	subject := f.image(spec)
	_, err := Convert(t.Context(), f, repo, subject.Digest.String(), Options{})
	var id *artifact.DiffIDError
	if !errors.As(err, &id) || id.Want != wrong || !strings.Contains(err.Error(), "layer 1") {
		t.Errorf("got %v", err)
	}
	if len(f.referrers(subject.Digest)) != 0 {
		t.Error("a referrer was published")
	}
}

func TestConvertSurvivesABadNetwork(t *testing.T) {
	f := newFixture(t)
	subject := f.image(linux("amd64", layers(t)...))
	bad := &faulty{Registry: f}
	bad.failing.Store(7)
	bad.cutting.Store(5)
	r, err := Convert(t.Context(), bad, repo, subject.Digest.String(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	f.verify(r.Artifacts[0].Descriptor)
	if i := slices.Index(bad.uploads, "manifest"); i != len(bad.uploads)-1 {
		t.Errorf("the manifest was pushed before all blobs were there: %v", bad.uploads)
	}
}

func TestConvertRefusesADamagedLayer(t *testing.T) {
	f := newFixture(t)
	spec := linux("amd64", layers(t)...)
	var broken oci.Digest
	spec.change = func(m *oci.ImageManifest, _ *oci.ImageConfig) { broken = m.Layers[2].Digest }
	subject := f.image(spec)
	_, err := Convert(t.Context(), &faulty{Registry: f, corrupt: broken}, repo, subject.Digest.String(), Options{})
	if err == nil || !strings.Contains(err.Error(), "layer 2") {
		t.Errorf("got %v", err)
	}
	if len(f.referrers(subject.Digest)) != 0 {
		t.Error("a referrer was published")
	}
}

func TestConvertStopsWithTheContext(t *testing.T) {
	f := newFixture(t)
	subject := f.image(linux("amd64", layers(t)...))
	ctx, cancel := context.WithCancel(t.Context())
	_, err := Convert(ctx, f, repo, subject.Digest.String(), Options{Progress: func(Progress) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if len(f.referrers(subject.Digest)) != 0 {
		t.Error("a referrer was published")
	}
}
