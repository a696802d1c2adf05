package transfer_test

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/transfer"
	"sluice/oci"
	"sluice/oci/ocimem"
)

func count(r transfer.Result) [3]int {
	var n [3]int
	for i, s := range []transfer.State{transfer.Copied, transfer.Skipped, transfer.Mounted} {
		n[i], _ = r.Count(s)
	}
	return n
}

func TestCopyIndex(t *testing.T) {
	m := newMaker(t)
	index, images := m.index("v1")
	dst := ocimem.New()
	src := transfer.Source{Registry: m.reg, Repo: m.repo, Reference: "v1"}
	to := transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1", "latest"}}

	dry := copyAll(t, to, src, transfer.Options{DryRun: true})
	if _, err := dst.ResolveManifest(t.Context(), repo, "v1"); err == nil {
		t.Error("a dry run copied the image")
	}
	var last transfer.Progress
	done, ended := int64(0), 0
	r := copyAll(t, to, src, transfer.Options{Progress: func(p transfer.Progress) {
		last = p
		if p.State == transfer.Copied {
			ended++
			done += p.Done
		}
	}})
	for _, tag := range to.Tags {
		if got := checkImage(t, dst, repo, tag); got.Digest != index.Digest {
			t.Errorf("%s is %s, want %s", tag, got.Digest, index.Digest)
		}
	}
	if len(r.Platforms) != 3 || r.Manifests != 7 || r.Root.Digest != index.Digest || !slices.Equal(r.Moved, to.Tags) {
		t.Errorf("got %+v", r)
	}
	// Shared layer, 3 layers, 3 configs, 3 attestations and the {} of theirs.
	if got := count(r); got != [3]int{11, 0, 0} || count(dry) != got || dry.Manifests != r.Manifests {
		t.Errorf("copied, skipped, mounted: %v; the dry run: %v", got, count(dry))
	}
	if last.Stage != transfer.StageDone || ended != last.Blobs || done != last.Size {
		t.Errorf("progress ended with %+v after %d blobs of %d bytes", last, ended, done)
	}

	r = copyAll(t, to, src, transfer.Options{})
	if got := count(r); got != [3]int{0, 11, 0} || r.ManifestsSkipped != 7 || len(r.Moved) != 0 {
		t.Errorf("the second time: %v, %+v", got, r)
	}
	r = copyAll(t, transfer.Target{Registry: m.reg, Repo: "other", Tags: []string{"v1"}}, src, transfer.Options{SameRegistry: true})
	if got := count(r); got != [3]int{0, 0, 11} {
		t.Errorf("in the same registry: %v", got)
	}
	checkImage(t, m.reg, "other", images[0].Digest.String())
}

func TestCopyPlatforms(t *testing.T) {
	m := newMaker(t)
	index, images := m.index("v1")
	m.referrer(images[0], "application/sbom", "of the image")
	m.referrer(index, "application/sbom", "of the index")
	src := transfer.Source{Registry: m.reg, Repo: m.repo, Reference: "v1"}

	dst := ocimem.New()
	to := transfer.Target{Registry: dst, Repo: repo, Tags: []string{"one"}}
	r := copyAll(t, to, src, transfer.Options{Platforms: []oci.Platform{linux("arm")}})
	if got := checkImage(t, dst, repo, "one"); got.Digest != images[2].Digest || r.Root.Digest != got.Digest || r.Platforms[0].Variant != "v7" {
		t.Errorf("linux/arm is %s, want %s", got.Digest, images[2].Digest)
	}
	if _, err := dst.ResolveManifest(t.Context(), repo, images[0].Digest.String()); err == nil {
		t.Error("linux/amd64 was copied too")
	}

	to.Tags = []string{"two"}
	r = copyAll(t, to, src, transfer.Options{Platforms: []oci.Platform{linux("arm64"), linux("amd64")}, Referrers: true})
	checkImage(t, dst, repo, "two")
	got, err := dst.GetManifest(t.Context(), repo, "two")
	if err != nil {
		t.Fatal(err)
	}
	info, err := oci.ParseManifestInfo(got.Content, got.Descriptor.MediaType)
	if err != nil {
		t.Fatal(err)
	}
	if len(info.Manifests) != 4 || info.Manifests[0].Digest != images[0].Digest || info.Annotations["kept"] != "yes" {
		t.Errorf("the index is %s", got.Content)
	}
	if r.Referrers != 1 || len(referrersOf(t, dst, repo, images[0].Digest)) != 1 || len(r.Notes) != 2 {
		t.Errorf("got %+v", r)
	}

	for want, platforms := range map[string][]oci.Platform{
		"isn't for windows/amd64; it is for linux/amd64, linux/arm64, linux/arm/v7": {{OS: "windows", Architecture: "amd64"}},
		"isn't for linux/arm/v6": {{OS: "linux", Architecture: "arm", Variant: "v6"}},
	} {
		_, err := transfer.Copy(t.Context(), to, src, transfer.Options{Platforms: platforms})
		if err == nil || !errors.Is(err, oci.ErrManifestUnknown) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	src.Reference = images[0].Digest.String()
	if _, err := transfer.Copy(t.Context(), to, src, transfer.Options{Platforms: []oci.Platform{linux("arm64")}}); err == nil || !strings.Contains(err.Error(), "linux/amd64 only") {
		t.Errorf("of an image for amd64: %v", err)
	}
}

func TestCopyReferrers(t *testing.T) {
	m := newMaker(t)
	_, images := m.index("v1")
	image := images[0]
	sbom := m.referrer(image, "application/sbom", "sbom")
	signature := m.referrer(sbom, "application/signature", "signature of the sbom")
	streaming := m.referrer(image, oci.ArtifactTypeStreaming, "streaming")
	cosign := strings.Replace(image.Digest.String(), ":", "-", 1) + ".sig"
	m.manifest(cosign, oci.MediaTypeImageManifest, oci.ImageManifest{
		Versioned: versioned(), MediaType: oci.MediaTypeImageManifest, Config: m.blob(oci.MediaTypeImageConfig, []byte("{}")),
		Layers: []oci.Descriptor{m.blob("application/vnd.dev.cosign.simplesigning.v1+json", []byte("signed"))},
	})
	src := transfer.Source{Registry: m.reg, Repo: m.repo, Reference: "v1"}

	dst := ocimem.New()
	to := transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1"}}
	copyAll(t, to, src, transfer.Options{})
	if got := referrersOf(t, dst, repo, image.Digest); len(got) != 0 {
		t.Errorf("referrers that weren't wanted: %v", got)
	}
	r := copyAll(t, to, src, transfer.Options{Referrers: true})
	if got := referrersOf(t, dst, repo, image.Digest); !maps.Equal(got, map[oci.Digest]bool{sbom.Digest: true}) {
		t.Errorf("referrers of the image: %v", got)
	}
	if got := referrersOf(t, dst, repo, sbom.Digest); !got[signature.Digest] {
		t.Errorf("referrers of the SBOM: %v", got)
	}
	checkImage(t, dst, repo, signature.Digest.String())
	checkImage(t, dst, repo, cosign)
	if r.Referrers != 3 || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "makes its own") {
		t.Errorf("got %+v", r)
	}
	copyAll(t, to, src, transfer.Options{Referrers: true, Streaming: true})
	checkImage(t, dst, repo, streaming.Digest.String())
}

// Docker's schema 2 stays as it is, also layers that are kept elsewhere.
func TestCopySchema2(t *testing.T) {
	m := newMaker(t)
	image := oci.ImageManifest{
		Versioned: versioned(), MediaType: oci.MediaTypeDockerManifest,
		Config: m.blob(oci.MediaTypeDockerConfig, []byte(`{"os":"windows","architecture":"amd64"}`)),
		Layers: []oci.Descriptor{
			{MediaType: oci.MediaTypeDockerForeignLayer, Digest: oci.DigestOf([]byte("base")), Size: 4, URLs: []string{"https://example.com/base"}},
			m.blob(oci.MediaTypeDockerLayerGzip, []byte("layer")),
		},
	}
	desc := m.manifest("", image.MediaType, image)
	desc.Platform = &oci.Platform{OS: "windows", Architecture: "amd64"}
	list := m.manifest("v1", oci.MediaTypeDockerManifestList, oci.Index{Versioned: versioned(), MediaType: oci.MediaTypeDockerManifestList, Manifests: []oci.Descriptor{desc}})
	dst := ocimem.New()
	r := copyAll(t, transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1"}}, transfer.Source{Registry: m.reg, Repo: m.repo, Reference: "v1"}, transfer.Options{})
	if got := checkImage(t, dst, repo, "v1"); got.Digest != list.Digest || got.MediaType != list.MediaType {
		t.Errorf("got %+v, want %+v", got, list)
	}
	want := []oci.Platform{{OS: "windows", Architecture: "amd64"}}
	if diff := cmp.Diff(want, r.Platforms); diff != "" || len(r.Notes) != 1 || count(r)[0] != 2 {
		t.Errorf("%s; %+v", diff, r)
	}
}

func TestCopySaysWhatIsWrong(t *testing.T) {
	m := newMaker(t)
	m.image("v1", linux("amd64"), []byte("layer"))
	src := transfer.Source{Registry: m.reg, Repo: m.repo, Reference: "v1"}
	to := transfer.Target{Registry: ocimem.New(), Repo: repo, Tags: []string{"v1"}}
	for _, c := range []struct {
		want   *oci.Error
		change func(*transfer.Source, *transfer.Target)
	}{
		{oci.ErrManifestUnknown, func(s *transfer.Source, _ *transfer.Target) { s.Reference = "v2" }},
		{oci.ErrNameUnknown, func(s *transfer.Source, _ *transfer.Target) { s.Repo = "nonesuch" }},
		{oci.ErrNameInvalid, func(_ *transfer.Source, d *transfer.Target) { d.Repo = "UPPER" }},
		{oci.ErrManifestInvalid, func(_ *transfer.Source, d *transfer.Target) { d.Tags = []string{"-"} }},
	} {
		s, d := src, to
		c.change(&s, &d)
		if _, err := transfer.Copy(t.Context(), d, s, transfer.Options{}); !errors.Is(err, c.want) {
			t.Errorf("got %v, want %v", err, c.want)
		}
	}
}

// A copy that fails leaves no tag, and what a source lies about isn't stored.
func TestCopyVerifies(t *testing.T) {
	for _, size := range []int{1000, 20 << 20} {
		m := newMaker(t)
		layer := noise(1, size)
		m.image("v1", linux("amd64"), layer)
		digest := oci.DigestOf(layer)
		src := &faulty{Registry: m.reg, flip: digest}
		dst := ocimem.New()
		_, err := transfer.Copy(t.Context(), transfer.Target{Registry: dst, Repo: repo, Tags: []string{"v1"}},
			transfer.Source{Registry: src, Repo: m.repo, Reference: "v1"}, transfer.Options{MinBackoff: 1})
		if !errors.Is(err, oci.ErrDigestInvalid) || !strings.Contains(err.Error(), digest.String()) || !strings.Contains(err.Error(), "source") {
			t.Errorf("%d bytes: got %v", size, err)
		}
		if _, err := dst.ResolveBlob(t.Context(), repo, digest); err == nil {
			t.Errorf("%d bytes: wrong content was stored", size)
		}
		if _, err := dst.ResolveManifest(t.Context(), repo, "v1"); err == nil {
			t.Errorf("%d bytes: the tag exists", size)
		}
		if n := src.opened.Load(); n > 1 {
			t.Errorf("%d bytes: wrong content was read %d times", size, n)
		}
	}
}

// Never more blobs are copied at once than Jobs says.
func TestJobs(t *testing.T) {
	m := newMaker(t)
	var layers [][]byte
	for i := range 20 {
		layers = append(layers, noise(uint64(i), 100_000))
	}
	m.image("v1", linux("amd64"), layers...)
	src := &faulty{Registry: m.reg}
	copyAll(t, transfer.Target{Registry: ocimem.New(), Repo: repo}, transfer.Source{Registry: src, Repo: m.repo, Reference: "v1"}, transfer.Options{Jobs: 3})
	if n := src.most.Load(); n < 1 || n > 3 {
		t.Errorf("%d blobs were copied at once", n)
	}
}
