package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"

	"sluice/internal/artifact"
	"sluice/internal/registry"
	"sluice/oci"
	"sluice/oci/ocimem"
)

// pushImage pushes an image of one layer for each content.
func pushImage(t *testing.T, reg oci.Registry, repo, tag, os string, contents ...string) oci.Descriptor {
	t.Helper()
	ctx := t.Context()
	blob := func(mediaType string, content []byte) oci.Descriptor {
		desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
		if _, err := reg.PushBlob(ctx, repo, desc, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	config := oci.ImageConfig{Platform: oci.Platform{OS: os, Architecture: "amd64"}}
	config.RootFS.Type = "layers"
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest}
	for i, content := range contents {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprint(i), Size: int64(len(content)), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf(b.Bytes()))
		m.Layers = append(m.Layers, blob(oci.MediaTypeLayer, b.Bytes()))
	}
	content, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	m.Config = blob(oci.MediaTypeImageConfig, content)
	if content, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	desc, err := reg.PushManifest(ctx, repo, tag, m.MediaType, content)
	if err != nil {
		t.Fatal(err)
	}
	return desc
}

// runSluice runs the program with arguments and returns what it printed.
func runSluice(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := newCommand()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&errs)
	err = cmd.ExecuteContext(t.Context())
	return out.String(), errs.String(), err
}

func TestArtifactStreamingCreate(t *testing.T) {
	reg := ocimem.New()
	server := httptest.NewServer(registry.NewHandler(reg, registry.Options{}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	subject := pushImage(t, reg, "team/app", "v1", "linux", "one", strings.Repeat("two ", 300_000))

	stdout, stderr, err := runSluice(t, "artifact-streaming", "create", "--registry", host, "--image", "team/app:v1", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Subject   oci.Digest
		Artifacts []createdArtifact
	}
	if err := json.Unmarshal([]byte(stdout), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Subject != subject.Digest || len(doc.Artifacts) != 1 || doc.Artifacts[0].Existed || doc.Artifacts[0].Layers != 2 || doc.Artifacts[0].Platform != "linux/amd64" {
		t.Errorf("it printed %s", stdout)
	}
	for _, want := range []string{"linux/amd64: converting 2 layers", "linux/amd64: published"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("it said %q, which lacks %q", stderr, want)
		}
	}
	m, err := reg.GetManifest(t.Context(), "team/app", doc.Artifacts[0].Artifact.String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := artifact.ParseManifest(m.Content); err != nil {
		t.Error(err)
	}

	stdout, stderr, err = runSluice(t, "artifact-streaming", "create", "--image", host+"/team/app:v1")
	if err != nil || !strings.Contains(stderr, "already exists") || !strings.Contains(stdout, shortDigest(doc.Artifacts[0].Artifact)) || !strings.Contains(stdout, "existed") {
		t.Errorf("the second time: %q, %q, %v", stdout, stderr, err)
	}
}

func TestArtifactStreamingCreateSaysWhatIsWrong(t *testing.T) {
	reg := ocimem.New()
	server := httptest.NewServer(registry.NewHandler(reg, registry.Options{}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	pushImage(t, reg, "app", "windows", "windows", "one")
	pushImage(t, reg, "app", "linux", "linux", "one")
	for want, args := range map[string][]string{
		"UNSUPPORTED_PLATFORM":   {host + "/app:windows"},
		"RESOURCE_NOT_FOUND":     {"-r", host, "-t", "app:nonesuch"},
		"which image":            {},
		"not both":               {host + "/app:v1", "-r", host, "-t", "app:v1"},
		"names no registry":      {"-t", "app:linux"},
		"usage: sluice":          {"a", "b"},
		"--platform \"arm\"":     {host + "/app:linux", "--platform", "arm"},
		"linux/amd64, which isn": {host + "/app:linux", "--platform", "linux/arm64"},
		"--output \"xml\"":       {host + "/app:linux", "-o", "xml"},
		"Name it":                {"-r", host},
		"reference":              {"-r", host, "-t", "APP"},
	} {
		_, _, err := runSluice(t, append([]string{"artifact-streaming", "create"}, args...)...)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: got %v, want %q", args, err, want)
		}
	}
}
