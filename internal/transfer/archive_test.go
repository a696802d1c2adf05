package transfer_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/transfer"
	"sluice/oci"
	"sluice/oci/ocimem"
)

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

// copyArchive copies an image of an archive into an empty registry.
func copyArchive(t *testing.T, a *transfer.Archive, reference string, opts transfer.Options) (oci.Registry, transfer.Result) {
	t.Helper()
	dst := ocimem.New()
	r := copyAll(t, transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1"}}, transfer.Source{Registry: a, Reference: reference}, opts)
	checkImage(t, dst, repo, "v1")
	return dst, r
}

// An image is the same, whatever it is packed in.
func TestLayouts(t *testing.T) {
	m := newMaker(t)
	index, images := m.index("v1")
	sbom := m.referrer(images[1], "application/sbom", "sbom")
	dir := layout(t, m.reg, m.repo, map[oci.Digest]map[string]string{
		index.Digest: {"org.opencontainers.image.ref.name": "v1"},
		sbom.Digest:  nil,
	})
	packed := tarDir(t, dir)
	for name, open := range map[string]func() (*transfer.Archive, error){
		"directory": func() (*transfer.Archive, error) { return transfer.OpenLayout(t.Context(), dir) },
		"tar":       func() (*transfer.Archive, error) { return transfer.OpenLayout(t.Context(), writeFile(t, packed)) },
		"gzip": func() (*transfer.Archive, error) {
			return transfer.OpenArchive(t.Context(), writeFile(t, gzipped(t, packed)))
		},
		"stream": func() (*transfer.Archive, error) {
			return transfer.OpenStream(t.Context(), bytes.NewReader(packed), "standard input")
		},
		"stream of gzip": func() (*transfer.Archive, error) {
			return transfer.OpenStream(t.Context(), bytes.NewReader(gzipped(t, packed)), "standard input")
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := open()
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			found := a.Images()
			if len(found) != 1 || found[0].Descriptor.Digest != index.Digest || found[0].Tag() != "v1" {
				t.Fatalf("images: %+v", found)
			}
			dst, r := copyArchive(t, a, "", transfer.Options{Referrers: true})
			if r.Root.Digest != index.Digest || !referrersOf(t, dst, repo, images[1].Digest)[sbom.Digest] {
				t.Errorf("got %+v", r)
			}
		})
	}
}

func TestArchiveIsAReader(t *testing.T) {
	content, _ := dockerSave(t, "layer one", "layer two")
	a, err := transfer.Open(t.Context(), writeFile(t, content))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	digest := oci.DigestOf([]byte("layer two"))
	for _, c := range []struct {
		offset, length int64
		want           string
	}{{0, -1, "layer two"}, {6, -1, "two"}, {6, 2, "tw"}, {6, 100, "two"}, {0, 0, ""}} {
		r, err := a.GetBlobRange(t.Context(), "x", digest, c.offset, c.length)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || string(got) != c.want || r.Descriptor().Size != 9 {
			t.Errorf("%d+%d: %q, %v", c.offset, c.length, got, err)
		}
		r.Close()
	}
	for _, offset := range []int64{-1, 9, 10} {
		if _, err := a.GetBlobRange(t.Context(), "x", digest, offset, 1); !errors.Is(err, oci.ErrRangeInvalid) {
			t.Errorf("at %d: %v", offset, err)
		}
	}
	if _, err := a.GetBlob(t.Context(), "x", oci.DigestOf(nil)); !errors.Is(err, oci.ErrBlobUnknown) {
		t.Error(err)
	}
	if _, err := a.GetBlob(t.Context(), "x", "sha256:x"); !errors.Is(err, oci.ErrDigestInvalid) {
		t.Error(err)
	}
	if _, err := a.GetManifest(t.Context(), "x", oci.DigestOf(nil).String()); !errors.Is(err, oci.ErrManifestUnknown) {
		t.Error(err)
	}
}

// What docker save wrote before version 25 becomes the same image every time.
func TestDockerSave(t *testing.T) {
	content, config := dockerSave(t, "layer one", "layer two")
	var digest oci.Digest
	for range 2 {
		a, err := transfer.OpenArchive(t.Context(), writeFile(t, content))
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		for _, name := range []string{"", "app:v1", "docker.io/library/app:v1", "v1", "v2", "example.com:5000/app:v2"} {
			if _, err := a.Find(name); err != nil {
				t.Errorf("%q: %v", name, err)
			}
		}
		dst, r := copyArchive(t, a, "app:v1", transfer.Options{})
		if digest == "" {
			digest = r.Root.Digest
		}
		if r.Root.Digest != digest || r.Platforms[0].Architecture != config.Architecture || count(r)[0] != 3 {
			t.Errorf("got %+v", r)
		}
		m, err := dst.GetManifest(t.Context(), repo, "v1")
		if err != nil {
			t.Fatal(err)
		}
		var image oci.ImageManifest
		if err := json.Unmarshal(m.Content, &image); err != nil {
			t.Fatal(err)
		}
		if len(image.Layers) != 2 || image.Layers[0].MediaType != oci.MediaTypeLayer || image.Layers[0].Digest != config.RootFS.DiffIDs[0] {
			t.Errorf("the manifest is %s", m.Content)
		}
	}
}

// Other tools compress layers, and docker links those that are alike.
func TestDockerSaveOfOthers(t *testing.T) {
	one := gzipped(t, []byte("layer one"))
	config := oci.ImageConfig{Platform: linux("arm64")}
	config.RootFS.DiffIDs = []oci.Digest{oci.DigestOf([]byte("layer one")), oci.DigestOf([]byte("two")), oci.DigestOf([]byte("two"))}
	content := tarOf(t,
		entry{name: "a/", kind: tar.TypeDir}, entry{name: "a/fifo", kind: tar.TypeFifo},
		file("one.tar.gz", string(one)), file("a/layer.tar", "two"), entry{name: "b/layer.tar", link: "../a/layer.tar", kind: tar.TypeSymlink},
		file("config", string(marshal(t, config))),
		file("manifest.json", `[{"Config":"config","RepoTags":null,"Layers":["one.tar.gz","a/layer.tar","b/layer.tar"]}]`),
	)
	a, err := transfer.Open(t.Context(), writeFile(t, content))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	dst, r := copyArchive(t, a, "", transfer.Options{})
	if count(r)[0] != 3 {
		t.Errorf("got %+v", r)
	}
	if got := blobContent(t, dst, repo, oci.DigestOf(one)); !bytes.Equal(got, one) {
		t.Error("the compressed layer was changed")
	}
}

// docker save (25 and later) and ctr write the whole index of an image of which
// they have only one platform. As with docker push, that one is the image then.
func TestArchiveOfOnePlatformOfAnIndex(t *testing.T) {
	for missing, want := range map[string]int{"others": 1, "one": 2, "attestations": 3} {
		t.Run(missing, func(t *testing.T) {
			m := newMaker(t)
			index, images := m.index("v1")
			dir := layout(t, m.reg, m.repo, map[oci.Digest]map[string]string{
				index.Digest: {"io.containerd.image.name": "docker.io/library/app:v1", "org.opencontainers.image.ref.name": "v1"},
			})
			remove := func(d oci.Digest) {
				if err := os.Remove(filepath.Join(dir, "blobs", "sha256", d.Encoded())); err != nil {
					t.Fatal(err)
				}
			}
			switch missing {
			case "others": // of one the layer, of the other the manifest
				remove(images[2].Digest)
				remove(oci.DigestOf([]byte("layer of arm64")))
			case "one":
				remove(images[2].Digest)
			case "attestations":
				for _, image := range images {
					remove(oci.DigestOf([]byte("attests " + image.Digest)))
				}
			}
			a, err := transfer.Open(t.Context(), dir)
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			_, r := copyArchive(t, a, "app:v1", transfer.Options{})
			if len(r.Platforms) != want || len(r.Notes) == 0 || r.Root.Digest == index.Digest {
				t.Errorf("got %+v", r)
			}
			if want == 1 && (r.Root.Digest != images[0].Digest || !strings.Contains(r.Notes[0], "linux/amd64")) {
				t.Errorf("got %+v", r)
			}
			if missing == "others" {
				remove(images[0].Digest)
				_, err := transfer.Copy(t.Context(), transfer.Target{Registry: ocimem.New(), Repo: repo}, transfer.Source{Registry: a}, transfer.Options{})
				if !errors.Is(err, oci.ErrManifestUnknown) || !strings.Contains(err.Error(), "none of its platforms completely") {
					t.Errorf("of an archive without images: %v", err)
				}
			}
		})
	}
}

func TestFindSaysWhatThereIs(t *testing.T) {
	m := newMaker(t)
	one := m.image("", linux("amd64"), []byte("one"))
	two := m.image("", linux("amd64"), []byte("two"))
	a, err := transfer.Open(t.Context(), layout(t, m.reg, m.repo, map[oci.Digest]map[string]string{
		one.Digest: {"io.containerd.image.name": "docker.io/library/debian:12"},
		two.Digest: {"io.containerd.image.name": "example.com/other:12"},
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for name, want := range map[string]oci.Digest{"debian:12": one.Digest, "example.com/other:12": two.Digest, two.Digest.String(): two.Digest} {
		if got, err := a.Find(name); err != nil || got.Descriptor.Digest != want {
			t.Errorf("%s is %v, %v", name, got, err)
		}
	}
	for name, want := range map[string]string{"": "say which", "12": "several", "debian:13": "no image", "debian": "no image"} {
		_, err := a.Find(name)
		if !errors.Is(err, oci.ErrManifestUnknown) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), `"docker.io/library/debian:12"`) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestHostileArchives(t *testing.T) {
	config := `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["` + oci.DigestOf([]byte("l")).String() + `"]}}`
	docker := func(manifest string, more ...entry) []byte {
		return tarOf(t, append(more, file("c.json", config), file("manifest.json", manifest))...)
	}
	layoutOf := func(index string, more ...entry) []byte {
		return tarOf(t, append(more, file("oci-layout", `{"imageLayoutVersion":"1.0.0"}`), file("index.json", index))...)
	}
	whole := docker(`[{"Config":"c.json","Layers":["l"]}]`, file("l", "l"))
	for want, content := range map[string][]byte{
		"leads out of it":      tarOf(t, file("../../etc/passwd", "x")),
		"twice":                tarOf(t, file("a", "x"), file("./a", "y")),
		"isn't a whole tar":    []byte(strings.Repeat("not a tar ", 1000)),
		"neither the file":     tarOf(t, file("a", "x")),
		"nor the file":         gzipped(t, nil),
		"zstd -d":              {0x28, 0xb5, 0x2f, 0xfd, 0, 0},
		"unpacking it":         gzipped(t, whole)[:300],
		"cut off":              whole[:len(whole)-1024-510],
		"too many":             docker(strings.Repeat(" ", 5<<20)),
		"usable JSON":          docker(`{`),
		"its config":           docker(`[{"Config":"../c","Layers":["l"]}]`),
		"and its config 1":     docker(`[{"Config":"c.json","Layers":[]}]`),
		"layer 1":              docker(`[{"Config":"c.json","Layers":["/etc/passwd"]}]`),
		"a link to a link":     docker(`[{"Config":"c.json","Layers":["l"]}]`, entry{name: "l", link: "m", kind: tar.TypeSymlink}, entry{name: "m", link: "l", kind: tar.TypeSymlink}),
		"file does not exist":  docker(`[{"Config":"c.json","Layers":["l"]}]`, entry{name: "l", link: "../../../etc/passwd", kind: tar.TypeSymlink}),
		"version \"9\"":        tarOf(t, file("oci-layout", `{"imageLayoutVersion":"9"}`), file("index.json", "{}")),
		"schemaVersion must":   layoutOf(`{}`),
		"is repeated":          layoutOf(`{"schemaVersion":2,"schemaVersion":2,"manifests":[]}`),
		"is not a digest":      layoutOf(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":1,"digest":"sha256:../../x"}]}`),
		"index.json\": file d": tarOf(t, file("oci-layout", `{"imageLayoutVersion":"1.0.0"}`)),
	} {
		_, err := transfer.Open(t.Context(), writeFile(t, content))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}

	// What only a copy finds.
	digest := oci.DigestOf([]byte("not this"))
	for want, content := range map[string][]byte{
		"source: sha256": docker(`[{"Config":"c.json","Layers":["l"]}]`, file("l", "m")),
		"another content": layoutOf(fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":2,"digest":%q}]}`, digest),
			file("blobs/sha256/"+digest.Encoded(), "{}")),
		"is not in": layoutOf(fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":2,"digest":%q}]}`, digest)),
	} {
		a, err := transfer.Open(t.Context(), writeFile(t, content))
		if err != nil {
			t.Errorf("%q: %v", want, err)
			continue
		}
		_, err = transfer.Copy(t.Context(), transfer.Target{Registry: ocimem.New(), Repo: repo}, transfer.Source{Registry: a}, transfer.Options{MinBackoff: 1})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
		a.Close()
	}
}

// Nothing outside a layout's directory is read, whatever links are in it.
func TestLayoutWithLinksOutwards(t *testing.T) {
	secret := writeFile(t, []byte("secret"))
	dir := t.TempDir()
	digest := oci.DigestOf([]byte("secret"))
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"oci-layout": `{"imageLayoutVersion":"1.0.0"}`, "index.json": `{"schemaVersion":2,"manifests":[]}`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(secret, filepath.Join(dir, "blobs", "sha256", digest.Encoded())); err != nil {
		t.Fatal(err)
	}
	a, err := transfer.OpenLayout(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if r, err := a.GetBlob(t.Context(), "x", digest); err == nil {
		got, _ := io.ReadAll(r)
		t.Errorf("it read %q", got)
	}
	if _, err := a.Find(""); err == nil || !strings.Contains(err.Error(), "it has none") {
		t.Error(err)
	}
	if _, err := transfer.Open(t.Context(), filepath.Join(dir, "nonesuch")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// However an archive is damaged, it is an error or an image that holds together.
func FuzzArchive(f *testing.F) {
	content, _ := dockerSave(f, "layer one", "layer two")
	f.Add(content)
	f.Add(gzipped(f, content))
	image := `{"schemaVersion":2,"config":{"mediaType":"text/plain","size":1,"digest":"` + oci.DigestOf([]byte("c")).String() + `"},"layers":[]}`
	digest := oci.DigestOf([]byte(image))
	f.Add(tarOf(f, file("oci-layout", `{"imageLayoutVersion":"1.0.0"}`),
		file("index.json", fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":%q,"size":%d,"digest":%q,"annotations":{"org.opencontainers.image.ref.name":"v1"}}]}`,
			oci.MediaTypeImageManifest, len(image), digest)),
		file("blobs/sha256/"+digest.Encoded(), image), file("blobs/sha256/"+oci.DigestOf([]byte("c")).Encoded(), "c")))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, content []byte) {
		name := filepath.Join(dir, "x")
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
		a, err := transfer.Open(t.Context(), name)
		if err != nil {
			return
		}
		defer a.Close()
		for _, image := range a.Images() {
			dst := ocimem.New()
			r, err := transfer.Copy(t.Context(), transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1"}},
				transfer.Source{Registry: a, Reference: image.Descriptor.Digest.String()}, transfer.Options{MinBackoff: 1, Referrers: true})
			if err == nil {
				if got := checkImage(t, dst, repo, "v1"); got.Digest != r.Root.Digest {
					t.Errorf("%s was copied as %s", r.Root.Digest, got.Digest)
				}
			}
		}
	})
}
