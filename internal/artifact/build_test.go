package artifact

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/blob"
	"sluice/internal/erofs"
	"sluice/oci"
)

// entry is a member of a test's layer.
type entry struct {
	tar.Header
	content string
}

// layerTar makes a tar of entries.
func layerTar(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1_700_000_000, 123_456_789)
		}
		h.Format = tar.FormatPAX
		h.Size = int64(len(e.content))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func file(name, content string) entry {
	return entry{Header: tar.Header{Name: name}, content: content}
}

func dir(name string) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}}
}

func link(name, target string, typ byte) entry {
	return entry{Header: tar.Header{Name: name, Linkname: target, Typeflag: typ, Mode: 0o777}}
}

// sparseTar is a tar with a GNU sparse file (PAX format 1.0): "head", a hole,
// "tail".
func sparseTar(t testing.TB) []byte {
	t.Helper()
	const size = 1 << 20
	stored := "2\n0\n4\n1048572\n4\n"
	stored += strings.Repeat("\x00", 512-len(stored)) + "head" + "tail"
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	record := func(k, v string) string {
		n := len(k) + len(v) + 3
		for len(fmt.Sprint(n))+len(k)+len(v)+3 != n {
			n = len(fmt.Sprint(n)) + len(k) + len(v) + 3
		}
		return fmt.Sprintf("%d %s=%s\n", n, k, v)
	}
	pax := record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.name", "sparse") + record("GNU.sparse.realsize", fmt.Sprint(size))
	// archive/tar refuses to write such records, so the header is made by hand.
	writeRaw := func(name string, typ byte, content string) {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content)), Format: tar.FormatUSTAR, ModTime: time.Unix(1e9, 0)}); err != nil {
			t.Fatal(err)
		}
		header := b.Bytes()[b.Len()-512:]
		header[156] = typ
		copy(header[148:156], "        ")
		sum := 0
		for _, c := range header {
			sum += int(c)
		}
		copy(header[148:156], fmt.Sprintf("%06o\x00 ", sum))
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	writeRaw("pax", 'x', pax)
	writeRaw("GNUSparseFile.0/sparse", '0', stored)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// stack is three layers with a bit of everything; the last two are the same.
func stack(t testing.TB) [][]byte {
	base := layerTar(t, dir("etc"), file("etc/passwd", "root:x:0:0\n"), file("etc/big", string(words(1, 900_000))), dir("gone"), file("gone/a", "a"),
		dir("opaque"), file("opaque/below", "below"), link("etc/symlink", "passwd", tar.TypeSymlink), link("etc/hard", "etc/passwd", tar.TypeLink),
		entry{Header: tar.Header{Name: "etc/cap", PAXRecords: map[string]string{"SCHILY.xattr.user.note": "a note"}}, content: "cap"},
		entry{Header: tar.Header{Name: "dev", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}})
	upper := layerTar(t, file("etc/passwd", "root:x:0:0\nme:x:1:1\n"), file(".wh.gone", ""), file("opaque/.wh..wh..opq", ""), file("opaque/above", "above"),
		link("etc/big2", "etc/big", tar.TypeLink))
	same := layerTar(t, file("same", "same"))
	return [][]byte{base, upper, sparseTar(t), same, same}
}

// built is a stack of layers made into an artifact.
type builtStack struct {
	*Built
	sink   *memSink
	config []byte
	tars   [][]byte
}

func buildStack(t testing.TB, tars [][]byte, opts EncodeOptions) *builtStack {
	t.Helper()
	sink := newMemSink()
	in := BuildInput{
		Subject:  oci.Descriptor{MediaType: oci.MediaTypeDockerManifest, Digest: oci.DigestOf([]byte("subject")), Size: 7},
		Platform: oci.Platform{OS: "linux", Architecture: "arm", Variant: "v7"},
	}
	var config oci.ImageConfig
	config.OS, config.Architecture = "linux", "arm"
	config.RootFS.Type = "layers"
	for _, content := range tars {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf(content))
		l := encode(t, content, sink, opts)
		in.Layers = append(in.Layers, l)
		src := LayerSource{Tar: sink.source(l.Tar.Blob)}
		if l.Sparse != nil {
			src.Sparse = sink.source(l.Sparse.Blob)
		}
		in.Sources = append(in.Sources, src)
	}
	var err error
	if in.ConfigContent, err = json.Marshal(config); err != nil {
		t.Fatal(err)
	}
	in.Config = oci.Descriptor{MediaType: oci.MediaTypeDockerConfig, Digest: oci.DigestOf(in.ConfigContent), Size: int64(len(in.ConfigContent))}
	built, err := Build(context.Background(), in, sink)
	if err != nil {
		t.Fatal(err)
	}
	return &builtStack{built, sink, in.ConfigContent, tars}
}

func TestBuildSaysWhatItMade(t *testing.T) {
	b := buildStack(t, stack(t), EncodeOptions{})
	m, err := ParseManifest(b.Content)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(b.Manifest, m); diff != "" {
		t.Error(diff)
	}
	if m.Subject.MediaType != oci.MediaTypeDockerManifest || m.Platform.Variant != "v7" || !bytes.Equal(m.Config.Data, b.config) {
		t.Errorf("got %+v", m)
	}
	if len(m.Layers) != 5 || m.Devices() != 6 || m.Layers[2].Sparse == nil {
		t.Errorf("%d layers, %d devices", len(m.Layers), m.Devices())
	}
	for i, want := range [][2]int{{0, -1}, {1, -1}, {2, 3}, {4, -1}, {5, -1}} {
		if tar, sparse := m.LayerDevices(i); tar != want[0] || sparse != want[1] {
			t.Errorf("layer %d has devices %d, %d, want %v", i, tar, sparse, want)
		}
	}
	// Layer 1 has a hard link to a file of layer 0.
	if got := m.Layers[1].Metadata.Devices; !cmp.Equal(got, []int{0, 1}) {
		t.Errorf("metadata of layer 1 is on devices %v", got)
	}
	if got := m.Layers[3].Metadata.Devices; !cmp.Equal(got, []int{4}) {
		t.Errorf("metadata of layer 3 is on devices %v", got)
	}
	table, err := OpenTable(t.Context(), m.Table, b.sink.source(m.Table.Blob))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.CheckTable(table); err != nil {
		t.Error(err)
	}
	if table.Devices[4].Key != table.Devices[5].Key || table.Devices[0].Key == table.Devices[1].Key {
		t.Error("the same layer twice should have the same key, others not")
	}
	for _, l := range m.Layers {
		if b.sink.blobs[l.Tar.Digest] == nil {
			t.Errorf("blob %s isn't there", l.Tar.Digest)
		}
	}
}

func TestBuildIsDeterministic(t *testing.T) {
	tars := stack(t)
	want := buildStack(t, tars, EncodeOptions{Workers: 1})
	for range 5 {
		if got := buildStack(t, tars, EncodeOptions{Workers: 3}); got.Descriptor.Digest != want.Descriptor.Digest {
			t.Fatalf("manifests differ:\n%s\n%s", want.Content, got.Content)
		}
	}
}

func TestForChangesTheSubjectOnly(t *testing.T) {
	b := buildStack(t, stack(t), EncodeOptions{})
	index := oci.Descriptor{MediaType: oci.MediaTypeIndex, Digest: oci.DigestOf([]byte("index")), Size: 5}
	again, err := b.For(index)
	if err != nil {
		t.Fatal(err)
	}
	want := *b.Manifest
	want.Subject = index
	if diff := cmp.Diff(&want, again.Manifest); diff != "" {
		t.Error(diff)
	}
	if again.Descriptor.Digest == b.Descriptor.Digest {
		t.Error("the digest is the same")
	}
}

func TestBuildWantsTheConfigsLayers(t *testing.T) {
	sink := newMemSink()
	l := encode(t, stack(t)[0], sink, EncodeOptions{})
	config := fmt.Appendf(nil, `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[%q]}}`, oci.DigestOf([]byte("another")))
	in := BuildInput{Config: oci.Descriptor{Digest: oci.DigestOf(config)}, ConfigContent: config, Layers: []*Layer{l}}
	if _, err := Build(t.Context(), in, sink); err == nil || !strings.Contains(err.Error(), "diff ID") {
		t.Errorf("another layer: %v", err)
	}
	in.Layers = append(in.Layers, l)
	if _, err := Build(t.Context(), in, sink); err == nil || !strings.Contains(err.Error(), "2 layers") {
		t.Errorf("too many layers: %v", err)
	}
	in.ConfigContent = config[1:]
	if _, err := Build(t.Context(), in, sink); err == nil || !strings.Contains(err.Error(), "digest") {
		t.Errorf("another config: %v", err)
	}
}

// unpack unpacks metadata into a file.
func (b *builtStack) unpack(t testing.TB, ref MetadataRef) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "metadata.erofs"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	table, err := OpenTable(t.Context(), b.Manifest.Table, b.sink.source(b.Manifest.Table.Blob))
	if err != nil {
		t.Fatal(err)
	}
	if err := ref.Unpack(t.Context(), b.sink.source(ref.Blob), f, table.Sizes(ref.Devices)); err != nil {
		t.Fatal(err)
	}
	return f
}

// read reads a file of the image through its metadata and the layers' tars.
func (b *builtStack) read(t testing.TB, f *os.File, ref MetadataRef, path string, devices [][]byte) (string, error) {
	t.Helper()
	fs, err := erofs.Open(f, ref.Size)
	if err != nil {
		t.Fatal(err)
	}
	nid, err := fs.Lookup(path)
	if err != nil {
		return "", err
	}
	info, err := fs.Stat(nid)
	if err != nil {
		t.Fatal(err)
	}
	extents, err := fs.Extents(nid)
	if err != nil {
		t.Fatal(err)
	}
	content := make([]byte, info.Size)
	for _, e := range extents {
		copy(content[e.FileOffset:e.FileOffset+e.Length], devices[ref.Devices[e.Device]][e.Offset:])
	}
	return string(content), nil
}

// devices decodes all devices.
func (b *builtStack) devices(t testing.TB) [][]byte {
	t.Helper()
	table, err := OpenTable(context.Background(), b.Manifest.Table, b.sink.source(b.Manifest.Table.Blob))
	if err != nil {
		t.Fatal(err)
	}
	var all [][]byte
	for _, d := range table.Devices {
		r := newDeviceReader(context.Background(), d, b.sink.source(d.Blob))
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, append(content, make([]byte, d.Size-d.ContentSize)...))
	}
	return all
}

func TestMetadataPointsIntoTheTars(t *testing.T) {
	b := buildStack(t, stack(t), EncodeOptions{})
	m := b.Manifest
	devices := b.devices(t)
	merged := b.unpack(t, m.Metadata)
	for path, want := range map[string]string{
		"etc/passwd": "root:x:0:0\nme:x:1:1\n", "etc/hard": "root:x:0:0\n", "etc/big": string(words(1, 900_000)), "etc/big2": string(words(1, 900_000)),
		"opaque/above": "above", "same": "same", "sparse": "head" + strings.Repeat("\x00", 1<<20-8) + "tail",
	} {
		if got, err := b.read(t, merged, m.Metadata, path, devices); err != nil || got != want {
			t.Errorf("%s has %d bytes, %v, want %d", path, len(got), err, len(want))
		}
	}
	for _, path := range []string{"gone", "opaque/below"} {
		if _, err := b.read(t, merged, m.Metadata, path, devices); err == nil {
			t.Errorf("%s should be gone", path)
		}
	}
	upper := b.unpack(t, m.Layers[1].Metadata)
	if got, err := b.read(t, upper, m.Layers[1].Metadata, "etc/big2", devices); err != nil || got != string(words(1, 900_000)) {
		t.Errorf("layer 1's hard link has %d bytes, %v", len(got), err)
	}
	fs, err := erofs.Open(upper, m.Layers[1].Metadata.Size)
	if err != nil {
		t.Fatal(err)
	}
	nid, err := fs.Lookup("gone")
	if err != nil {
		t.Fatal(err)
	}
	if info, err := fs.Stat(nid); err != nil || info.Mode&0o170000 != 0o020000 || info.Major != 0 || info.Minor != 0 {
		t.Errorf("layer 1's whiteout is %+v, %v", info, err)
	}
	if nid, err = fs.Lookup("opaque"); err != nil {
		t.Fatal(err)
	}
	if x, err := fs.Xattrs(nid); err != nil || len(x) != 1 || x[0].Name != "trusted.overlay.opaque" || x[0].Value != "y" {
		t.Errorf("layer 1's opaque directory has %v, %v", x, err)
	}
}

// Whatever is wrong with metadata, it doesn't get through.
func TestMetadataIsChecked(t *testing.T) {
	b := buildStack(t, stack(t)[:1], EncodeOptions{})
	ref := b.Manifest.Metadata
	good := b.sink.blobs[ref.Blob.Digest]
	size := []int64{int64(len(b.tars[0]))}
	unpack := func(ref MetadataRef, content []byte, sizes []int64) error {
		f, err := os.Create(filepath.Join(t.TempDir(), "m"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		err = ref.Unpack(t.Context(), blob.FromBytes(content), f, sizes)
		if info, _ := f.Stat(); info.Size() > ref.Size {
			t.Errorf("%d bytes were written, %d are promised", info.Size(), ref.Size)
		}
		return err
	}
	if err := unpack(ref, good, size); err != nil {
		t.Fatal(err)
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1 << (i % 8)
		if err := unpack(ref, bad, size); err == nil {
			t.Fatalf("byte %d is wrong, and nobody noticed", i)
		}
	}
	for what, change := range map[string]func(*MetadataRef){
		"a byte less":  func(r *MetadataRef) { r.Size-- },
		"a byte more":  func(r *MetadataRef) { r.Size++ },
		"other digest": func(r *MetadataRef) { r.Digest = oci.DigestOf(nil) },
		"huge":         func(r *MetadataRef) { r.Size = MaxMetadataSize + 1 },
		"blob's size":  func(r *MetadataRef) { r.Blob.Size-- },
	} {
		bad := ref
		change(&bad)
		if err := unpack(bad, good, size); err == nil {
			t.Errorf("%s: unpacked", what)
		}
	}
	if err := unpack(ref, good, []int64{size[0], 512}); err == nil {
		t.Error("another number of devices: unpacked")
	}
	if err := unpack(ref, good, []int64{size[0] - 512}); err == nil {
		t.Error("a smaller device: unpacked")
	}
}

func TestVerifyAgrees(t *testing.T) {
	b := buildStack(t, stack(t), EncodeOptions{})
	r, err := Verify(t.Context(), b.Manifest, b.config, b.sink.source)
	if err != nil {
		t.Fatal(err)
	}
	if r.Layers != 5 || r.Devices != 6 || r.Chunks < 6 {
		t.Errorf("got %+v", r)
	}
}

// Verify finds whatever byte of whatever blob is wrong, and says where.
func TestVerifyFindsEveryDamage(t *testing.T) {
	b := buildStack(t, stack(t), EncodeOptions{})
	for digest, good := range b.sink.blobs {
		for _, i := range []int{0, 1, len(good) / 3, len(good) / 2, len(good) - 1} {
			bad := bytes.Clone(good)
			bad[i] ^= 0x40
			b.sink.blobs[digest] = bad
			_, err := Verify(t.Context(), b.Manifest, b.config, b.sink.source)
			b.sink.blobs[digest] = good
			if err == nil {
				t.Fatalf("byte %d of blob %s is wrong, and nobody noticed", i, digest)
			}
		}
	}
	other := bytes.Replace(b.config, []byte("arm"), []byte("mra"), 1)
	if _, err := Verify(t.Context(), b.Manifest, other, b.sink.source); err == nil {
		t.Error("another config was accepted")
	}
}

// An artifact that says of a layer what isn't so is found out by the diff IDs
// in the config, even if its own digests are all consistent.
func TestVerifyFindsForgedLayers(t *testing.T) {
	tars := stack(t)
	genuine := buildStack(t, tars, EncodeOptions{})
	tars[1] = layerTar(t, file("etc/passwd", "evil"))
	forged := buildStack(t, tars, EncodeOptions{})
	forged.Manifest.Config = genuine.Manifest.Config
	if _, err := Verify(t.Context(), forged.Manifest, genuine.config, forged.sink.source); err == nil || !strings.Contains(err.Error(), "layer 1") {
		t.Errorf("got %v", err)
	}
}
