package bed

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"sluice/oci"
)

// WriteLayout writes an OCI image layout with one image for linux on this
// machine's architecture, which runs command by default and whose layers are
// the tars compressed by gzip -6.
func WriteLayout(dir string, command []string, tars []string) error {
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return err
	}
	layers := make([]oci.Descriptor, len(tars))
	diffIDs := make([]oci.Digest, len(tars))
	errs := make([]error, len(tars))
	var wg sync.WaitGroup
	slots := make(chan struct{}, runtime.NumCPU())
	for i := range tars {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			layers[i], diffIDs[i], errs[i] = gzipBlob(blobs, tars[i])
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	made := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	config := oci.ImageConfig{Created: &made, Platform: oci.Platform{OS: "linux", Architecture: runtime.GOARCH}}
	config.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	config.Config.Cmd = command
	config.RootFS.Type = "layers"
	config.RootFS.DiffIDs = diffIDs
	configDesc, err := jsonBlob(blobs, oci.MediaTypeImageConfig, config)
	if err != nil {
		return err
	}
	manifest, err := jsonBlob(blobs, oci.MediaTypeImageManifest, oci.ImageManifest{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest, Config: configDesc, Layers: layers,
	})
	if err != nil {
		return err
	}
	manifest.Platform = &config.Platform
	index, err := json.Marshal(oci.Index{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex, Manifests: []oci.Descriptor{manifest},
	})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "index.json"), index, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}

// gzipBlob compresses a tar into blobs.
func gzipBlob(blobs, src string) (oci.Descriptor, oci.Digest, error) {
	in, err := os.Open(src)
	if err != nil {
		return oci.Descriptor{}, "", err
	}
	defer in.Close()
	out, err := os.CreateTemp(blobs, ".gzip-")
	if err != nil {
		return oci.Descriptor{}, "", err
	}
	defer out.Close()
	compressed, plain := sha256.New(), sha256.New()
	zw, err := gzip.NewWriterLevel(io.MultiWriter(out, compressed), 6)
	if err != nil {
		return oci.Descriptor{}, "", err
	}
	if _, err := io.Copy(io.MultiWriter(zw, plain), in); err != nil {
		return oci.Descriptor{}, "", err
	}
	if err := zw.Close(); err != nil {
		return oci.Descriptor{}, "", err
	}
	info, err := out.Stat()
	if err != nil {
		return oci.Descriptor{}, "", err
	}
	hex := fmt.Sprintf("%x", compressed.Sum(nil))
	if err := os.Rename(out.Name(), filepath.Join(blobs, hex)); err != nil {
		return oci.Descriptor{}, "", err
	}
	desc := oci.Descriptor{MediaType: oci.MediaTypeLayerGzip, Digest: oci.Digest("sha256:" + hex), Size: info.Size()}
	return desc, oci.Digest(fmt.Sprintf("sha256:%x", plain.Sum(nil))), nil
}

// jsonBlob writes v into blobs as JSON.
func jsonBlob(blobs, mediaType string, v any) (oci.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return oci.Descriptor{}, err
	}
	d := oci.DigestOf(b)
	return oci.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))},
		os.WriteFile(filepath.Join(blobs, d.Encoded()), b, 0o644)
}

// LayerFiles returns the blobs of the layers of a layout's only image.
func LayerFiles(layout string) ([]string, error) {
	blob := func(d oci.Digest) string { return filepath.Join(layout, "blobs", d.Algorithm().String(), d.Encoded()) }
	var index oci.Index
	if err := readJSON(filepath.Join(layout, "index.json"), &index); err != nil {
		return nil, err
	}
	if len(index.Manifests) != 1 {
		return nil, fmt.Errorf("%s has %d images, want one", layout, len(index.Manifests))
	}
	var manifest oci.ImageManifest
	if err := readJSON(blob(index.Manifests[0].Digest), &manifest); err != nil {
		return nil, err
	}
	var files []string
	for _, l := range manifest.Layers {
		files = append(files, blob(l.Digest))
	}
	return files, nil
}

func readJSON(name string, v any) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

// WriteProgramImage writes an OCI layout whose only layer has programs of this
// machine, by their names in the image, as `FROM scratch` and COPY make it.
func WriteProgramImage(dir string, programs map[string]string) error {
	var members []member
	for _, name := range slices.Sorted(maps.Keys(programs)) {
		content, err := os.ReadFile(programs[name])
		if err != nil {
			return err
		}
		members = append(members, member{name, content, ""})
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	layer := filepath.Join(dir, "layer.tar")
	if err := writeMembers(layer, members); err != nil {
		return err
	}
	return WriteLayout(dir, nil, []string{layer})
}
