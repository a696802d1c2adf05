package transfer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/transfer"
	"sluice/oci"
	"sluice/oci/ocimem"
)

const repo = "team/app"

// maker puts images into a registry.
type maker struct {
	t    *testing.T
	reg  oci.Registry
	repo string
}

func (m maker) blob(mediaType string, content []byte) oci.Descriptor {
	m.t.Helper()
	desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
	if _, err := m.reg.PushBlob(m.t.Context(), m.repo, desc, bytes.NewReader(content)); err != nil {
		m.t.Fatal(err)
	}
	return desc
}

func (m maker) manifest(reference, mediaType string, v any) oci.Descriptor {
	m.t.Helper()
	content := marshal(m.t, v)
	if reference == "" {
		reference = oci.DigestOf(content).String()
	}
	desc, err := m.reg.PushManifest(m.t.Context(), m.repo, reference, mediaType, content)
	if err != nil {
		m.t.Fatal(err)
	}
	return desc
}

func marshal(t *testing.T, v any) []byte {
	t.Helper()
	content, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func versioned() oci.Versioned { return oci.Versioned{SchemaVersion: 2} }

// image pushes an OCI image for a platform.
func (m maker) image(reference string, p oci.Platform, layers ...[]byte) oci.Descriptor {
	config := oci.ImageConfig{Platform: p}
	manifest := oci.ImageManifest{Versioned: versioned(), MediaType: oci.MediaTypeImageManifest, Layers: []oci.Descriptor{}}
	for _, l := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf(l))
		manifest.Layers = append(manifest.Layers, m.blob(oci.MediaTypeLayer, l))
	}
	manifest.Config = m.blob(oci.MediaTypeImageConfig, marshal(m.t, config))
	desc := m.manifest(reference, manifest.MediaType, manifest)
	desc.Platform = &p
	return desc
}

// referrer pushes an artifact that refers to subject.
func (m maker) referrer(subject oci.Descriptor, artifactType, content string) oci.Descriptor {
	subject.Platform, subject.Annotations = nil, nil
	return m.manifest("", oci.MediaTypeImageManifest, oci.ImageManifest{
		Versioned: versioned(), MediaType: oci.MediaTypeImageManifest, ArtifactType: artifactType, Subject: &subject,
		Config: m.blob("application/vnd.oci.empty.v1+json", []byte("{}")), Layers: []oci.Descriptor{m.blob("text/plain", []byte(content))},
	})
}

func linux(architecture string) oci.Platform {
	return oci.Platform{OS: "linux", Architecture: architecture}
}

// index pushes an index of three platforms, each with BuildKit's attestation.
func (m maker) index(tag string) (oci.Descriptor, []oci.Descriptor) {
	index := oci.Index{Versioned: versioned(), MediaType: oci.MediaTypeIndex, Annotations: map[string]string{"kept": "yes"}}
	var images []oci.Descriptor
	for _, p := range []oci.Platform{linux("amd64"), linux("arm64"), {OS: "linux", Architecture: "arm", Variant: "v7"}} {
		images = append(images, m.image("", p, []byte("shared layer"), []byte("layer of "+p.Architecture)))
	}
	index.Manifests = append(index.Manifests, images...)
	for _, image := range images {
		desc := m.manifest("", oci.MediaTypeImageManifest, oci.ImageManifest{
			Versioned: versioned(), MediaType: oci.MediaTypeImageManifest, Config: m.blob(oci.MediaTypeImageConfig, []byte("{}")),
			Layers: []oci.Descriptor{m.blob("application/vnd.in-toto+json", []byte("attests "+image.Digest))},
		})
		desc.Platform = &oci.Platform{OS: "unknown", Architecture: "unknown"}
		desc.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": image.Digest.String()}
		index.Manifests = append(index.Manifests, desc)
	}
	return m.manifest(tag, oci.MediaTypeIndex, index), images
}

// noise returns n bytes that don't repeat.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = src.Read(b)
	return b
}

// layout writes what a repository has as an OCI image layout: the manifests
// named by tag get the annotations, the others none.
func layout(t *testing.T, reg oci.Registry, repo string, tops map[oci.Digest]map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	var add func(desc oci.Descriptor)
	write := func(name string, content []byte) {
		name = filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	blobFile := func(d oci.Digest) string { return "blobs/" + d.Algorithm().String() + "/" + d.Encoded() }
	add = func(desc oci.Descriptor) {
		m, err := reg.GetManifest(t.Context(), repo, desc.Digest.String())
		if err != nil {
			t.Fatal(err)
		}
		write(blobFile(desc.Digest), m.Content)
		info, err := oci.ParseManifestInfo(m.Content, m.Descriptor.MediaType)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range info.Blobs {
			write(blobFile(b.Digest), blobContent(t, reg, repo, b.Digest))
		}
		for _, child := range info.Manifests {
			add(child)
		}
	}
	index := oci.Index{Versioned: versioned(), Manifests: []oci.Descriptor{}}
	for digest, annotations := range tops {
		desc, err := reg.ResolveManifest(t.Context(), repo, digest.String())
		if err != nil {
			t.Fatal(err)
		}
		add(desc)
		desc.Annotations = annotations
		index.Manifests = append(index.Manifests, desc)
	}
	write("index.json", marshal(t, index))
	write("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	return dir
}

func blobContent(t *testing.T, reg oci.Reader, repo string, digest oci.Digest) []byte {
	t.Helper()
	r, err := reg.GetBlob(t.Context(), repo, digest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(oci.VerifyReader(r, r.Descriptor())); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// entry is a file of a tar.
type entry struct {
	name, content, link string
	kind                byte
}

func file(name, content string) entry { return entry{name: name, content: content, kind: tar.TypeReg} }

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if err := w.WriteHeader(&tar.Header{Typeflag: e.kind, Name: e.name, Linkname: e.link, Size: int64(len(e.content)), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tarDir returns a tar of a directory.
func tarDir(t *testing.T, dir string) []byte {
	t.Helper()
	var entries []entry
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		if d.IsDir() {
			entries = append(entries, entry{name: name + "/", kind: tar.TypeDir})
			return nil
		}
		content, err := os.ReadFile(filepath.Join(dir, name))
		entries = append(entries, file("./"+name, string(content)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tarOf(t, entries...)
}

func writeFile(t testing.TB, content []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(name, content, 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// dockerSave returns an archive of docker save's older form.
func dockerSave(t testing.TB, layers ...string) ([]byte, oci.ImageConfig) {
	t.Helper()
	config := oci.ImageConfig{Platform: linux("amd64")}
	type image struct {
		Config           string
		RepoTags, Layers []string
	}
	im := image{Config: "c0ffee.json", RepoTags: []string{"app:v1", "example.com:5000/app:v2"}}
	var entries []entry
	for i, l := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf([]byte(l)))
		name := strings.Repeat(string(rune('a'+i)), 8) + "/layer.tar"
		im.Layers = append(im.Layers, name)
		entries = append(entries, file(name, l))
	}
	c, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	m, err := json.Marshal([]image{im})
	if err != nil {
		t.Fatal(err)
	}
	return tarOf(t, append(entries, file("c0ffee.json", string(c)), file("manifest.json", string(m)))...), config
}

// copyAll copies and fails the test if that fails.
func copyAll(t *testing.T, dst transfer.Target, src transfer.Source, opts transfer.Options) transfer.Result {
	t.Helper()
	r, err := transfer.Copy(t.Context(), dst, src, opts)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// checkImage checks that everything a manifest needs is in the repository and
// is what its digest says.
func checkImage(t *testing.T, reg oci.Reader, repo, reference string) oci.Descriptor {
	t.Helper()
	m, err := reg.GetManifest(t.Context(), repo, reference)
	if err != nil {
		t.Fatal(err)
	}
	info, err := oci.ParseManifestInfo(m.Content, m.Descriptor.MediaType)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range info.Blobs {
		blobContent(t, reg, repo, b.Digest)
	}
	for _, child := range info.Manifests {
		checkImage(t, reg, repo, child.Digest.String())
	}
	return m.Descriptor
}

func referrersOf(t *testing.T, reg oci.Lister, repo string, subject oci.Digest) map[oci.Digest]bool {
	t.Helper()
	found := make(map[oci.Digest]bool)
	for desc, err := range reg.Referrers(context.WithoutCancel(t.Context()), repo, subject, "") {
		if err != nil {
			t.Fatal(err)
		}
		found[desc.Digest] = true
	}
	return found
}

func newMaker(t *testing.T) maker { return maker{t: t, reg: ocimem.New(), repo: "origin"} }
