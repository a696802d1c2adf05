package artifact

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"sluice/oci"
)

// everyKind is a tar with all that a tree can hold but sparse members.
func everyKind(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{
		{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o2755, Uid: 3, Gid: 1 << 20},
		{Name: "etc/file", Typeflag: tar.TypeReg, Mode: 0o4755, Size: 700, PAXRecords: map[string]string{
			"SCHILY.xattr.security.capability": "\x01\x00\x00\x02", "SCHILY.xattr.user.x": ""}},
		{Name: "etc/empty", Typeflag: tar.TypeReg},
		{Name: "etc/again", Typeflag: tar.TypeLink, Linkname: "etc/file"},
		{Name: "implied/link", Typeflag: tar.TypeSymlink, Linkname: "../etc/file"},
		{Name: "implied/below", Typeflag: tar.TypeLink, Linkname: "lower/file"},
		{Name: "dev/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666},
		{Name: "run/fifo", Typeflag: tar.TypeFifo},
		{Name: "gone/.wh.file", Typeflag: tar.TypeReg},
		{Name: "new/.wh..wh..opq", Typeflag: tar.TypeReg},
	} {
		h.ModTime = time.Unix(1e9, 123).UTC()
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(bytes.Repeat([]byte{'x'}, int(h.Size))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func encoded(t testing.TB, tars ...[]byte) []*Layer {
	t.Helper()
	var layers []*Layer
	for _, content := range tars {
		l, err := EncodeLayer(t.Context(), bytes.NewReader(content), newMemSink(), EncodeOptions{})
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, l)
	}
	return layers
}

func record(t testing.TB, l *Layer) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := WriteLayer(&b, l); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestRecordIsTheLayer(t *testing.T) {
	layers := encoded(t, tarOf(t, 1000, 0, 3<<20), everyKind(t), sparseTar(t))
	if layers[2].Sparse == nil {
		t.Fatal("the tar that is to be sparse isn't")
	}
	var again []*Layer
	for i, l := range layers {
		content := record(t, l)
		got, err := ReadLayer(bytes.NewReader(content))
		if err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
		if diff := cmp.Diff(l, got); diff != "" {
			t.Errorf("layer %d: %s", i, diff)
		}
		if !bytes.Equal(content, record(t, got)) {
			t.Errorf("layer %d: the record of what was read is another one", i)
		}
		again = append(again, got)
	}
	if root := again[1].Tree.Root; root.Children["etc"].Children["file"] != root.Children["etc"].Children["again"] {
		t.Error("two names of one file became two files")
	}
	if one, two := built(t, layers[:1]), built(t, again[:1]); one != two {
		t.Errorf("artifacts of equal layers: %s and %s", one, two)
	}
}

// built returns the digest of the artifact of some layers.
func built(t *testing.T, layers []*Layer) oci.Digest {
	t.Helper()
	var config oci.ImageConfig
	config.OS, config.Architecture = "linux", "amd64"
	for _, l := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.DiffID)
	}
	content, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	desc := oci.Descriptor{MediaType: oci.MediaTypeImageConfig, Digest: oci.DigestOf(content), Size: int64(len(content))}
	subject := oci.Descriptor{MediaType: oci.MediaTypeImageManifest, Digest: oci.DigestOf([]byte("subject")), Size: 7}
	b, err := Build(t.Context(), BuildInput{
		Subject: subject, Config: desc, ConfigContent: content, Platform: oci.Platform{OS: "linux", Architecture: "amd64"}, Layers: layers,
	}, newMemSink())
	if err != nil {
		t.Fatal(err)
	}
	return b.Descriptor.Digest
}

func TestReadLayerRefuses(t *testing.T) {
	good := record(t, encoded(t, everyKind(t))[0])
	for i := range good {
		if _, err := ReadLayer(bytes.NewReader(good[:i])); err == nil {
			t.Errorf("the first %d of %d bytes were taken for all", i, len(good))
		}
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 0x10
		if l, err := ReadLayer(bytes.NewReader(bad)); err == nil && !bytes.Equal(record(t, l), good) {
			t.Errorf("damage of byte %d went unnoticed", i)
		}
	}
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	for what, content := range map[string]string{"nothing": "", "another version": "sluice layer 2\n"} {
		if _, err := ReadLayer(bytes.NewReader(z.EncodeAll([]byte(content), nil))); err == nil {
			t.Errorf("%s was taken", what)
		}
	}
}

// What is fuzzed is the content: the compression would hide it.
func FuzzReadLayer(f *testing.F) {
	z, err := zstd.NewReader(nil)
	if err != nil {
		f.Fatal(err)
	}
	for _, l := range encoded(f, everyKind(f), tarOf(f, 10, 0), sparseTar(f)) {
		content, err := z.DecodeAll(record(f, l), nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(content)
	}
	w, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		l, err := ReadLayer(bytes.NewReader(w.EncodeAll(content, nil)))
		if err != nil {
			return
		}
		content = record(t, l)
		again, err := ReadLayer(bytes.NewReader(content))
		if err != nil {
			t.Fatalf("what was read can't be read again: %v", err)
		}
		if !bytes.Equal(record(t, again), content) {
			t.Error("what was read is another layer when it's read again")
		}
	})
}
