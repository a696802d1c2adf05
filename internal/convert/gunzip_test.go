package convert

import (
	"os"
	"path/filepath"
	"testing"
)

// Whatever a program named igzip does, the artifact is the same.
func TestConvertDoesNotTrustGunzip(t *testing.T) {
	spec := linux("amd64", layers(t)...)
	spec.tag = "v1"
	f := newFixture(t)
	f.image(spec)
	want, err := Convert(t.Context(), f, repo, "v1", Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"fails":          "exit 1",
		"reads nothing":  "exit 0",
		"writes nothing": "/bin/cat >/dev/null",
		"writes zeros":   "/usr/bin/head -c 1M /dev/zero; /bin/cat >/dev/null",
		"adds a byte":    "/bin/gzip -dc; echo",
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "igzip"), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Setenv("PATH", dir)
		f := newFixture(t)
		f.image(spec)
		got, err := Convert(t.Context(), f, repo, "v1", Options{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if a, b := got.Artifacts[0], want.Artifacts[0]; a.Descriptor.Digest != b.Descriptor.Digest || a.Gunzip != "igzip" {
			t.Errorf("%s: artifact %s by %s, want %s", name, a.Descriptor.Digest, a.Gunzip, b.Descriptor.Digest)
		}
	}
}
