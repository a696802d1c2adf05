package foreign

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"sluice/internal/remote"
	"sluice/oci"
	"sluice/test/bed"
)

// checkout is the directory of the source.
func checkout(t *testing.T) string {
	t.Helper()
	src, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return src
}

// program is `sluice`, run against one registry.
type program struct {
	t    *testing.T
	bin  string
	addr string
	reg  *remote.Registry
}

// withRegistry starts a peer that ends with the test.
func withRegistry(t *testing.T, name string) *program {
	t.Helper()
	t.Setenv("REGISTRY_STORAGE_DELETE_ENABLED", "true") // for distribution
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	src, dir := checkout(t), t.TempDir()
	start := bed.StartDistribution
	if name == "olareg" {
		start = bed.StartOlareg
	}
	peer, err := start(t.Context(), src, dir, func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(peer.Stop)
	bin, err := bed.BuildSluice(t.Context(), src, dir)
	if err != nil {
		t.Fatal(err)
	}
	reg, err := remote.New(peer.Addr, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return &program{t, bin, peer.Addr, reg}
}

// streaming runs `sluice artifact-streaming`.
func (p *program) streaming(args ...string) (stdout, stderr string, err error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(p.t.Context(), p.bin, append([]string{"artifact-streaming"}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// must is streaming, which must succeed, into a document.
func (p *program) must(doc any, args ...string) (stderr string) {
	p.t.Helper()
	stdout, stderr, err := p.streaming(append(args, "-o", "json")...)
	if err != nil {
		p.t.Fatalf("%v: %v\n%s%s", args, err, stdout, stderr)
	}
	if err := json.Unmarshal([]byte(stdout), doc); err != nil {
		p.t.Fatalf("%v: %v\n%s", args, err, stdout)
	}
	return stderr
}

// member is a file of a layer.
type member struct {
	tar.Header
	content string
}

// image pushes an image for linux and this machine's architecture, or another
// one, whose layers are gzip, and returns its descriptor.
func (p *program) image(repo, tag, arch string, layers ...[]member) oci.Descriptor {
	p.t.Helper()
	push := func(mediaType string, content []byte) oci.Descriptor {
		p.t.Helper()
		desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
		if _, err := p.reg.PushBlob(p.t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
			p.t.Fatal(err)
		}
		return desc
	}
	config := oci.ImageConfig{Platform: oci.Platform{OS: "linux", Architecture: arch}}
	config.Config.Cmd = []string{"/bin/sh"}
	config.RootFS.Type = "layers"
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest}
	for _, members := range layers {
		plain := tarOf(p.t, members)
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		if _, err := w.Write(plain); err != nil {
			p.t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			p.t.Fatal(err)
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf(plain))
		m.Layers = append(m.Layers, push(oci.MediaTypeLayerGzip, b.Bytes()))
	}
	m.Config = push(oci.MediaTypeImageConfig, p.json(config))
	return p.manifest(repo, tag, m.MediaType, m)
}

func (p *program) json(v any) []byte {
	p.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

// manifest pushes a manifest or index; without a tag, by its digest.
func (p *program) manifest(repo, tag, mediaType string, doc any) oci.Descriptor {
	p.t.Helper()
	content := p.json(doc)
	if tag == "" {
		tag = oci.DigestOf(content).String()
	}
	desc, err := p.reg.PushManifest(p.t.Context(), repo, tag, mediaType, content)
	if err != nil {
		p.t.Fatal(err)
	}
	desc.MediaType = mediaType
	return desc
}

func tarOf(t *testing.T, members []member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		m.Size = int64(len(m.content))
		if err := w.WriteHeader(&m.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(m.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func file(name, content string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Uid: 1000, Gid: 1000}, content}
}

// tree is two layers with one of everything that images have.
func tree(seed byte) [][]member {
	noise := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{seed}).Read(noise)
	entry := func(name string, typ byte, mode int64, link string) member {
		return member{tar.Header{Name: name, Typeflag: typ, Mode: mode, Linkname: link}, ""}
	}
	lower := []member{
		entry("bin/", tar.TypeDir, 0o755, ""), file("bin/sh", "#!/bin/true\n"+string(noise[:100_000])),
		entry("bin/link", tar.TypeSymlink, 0o777, "sh"), entry("bin/hard", tar.TypeLink, 0o644, "bin/sh"),
		entry("data/", tar.TypeDir, 0o1777, ""), file("data/noise", string(noise)), file("data/gone", "gone"), file("data/text", strings.Repeat("text ", 500_000)),
		entry("hidden/", tar.TypeDir, 0o755, ""), file("hidden/a", "a"), file("hidden/b", "b"),
		entry("dev/", tar.TypeDir, 0o755, ""), entry("dev/fifo", tar.TypeFifo, 0o600, ""),
	}
	upper := []member{
		entry("data/", tar.TypeDir, 0o700, ""), file("data/.wh.gone", ""), file("data/text", "other text"),
		entry("hidden/", tar.TypeDir, 0o755, ""), file("hidden/.wh..wh..opq", ""), file("hidden/c", "c"),
		file("implicit/directory/file", ""),
	}
	return [][]member{lower, upper}
}

// other is an architecture that this machine hasn't.
func other() string {
	if runtime.GOARCH == "arm64" {
		return "amd64"
	}
	return "arm64"
}

// mountable reports whether verify can mount here.
func mountable() bool { return os.Geteuid() == 0 }

func (p *program) name(image string) string { return fmt.Sprintf("%s/%s", p.addr, image) }
