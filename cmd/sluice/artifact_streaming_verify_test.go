package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/registry"
	"sluice/oci"
	"sluice/oci/ocimem"
)

// An artifact whose metadata is another image's is found out.
func TestVerifyFindsAWrongArtifact(t *testing.T) {
	reg := ocimem.New()
	server := httptest.NewServer(registry.NewHandler(reg, registry.Options{}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	var found []*streamed
	for tag, content := range map[string]string{"v1": "one", "v2": "two, and longer"} {
		subject := pushImage(t, reg, "app", tag, "linux", content)
		if _, stderr, err := streamingVerb(t, "create", host+"/app:"+tag); err != nil {
			t.Fatal(err, stderr)
		}
		list, err := artifactsOf(t.Context(), reg, "app", subject.Digest)
		if err != nil || len(list) != 1 {
			t.Fatal(list, err)
		}
		found = append(found, list[0])
	}
	var manifests [2]oci.ImageManifest
	for i, s := range found {
		m, err := reg.GetManifest(t.Context(), "app", s.artifact.Digest.String())
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(m.Content, &manifests[i]); err != nil {
			t.Fatal(err)
		}
	}
	manifests[0].Layers[0] = manifests[1].Layers[0] // the merged metadata
	content, err := json.Marshal(manifests[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := reg.DeleteManifest(t.Context(), "app", found[0].artifact.Digest); err != nil {
		t.Fatal(err)
	}
	if _, err := reg.PushManifest(t.Context(), "app", oci.DigestOf(content).String(), oci.MediaTypeImageManifest, content); err != nil {
		t.Fatal(err)
	}
	stdout, _, err := streamingVerb(t, "verify", host+"/app@"+found[0].parsed.Subject.Digest.String(), "--mount=false")
	if err == nil || !strings.Contains(err.Error(), "not what it should be") || !strings.Contains(stdout, "merged metadata") {
		t.Errorf("verify: %q, %v", stdout, err)
	}
}

// Every kind of difference between a mount and the original is seen.
func TestCompareSeesDifferences(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	layerOf := func(members ...tar.Header) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range members {
			h.ModTime, h.Uid, h.Gid = now, os.Getuid(), os.Getgid()
			if h.Typeflag == tar.TypeReg {
				h.Mode, h.Size = 0o644, 3
			}
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
			if h.Typeflag == tar.TypeReg {
				if _, err := w.Write([]byte("abc")); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	file := func(name string) tar.Header { return tar.Header{Name: name, Typeflag: tar.TypeReg} }
	want := &original{children: map[string]*original{}}
	for i, l := range [][]byte{
		layerOf(file("kept"), file("gone"), file("dir/hidden"), tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "kept"}),
		layerOf(file(".wh.gone"), file("dir/.wh..wh..opq"), file("dir/new")),
	} {
		if err := want.addLayer(bytes.NewReader(l), i); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]struct {
		change func(dir string) error
		want   string
	}{
		"nothing":  {func(string) error { return nil }, ""},
		"content":  {func(dir string) error { return os.WriteFile(filepath.Join(dir, "kept"), []byte("abx"), 0o644) }, "content of 3 bytes"},
		"mode":     {func(dir string) error { return os.Chmod(filepath.Join(dir, "dir/new"), 0o600) }, "mode"},
		"link":     {func(dir string) error { return relink(filepath.Join(dir, "link")) }, "link to"},
		"missing":  {func(dir string) error { return os.Remove(filepath.Join(dir, "kept")) }, "names"},
		"too much": {func(dir string) error { return os.WriteFile(filepath.Join(dir, "gone"), nil, 0o644) }, "names"},
	} {
		dir := t.TempDir()
		for _, f := range []string{"kept", "dir/new"} {
			name := filepath.Join(dir, f)
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, []byte("abc"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink("kept", filepath.Join(dir, "link")); err != nil {
			t.Fatal(err)
		}
		if err := test.change(dir); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"kept", "dir/new"} {
			_ = os.Chtimes(filepath.Join(dir, f), now, now) // one may be gone
		}
		want.children["link"].time = linkTime(t, filepath.Join(dir, "link"))
		files, err := want.compare(t.Context(), dir)
		if test.want == "" && (err != nil || files != 5) || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %d files, error %v, want %q", name, files, err, test.want)
		}
	}
}

func relink(name string) error {
	if err := os.Remove(name); err != nil {
		return err
	}
	return os.Symlink("elsewhere", name)
}

func linkTime(t *testing.T, name string) time.Time {
	t.Helper()
	info, err := os.Lstat(name)
	if err != nil {
		t.Fatal(err)
	}
	return info.ModTime()
}
