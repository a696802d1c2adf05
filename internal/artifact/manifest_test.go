package artifact

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"sluice/oci"
)

// The spelling of the format is what other readers rely on: docs/format.md.
func TestManifestSpelling(t *testing.T) {
	b := buildStack(t, stack(t), EncodeOptions{})
	var m struct {
		SchemaVersion int
		MediaType     string
		ArtifactType  string
		Config        oci.Descriptor
		Layers        []oci.Descriptor
		Subject       oci.Descriptor
		Annotations   map[string]string
	}
	if err := json.Unmarshal(b.Content, &m); err != nil {
		t.Fatal(err)
	}
	if m.SchemaVersion != 2 || m.MediaType != "application/vnd.oci.image.manifest.v1+json" || m.ArtifactType != "application/vnd.azure.artifact.streaming.v1" ||
		m.Config.MediaType != oci.MediaTypeDockerConfig {
		t.Errorf("got %s", b.Content)
	}
	for k, want := range map[string]string{
		"streaming.format": "erofs", "streaming.version": "v1", "streaming.platform.os": "linux", "streaming.platform.arch": "arm", "streaming.platform.variant": "v7",
	} {
		if m.Annotations[k] != want {
			t.Errorf("annotation %s is %q, want %q", k, m.Annotations[k], want)
		}
	}
	var types []string
	for _, l := range m.Layers {
		if l.MediaType == MediaTypeBootPack {
			continue // whether there is one isn't the question here
		}
		types = append(types, strings.TrimPrefix(l.MediaType, "application/vnd."))
	}
	own := "sluice.layer.metadata.v1.erofs+zstd"
	want := fmt.Sprint([]string{
		"sluice.metadata.v1.erofs+zstd", "sluice.chunktable.v1",
		"oci.image.layer.v1.tar+zstd", own, "oci.image.layer.v1.tar+zstd", own, "oci.image.layer.v1.tar+zstd", "sluice.layer.sparse.v1+zstd", own,
		"oci.image.layer.v1.tar+zstd", own, "oci.image.layer.v1.tar+zstd", own,
	})
	if got := fmt.Sprint(types); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := m.Layers[0].Annotations["streaming.metadata.devices"]; got != "0,1,2,3,4,5" {
		t.Errorf("devices are %q", got)
	}
}

// edit decodes a manifest, changes it and encodes it.
func edit(t testing.TB, content []byte, change func(m map[string]any)) []byte {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(content, &m); err != nil {
		t.Fatal(err)
	}
	change(m)
	out, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestParseManifestRefuses(t *testing.T) {
	good := buildStack(t, stack(t), EncodeOptions{}).Content
	layer := func(m map[string]any, i int) map[string]any { return m["layers"].([]any)[i].(map[string]any) }
	annotate := func(i int, name, value string) func(map[string]any) {
		return func(m map[string]any) { layer(m, i)["annotations"].(map[string]any)[name] = value }
	}
	drop := func(mediaType string) func(map[string]any) {
		return func(m map[string]any) {
			var kept []any
			for _, l := range m["layers"].([]any) {
				if l.(map[string]any)["mediaType"] != mediaType {
					kept = append(kept, l)
				}
			}
			m["layers"] = kept
		}
	}
	zeros := strings.Repeat("0", 64)
	for what, change := range map[string]func(m map[string]any){
		"schema":            func(m map[string]any) { m["schemaVersion"] = 1 },
		"media type":        func(m map[string]any) { m["mediaType"] = oci.MediaTypeDockerManifest },
		"artifact type":     func(m map[string]any) { m["artifactType"] = "x/y" },
		"format":            func(m map[string]any) { m["annotations"].(map[string]any)["streaming.format"] = "overlaybd" },
		"version":           func(m map[string]any) { m["annotations"].(map[string]any)["streaming.version"] = "v2" },
		"no platform":       func(m map[string]any) { delete(m["annotations"].(map[string]any), "streaming.platform.os") },
		"no annotations":    func(m map[string]any) { delete(m, "annotations") },
		"no subject":        func(m map[string]any) { delete(m, "subject") },
		"subject's digest":  func(m map[string]any) { m["subject"].(map[string]any)["digest"] = "sha256:12" },
		"subject's size":    func(m map[string]any) { m["subject"].(map[string]any)["size"] = -1 },
		"huge config":       func(m map[string]any) { c := m["config"].(map[string]any); c["size"] = 1 << 40; delete(c, "data") },
		"config's data":     func(m map[string]any) { m["config"].(map[string]any)["data"] = "aGVsbG8=" },
		"no blobs":          func(m map[string]any) { m["layers"] = []any{} },
		"no metadata":       drop(MediaTypeMetadata),
		"no table":          drop(MediaTypeTable),
		"no layers":         drop(MediaTypeLayer),
		"no layer metadata": drop(MediaTypeLayerMetadata),
		"two tables":        func(m map[string]any) { l := m["layers"].([]any); m["layers"] = append([]any{l[1]}, l...) },
		"late metadata":     func(m map[string]any) { l := m["layers"].([]any); m["layers"] = append(l[1:], l[0]) },
		"lost sparse":       drop(MediaTypeSparse),
		"decoded digest":    annotate(0, AnnotationMetadataDigest, "md5:00"),
		"no decoded size":   annotate(0, AnnotationMetadataSize, ""),
		"huge decoded size": annotate(0, AnnotationMetadataSize, "99999999999999"),
		"zero decoded size": annotate(0, AnnotationMetadataSize, "0"),
		"odd number":        annotate(0, AnnotationMetadataSize, "+5"),
		"devices missing":   annotate(0, AnnotationDevices, "0,1,2"),
		"devices swapped":   annotate(0, AnnotationDevices, "1,0,2,3,4,5"),
		"devices twice":     annotate(0, AnnotationDevices, "0,0,1,2,3,4"),
		"device unknown":    annotate(0, AnnotationDevices, "0,1,2,3,4,9"),
		"device negative":   annotate(0, AnnotationDevices, "-1"),
		"devices no list":   annotate(0, AnnotationDevices, "0, 1"),
		"devices long":      annotate(0, AnnotationDevices, strings.Repeat("0,", 100_000)),
		"root's digest":     annotate(1, AnnotationRootDigest, zeros),
		"root's size":       annotate(1, AnnotationRootSize, "1"),
		"root too large":    annotate(1, AnnotationRootSize, "8000000"),
		"sha512 blob":       func(m map[string]any) { layer(m, 0)["digest"] = "sha512:" + zeros + zeros },
		"many blobs":        func(m map[string]any) { m["layers"] = make([]any, 1<<16) },
		"huge table":        func(m map[string]any) { layer(m, 1)["size"] = int64(1) << 62 },
	} {
		t.Run(what, func(t *testing.T) {
			m, err := ParseManifest(edit(t, good, change))
			if err == nil {
				t.Fatalf("parsed: %+v", m)
			}
			t.Log(err)
		})
	}
	for _, content := range []string{"", "null", "[]", "{}", "<html>", string(good) + "x", strings.Repeat("[", 1<<20)} {
		if _, err := ParseManifest([]byte(content)); err == nil {
			t.Errorf("%.20q was parsed", content)
		}
	}
	if _, err := ParseManifest(make([]byte, oci.MaxManifestSize+1)); err == nil {
		t.Error("a manifest that's too large was parsed")
	}
}

// What a later version adds, this one ignores.
func TestParseManifestSkipsWhatItDoesntKnow(t *testing.T) {
	good := buildStack(t, stack(t), EncodeOptions{})
	content := edit(t, good.Content, func(m map[string]any) {
		extra := map[string]any{"mediaType": "application/vnd.sluice.future.v1", "digest": oci.DigestOf(nil), "size": 0}
		m["layers"] = append(append([]any{extra}, m["layers"].([]any)...), extra)
	})
	m, err := ParseManifest(content)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Layers) != len(good.Manifest.Layers) || m.BootPack == nil != (good.Manifest.BootPack == nil) {
		t.Errorf("got %+v", m)
	}
}

func TestCheckTableNoticesAnotherImagesTable(t *testing.T) {
	b := buildStack(t, stack(t), EncodeOptions{})
	table, err := OpenTable(t.Context(), b.Manifest.Table, b.sink.source(b.Manifest.Table.Blob))
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(d *[]*Device){
		"fewer":        func(d *[]*Device) { *d = (*d)[:5] },
		"swapped":      func(d *[]*Device) { (*d)[0], (*d)[1] = (*d)[1], (*d)[0] },
		"another diff": func(d *[]*Device) { c := *(*d)[0]; c.DiffID = oci.DigestOf(nil); (*d)[0] = &c },
		"another blob": func(d *[]*Device) { c := *(*d)[3]; c.Blob.Digest = oci.DigestOf(nil); (*d)[3] = &c },
		"not sparse":   func(d *[]*Device) { c := *(*d)[3]; c.Sparse = false; (*d)[3] = &c },
		"sparse":       func(d *[]*Device) { c := *(*d)[0]; c.Sparse = true; (*d)[0] = &c },
	} {
		list := slices.Clone(table.Devices)
		change(&list)
		if err := b.Manifest.CheckTable(&Table{Devices: list}); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add(buildStack(f, stack(f), EncodeOptions{}).Content)
	f.Add([]byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"application/vnd.azure.artifact.streaming.v1"}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		m, err := ParseManifest(content)
		if err != nil {
			return
		}
		// What was accepted can be said again, and understood.
		again, err := finish(m)
		if err != nil {
			t.Fatal(err)
		}
		for i := range again.Manifest.Layers {
			again.Manifest.LayerDevices(i)
		}
	})
}
