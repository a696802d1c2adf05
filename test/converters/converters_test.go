package converters

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/awslabs/soci-snapshotter/ztoc"
	"github.com/containerd/stargz-snapshotter/estargz"

	"sluice/internal/artifact"
	"sluice/internal/layer"
	"sluice/oci"
	"sluice/test/bed"
)

// debianLayer returns the only layer of the bed's image, and its diff ID.
func debianLayer(t *testing.T) (name string, desc oci.Descriptor, diffID oci.Digest) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making the Debian image needs root")
	}
	images, err := bed.Debian(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	blob := func(d oci.Digest) string {
		return filepath.Join(images.OneLayer, "blobs", "sha256", d.Encoded())
	}
	var index oci.Index
	var manifest oci.ImageManifest
	var config oci.ImageConfig
	read := func(name string, v any) {
		b, err := os.ReadFile(name)
		if err == nil {
			err = json.Unmarshal(b, v)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	read(filepath.Join(images.OneLayer, "index.json"), &index)
	read(blob(index.Manifests[0].Digest), &manifest)
	read(blob(manifest.Config.Digest), &config)
	return blob(manifest.Layers[0].Digest), manifest.Layers[0], config.RootFS.DiffIDs[0]
}

// discard is a sink that counts.
type discard struct{ n int64 }

func (d *discard) Create(context.Context) (artifact.BlobWriter, error) { return d, nil }
func (d *discard) Commit(context.Context, oci.Digest) error            { return nil }
func (d *discard) Cancel()                                             {}
func (d *discard) Write(p []byte) (int, error)                         { d.n += int64(len(p)); return len(p), nil }

// measured is what a conversion took.
type measured struct {
	wall, cpu time.Duration
	size      int64 // of what it made
}

func measure(t *testing.T, convert func() (int64, error)) (m measured) {
	t.Helper()
	cpu := func() time.Duration {
		var own, children syscall.Rusage
		if err := errors.Join(syscall.Getrusage(syscall.RUSAGE_SELF, &own), syscall.Getrusage(syscall.RUSAGE_CHILDREN, &children)); err != nil {
			t.Fatal(err)
		}
		var sum time.Duration
		for _, v := range []syscall.Timeval{own.Utime, own.Stime, children.Utime, children.Stime} {
			sum += time.Duration(v.Nano())
		}
		return sum
	}
	start, before := time.Now(), cpu()
	size, err := convert()
	if err != nil {
		t.Fatal(err)
	}
	return measured{time.Since(start), cpu() - before, size}
}

// span is what SOCI's own command makes a checkpoint after, in bytes.
const span = 4 << 20

// TestAgainstOthers converts the same gzip layer by each library, in turns, and
// tells the best time of each. The others' options are their defaults.
func TestAgainstOthers(t *testing.T) {
	name, desc, diffID := debianLayer(t)
	if err := bed.Install(t.Context(), "isal"); err != nil {
		t.Logf("igzip isn't installed: %v", err)
	}
	var content int64
	ours := func(gunzip layer.Gunzip) func() (int64, error) {
		return func() (int64, error) {
			f, err := os.Open(name)
			if err != nil {
				return 0, err
			}
			defer f.Close()
			tar, err := gunzip.Decompress(t.Context(), oci.VerifyReader(f, desc))
			if err != nil {
				return 0, err
			}
			defer tar.Close()
			var sink discard
			l, err := artifact.EncodeLayer(t.Context(), tar, &sink, artifact.EncodeOptions{DiffID: diffID})
			if err == nil {
				content = l.Tar.Size
			}
			return sink.n, err
		}
	}
	soci := func() (int64, error) {
		z, err := ztoc.NewBuilder("test").BuildZtoc(name, span)
		if err != nil {
			return 0, err
		}
		r, _, err := ztoc.Marshal(z)
		if err != nil {
			return 0, err
		}
		return io.Copy(io.Discard, r)
	}
	stargz := func() (int64, error) {
		f, err := os.Open(name)
		if err != nil {
			return 0, err
		}
		defer f.Close()
		blob, err := estargz.Build(io.NewSectionReader(f, 0, desc.Size))
		if err != nil {
			return 0, err
		}
		n, err := io.Copy(io.Discard, blob)
		return n, errors.Join(err, blob.Close())
	}
	best := layer.FindGunzip()
	ways := []struct {
		name    string
		rounds  int
		convert func() (int64, error)
	}{
		{"sluice, gunzip by go", 3, ours(layer.Gunzip{})},
		{fmt.Sprintf("sluice, gunzip by %s", best), 3, ours(best)},
		{"SOCI, which makes an index only", 3, soci},
		{"eStargz", 1, stargz}, // a minute
	}
	least := make([]measured, len(ways))
	for round := range 3 {
		for i, w := range ways {
			if round >= w.rounds {
				continue
			}
			if m := measure(t, w.convert); least[i].wall == 0 || m.wall < least[i].wall {
				least[i] = m
			}
		}
	}
	for i, w := range ways {
		m := least[i]
		t.Logf("FIGURE converting a layer of %.0f MB (gzip %.0f MB): %s: %.1f s, %.0f MB/s, %.1f CPU seconds, %.0f MB made",
			float64(content)/1e6, float64(desc.Size)/1e6, w.name, m.wall.Seconds(), float64(content)/1e6/m.wall.Seconds(), m.cpu.Seconds(), float64(m.size)/1e6)
	}
	if least[0].wall > least[3].wall {
		t.Errorf("it takes %v, eStargz %v", least[0].wall, least[3].wall)
	}
}
