package oci_test

import (
	"errors"
	"strings"
	"testing"

	"sluice/oci"
)

const someDigest = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"

func TestParseReference(t *testing.T) {
	for in, want := range map[string]oci.Reference{
		"debian":                                {Registry: "docker.io", Repository: "library/debian", Tag: "latest"},
		"debian:12":                             {Registry: "docker.io", Repository: "library/debian", Tag: "12"},
		"user/app":                              {Registry: "docker.io", Repository: "user/app", Tag: "latest"},
		"localhost/app":                         {Registry: "localhost", Repository: "app", Tag: "latest"},
		"127.0.0.1:5000/a/b:c":                  {Registry: "127.0.0.1:5000", Repository: "a/b", Tag: "c"},
		"[::1]:5000/a":                          {Registry: "[::1]:5000", Repository: "a", Tag: "latest"},
		"reg.example.com/a@" + someDigest:       {Registry: "reg.example.com", Repository: "a", Digest: someDigest},
		"reg.example.com/a:tag@" + someDigest:   {Registry: "reg.example.com", Repository: "a", Digest: someDigest},
		"index.docker.io/library/debian:trixie": {Registry: "docker.io", Repository: "library/debian", Tag: "trixie"},
	} {
		got, err := oci.ParseReference(in)
		if err != nil || got != want {
			t.Errorf("ParseReference(%q) = %+v, %v; want %+v", in, got, err, want)
		}
	}
	for _, in := range []string{
		"", "A", "a:", "a@", "a@sha256:00", "a:b:c", "a//b", "/a", "a/", "http://a/b", "a b", "a@md5:d41d8cd98f00b204e9800998ecf8427e",
		strings.Repeat("a", 300), "a:" + strings.Repeat("t", 129), someDigest[len("sha256:"):],
		"a@sha384:" + strings.Repeat("a", 96), "d_cker.io/x", "_.io/x:y",
	} {
		if got, err := oci.ParseReference(in); err == nil {
			t.Errorf("ParseReference(%q) = %+v, want an error", in, got)
		} else if !strings.Contains(err.Error(), "image reference") {
			t.Errorf("ParseReference(%q): error %q doesn't say what it is about", in, err)
		}
	}
}

func TestReferenceTarget(t *testing.T) {
	r := oci.Reference{Registry: "r", Repository: "a/b", Tag: "t"}
	if got := r.Target(); got != "t" {
		t.Errorf("Target = %q", got)
	}
	r.Digest = someDigest
	if got := r.Target(); got != someDigest {
		t.Errorf("Target = %q", got)
	}
	if got, want := r.String(), "r/a/b:t@"+someDigest; got != want {
		t.Errorf("String = %q, want %q", got, want)
	}
}

func FuzzParseReference(f *testing.F) {
	for _, s := range []string{"debian", "a/b:c", "127.0.0.1:5000/a/b@" + someDigest, "[::1]/x", "a:b@" + someDigest, "docker.io/x", "A/b", "xn--x/y"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := oci.ParseReference(s)
		if err != nil {
			return
		}
		if err := oci.CheckRepository(r.Repository); err != nil {
			t.Error(err)
		}
		if r.Tag != "" {
			if err := oci.CheckTag(r.Tag); err != nil {
				t.Error(err)
			}
		}
		if r.Registry == "" || r.Target() == "" {
			t.Errorf("%q: incomplete: %+v", s, r)
		}
		again, err := oci.ParseReference(r.String())
		if err != nil || again != r {
			t.Errorf("%q gives %+v, and its String %q gives %+v, %v", s, r, r.String(), again, err)
		}
	})
}

func TestCheckNames(t *testing.T) {
	for _, good := range []string{"a", "a/b/c", "a.b-c_d__e---f", "0/1", strings.Repeat("a", 255)} {
		if err := oci.CheckRepository(good); err != nil {
			t.Errorf("CheckRepository(%q): %v", good, err)
		}
	}
	for _, bad := range []string{"", "A", "a/", "/a", "a//b", "..", "a___b", "a\n", "a\x00b", strings.Repeat("a", 256)} {
		if err := oci.CheckRepository(bad); !errors.Is(err, oci.ErrNameInvalid) {
			t.Errorf("CheckRepository(%q) = %v, want ErrNameInvalid", bad, err)
		}
	}
	for _, good := range []string{"a", "_", "A.b-c_d", "0", strings.Repeat("t", 128)} {
		if err := oci.CheckTag(good); err != nil {
			t.Errorf("CheckTag(%q): %v", good, err)
		}
	}
	for _, bad := range []string{"", ".", "-a", "a/b", "a:b", "a\n", strings.Repeat("t", 129)} {
		if err := oci.CheckTag(bad); !errors.Is(err, oci.ErrManifestInvalid) {
			t.Errorf("CheckTag(%q) = %v, want ErrManifestInvalid", bad, err)
		}
	}
}
