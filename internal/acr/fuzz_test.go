package acr

import (
	"strings"
	"testing"

	"sluice/oci"
)

// Whatever a path is, it names either nothing or well-formed things, and has
// endpoints then that say what access they need.
func FuzzParseRequest(f *testing.F) {
	const digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	for _, path := range []string{
		"_catalog", "_usage", "_gc", "_import", "_tokens", "_tokens/a", "_tokens/a/passwords", "_tokens/a/passwords/password1",
		"_scopeMaps", "_scopeMaps/a", "_operations/a", "_operations/a:cancel", "a", "a/b", "a/_usage", "a/b/_tags", "a/_tags/_b",
		"a/_manifests", "a/_manifests/" + digest, "_deleted/_catalog", "_deleted/a/_tags", "_deleted/a/_manifests", "_deleted/a/_manifests/" + digest,
		"", "/", "_deleted", "_deleted/a", "a/_tags/", "a//b", "A", "a/_none",
	} {
		f.Add("/acr/v1/"+path, "n=1")
	}
	f.Fuzz(func(t *testing.T, path, query string) {
		req, err := parseRequest(path, query)
		if err != nil {
			return
		}
		if len(req.endpoints) == 0 || !strings.HasPrefix(req.kind, "acr_") {
			t.Errorf("%q has no endpoints or no kind: %q", path, req.kind)
		}
		for method, e := range req.endpoints {
			need := e.need(req)
			if e.handle == nil || len(need) == 0 {
				t.Fatalf("%s %q needs nothing", method, path)
			}
			for _, a := range need {
				if a.Type == "repository" && (a.Name != req.Repository || oci.CheckRepository(a.Name) != nil) {
					t.Errorf("%s %q needs %v", method, path, a)
				}
			}
		}
		if req.Tag != "" && oci.CheckTag(req.Tag) != nil {
			t.Errorf("%q has the tag %q", path, req.Tag)
		}
		if req.Digest != "" {
			if _, err := oci.ParseDigest(req.Digest.String()); err != nil {
				t.Errorf("%q: %v", path, err)
			}
		}
	})
}

// Whatever an import asks for is refused or names well-formed things.
func FuzzParseImport(f *testing.F) {
	f.Add("r.example/a:b", "c:d", "linux/arm64")
	f.Add("debian", "", "")
	f.Add("a@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "c", "x/y/z")
	f.Fuzz(func(t *testing.T, source, target, platform string) {
		r := ImportRequest{Source: source, Target: target, Platform: platform}
		from, to, err := r.parse()
		if err != nil {
			return
		}
		if from.Target() == "" || oci.CheckRepository(to.repo) != nil || to.tag != "" && oci.CheckTag(to.tag) != nil {
			t.Errorf("%+v to %+v", from, to)
		}
		again, _, err := ImportRequest{Source: from.String(), Target: to.String()}.parse()
		if err != nil || again != from {
			t.Errorf("%+v, and again %+v, %v", from, again, err)
		}
	})
}
