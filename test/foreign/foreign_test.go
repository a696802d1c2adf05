package foreign

import (
	"runtime"
	"slices"
	"strings"
	"testing"

	"sluice/oci"
)

// created is what create prints.
type created struct {
	Subject   oci.Digest
	Artifacts []struct {
		Platform, Gunzip                string
		Image, Artifact, IndexArtifact  oci.Digest
		Existed                         bool
		Layers                          int
		OriginalSize, TarSize, LayersSz int64
	}
}

func (p *program) hasTag(repo, tag string) bool {
	p.t.Helper()
	for t, err := range p.reg.Tags(p.t.Context(), repo, "") {
		if err != nil {
			p.t.Fatal(err)
		}
		if t == tag {
			return true
		}
	}
	return false
}

// An image and an index are converted, found, verified, mounted and deleted,
// whether the registry has a referrers API or not.
func TestForeignRegistries(t *testing.T) {
	for _, name := range []string{"distribution", "olareg"} {
		t.Run(name, func(t *testing.T) {
			p := withRegistry(t, name)
			image := p.image("team/app", "v1", runtime.GOARCH, tree(1)...)
			foreign := p.image("team/app", "", other(), tree(2)...)
			on := func(desc oci.Descriptor, arch string) oci.Descriptor {
				desc.Platform = &oci.Platform{OS: "linux", Architecture: arch}
				return desc
			}
			index := p.manifest("team/app", "all", oci.MediaTypeIndex, oci.Index{
				Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex,
				Manifests: []oci.Descriptor{on(image, runtime.GOARCH), on(foreign, other())},
			})

			var c created
			p.must(&c, "create", "--registry", "http://"+p.addr, "--image", "team/app:v1")
			if c.Subject != image.Digest || len(c.Artifacts) != 1 || c.Artifacts[0].Existed || c.Artifacts[0].Layers != 2 || c.Artifacts[0].Gunzip == "" {
				t.Errorf("create: %+v", c)
			}
			if stderr := p.must(&c, "create", p.name("team/app:v1")); !strings.Contains(stderr, "already exists. Skipping request.") || !c.Artifacts[0].Existed {
				t.Errorf("create again: %q, %+v", stderr, c)
			}
			p.must(&c, "create", p.name("team/app:all"))
			if c.Subject != index.Digest || len(c.Artifacts) != 2 || !strings.HasPrefix(c.Artifacts[1].IndexArtifact.String(), "sha256:") {
				t.Errorf("create of an index: %+v", c)
			}
			if _, stderr, err := p.streaming("create", p.name("team/app:v1"), "--no-wait"); err == nil || !strings.Contains(stderr, "doesn't convert images") {
				t.Errorf("--no-wait: %v, %s", err, stderr)
			}

			fallback := strings.Replace(image.Digest.String(), ":", "-", 1)
			if has := p.hasTag("team/app", fallback); has != (name == "distribution") {
				t.Errorf("the tag of the referrers' index: %t", has)
			}
			p.looksRight()
			p.goes()
		})
	}
}

// looksRight lists, inspects and verifies what was converted.
func (p *program) looksRight() {
	t := p.t
	t.Helper()
	var list []struct {
		Image     string
		Artifacts []struct{ Platform, Format string }
	}
	p.must(&list, "list", p.name("team/app"))
	if len(list) != 2 || list[0].Image != "team/app:all" || len(list[0].Artifacts) != 2 || list[1].Artifacts[0].Format != "erofs" {
		t.Errorf("list: %+v", list)
	}
	var inspected []struct {
		Chunks       int
		LayerDetails []struct{ SharedWith []string }
		BootPack     *struct{ Chunks int }
	}
	p.must(&inspected, "inspect", p.name("team/app:v1"))
	if len(inspected) != 1 || inspected[0].Chunks < 10 || len(inspected[0].LayerDetails) != 2 || inspected[0].BootPack == nil || inspected[0].BootPack.Chunks == 0 {
		t.Errorf("inspect: %+v", inspected)
	}
	var plans []struct {
		Packed bool
		Files  []struct{ Path, Why string }
	}
	p.must(&plans, "inspect", p.name("team/app:v1"), "--boot")
	if len(plans) != 1 || !plans[0].Packed || !slices.ContainsFunc(plans[0].Files, func(f struct{ Path, Why string }) bool { return f.Path == "/bin/sh" && f.Why == "script" }) {
		t.Errorf("inspect --boot: %+v", plans)
	}
	var verified []struct {
		Platform, Error string
		Files           int
	}
	stderr := p.must(&verified, "verify", p.name("team/app:all"))
	if len(verified) != 2 || verified[0].Error != "" || verified[1].Error != "" {
		t.Errorf("verify: %+v\n%s", verified, stderr)
	}
	if mountable() && (verified[0].Files < 15 || verified[1].Files != 0) {
		t.Errorf("verify compared %d and %d files\n%s", verified[0].Files, verified[1].Files, stderr)
	}
}

// goes deletes the artifacts.
func (p *program) goes() {
	p.t.Helper()
	var d struct{ Deleted []oci.Digest }
	p.must(&d, "delete", p.name("team/app:all"), "--yes")
	if len(d.Deleted) != 4 {
		p.t.Errorf("delete: %+v", d)
	}
	if _, stderr, err := p.streaming("delete", p.name("team/app:v1"), "--yes"); err == nil || !strings.Contains(stderr, "has no streaming artifact") {
		p.t.Errorf("delete of nothing: %v, %s", err, stderr)
	}
	if _, err := p.reg.ResolveManifest(p.t.Context(), "team/app", "all"); err != nil {
		p.t.Errorf("the image is gone: %v", err)
	}
}
