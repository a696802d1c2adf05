package whole

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice/oci"
	"sluice/test/bed"
)

// get fetches JSON from the registry.
func (s *stage) get(t *testing.T, path string, v any) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.Registry.Addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", strings.Join([]string{oci.MediaTypeImageManifest, oci.MediaTypeIndex}, ", "))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, oci.MaxManifestSize))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, b)
	}
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		t.Fatalf("GET %s: %v", path, err)
	}
}

// artifact returns the original manifest of an image and its artifact's.
func (s *stage) artifact(t *testing.T, repo, tag string) (original, artifact oci.ImageManifest) {
	t.Helper()
	digest := s.crane(t, "digest", s.Ref(repo)+":"+tag)
	s.get(t, "/v2/"+repo+"/manifests/"+digest, &original)
	var referrers oci.Index
	s.get(t, "/v2/"+repo+"/referrers/"+digest+"?artifactType="+oci.ArtifactTypeStreaming, &referrers)
	if len(referrers.Manifests) != 1 {
		t.Fatalf("%s:%s has %d streaming artifacts, want one", repo, tag, len(referrers.Manifests))
	}
	s.get(t, "/v2/"+repo+"/manifests/"+referrers.Manifests[0].Digest.String(), &artifact)
	return original, artifact
}

// TestArtifactIsSmall holds the artifact's size against the original's.
func TestArtifactIsSmall(t *testing.T) {
	s := theStage(t)
	for _, tag := range []string{"1", "28"} {
		original, artifact := s.artifact(t, "debian", tag)
		var gzip, layers, rest int64
		for _, l := range original.Layers {
			gzip += l.Size
		}
		for _, l := range artifact.Layers {
			if l.MediaType == oci.MediaTypeLayerZstd {
				layers += l.Size
			} else {
				rest += l.Size
			}
		}
		t.Logf("FIGURE debian:%s: layer blobs are %.3f of gzip -6, everything else %.2f %% of it",
			tag, float64(layers)/float64(gzip), 100*float64(rest)/float64(gzip))
		if float64(layers) > 1.05*float64(gzip) {
			t.Errorf("debian:%s: layer blobs of %d bytes, more than 1.05 of gzip's %d", tag, layers, gzip)
		}
		if layers == 0 || float64(metadataSize(artifact)) > 0.02*float64(gzip) {
			t.Errorf("debian:%s: metadata and chunk table of %d bytes, more than 2 %% of %d", tag, metadataSize(artifact), gzip)
		}
	}
}

// metadataSize is what a node fetches before it can mount: the first two
// layers of the artifact.
func metadataSize(m oci.ImageManifest) int64 { return m.Layers[0].Size + m.Layers[1].Size }

// TestConversionIsFastAndSmall converts the one-layer image with each program
// that decodes gzip, and looks at the process.
func TestConversionIsFastAndSmall(t *testing.T) {
	s := theStage(t)
	original, _ := s.artifact(t, "debian", "1")
	size := uncompressed(t, s, original)
	if err := bed.Install(t.Context(), "isal", "pigz"); err != nil {
		t.Log(err) // then it is measured without them
	}
	// A registry of its own, that takes what clients have converted.
	reg, err := bed.StartRegistry(t.Context(), s.Sluice, t.TempDir(), "SLUICE_REGISTRY_PUSH_ALLOW_STREAMING=true")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(reg.Stop)
	for _, gunzip := range []string{"go", "unpigz", "igzip"} {
		path := t.TempDir()
		if program, err := exec.LookPath(gunzip); err == nil && gunzip != "go" {
			if err := os.Symlink(program, filepath.Join(path, gunzip)); err != nil {
				t.Fatal(err)
			}
		} else if gunzip != "go" {
			t.Logf("%s isn't installed", gunzip)
			continue
		}
		name := gunzip + "/debian:1"
		if err := reg.Push(t.Context(), s.Tools, s.images.OneLayer, name); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), s.Sluice, "artifact-streaming", "create", "--local", "-o", "json", reg.Addr+"/"+name)
		cmd.Env = append(os.Environ(), "PATH="+path)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		start := time.Now()
		out, err := cmd.Output()
		took := time.Since(start)
		if err != nil {
			t.Fatalf("%v\n%s", err, &stderr)
		}
		var made struct{ Artifacts []struct{ Gunzip string } }
		if err := json.Unmarshal(out, &made); err != nil || len(made.Artifacts) != 1 || made.Artifacts[0].Gunzip != gunzip {
			t.Fatalf("gunzip by %s: %v, %s", gunzip, err, out)
		}
		usage := cmd.ProcessState.SysUsage().(*syscall.Rusage)
		t.Logf("FIGURE conversion, gunzip by %s: %.0f MB of tar in %.1f s: %.0f MB/s, %.0f MB/s per CPU second, peak memory %d MB", gunzip,
			float64(size)/1e6, took.Seconds(), float64(size)/1e6/took.Seconds(),
			float64(size)/1e6/(cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()).Seconds(), usage.Maxrss>>10)
		if usage.Maxrss > 256<<10 {
			t.Errorf("the converter used %d KiB of memory, more than 256 MiB", usage.Maxrss)
		}
	}
	s.convertThere(t, size)
}

// convertThere has a registry that knows nothing yet convert the image by
// itself, and then again in another repository, where the layer is known.
func (s *stage) convertThere(t *testing.T, size int64) {
	reg, err := bed.StartRegistry(t.Context(), s.Sluice, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(reg.Stop)
	for _, name := range []string{"first/debian:1", "second/debian:1"} {
		if err := reg.Push(t.Context(), s.Tools, s.images.OneLayer, name); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		out, err := exec.CommandContext(t.Context(), s.Sluice, "artifact-streaming", "create", reg.Addr+"/"+name).CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		took := time.Since(start)
		t.Logf("FIGURE conversion in the registry, %s: %.1f s, %.0f MB/s", name, took.Seconds(), float64(size)/1e6/took.Seconds())
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", reg.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if peak, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			t.Logf("FIGURE the registry's peak memory: %s", strings.TrimSpace(peak))
		}
	}
}

// uncompressed adds up the tars of an image of the bed by reading them.
func uncompressed(t *testing.T, s *stage, m oci.ImageManifest) int64 {
	t.Helper()
	var total int64
	for _, l := range m.Layers {
		f, err := os.Open(s.images.OneLayer + "/blobs/sha256/" + l.Digest.Encoded())
		if err != nil {
			t.Fatal(err)
		}
		n, err := gunzippedSize(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		total += n
	}
	return total
}

// TestColdStarts measures what the demonstration shows, and holds its most
// important figure: layers cost nothing.
func TestColdStarts(t *testing.T) {
	s := theStage(t)
	link, err := bed.NewLink(t.Context(), s.Registry.Addr, 200e6, 10*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	type key struct{ tag, snapshotter string }
	times := map[key][]float64{}
	mounts := map[key]int{}
	cold := func(tag, snapshotter string) {
		c, err := bed.Cold(t.Context(), s.Tools, s.Sluice, s.Work, link, snapshotter, link.Addr()+"/debian:"+tag, "python3", "-c", `print("hi")`)
		if err != nil {
			t.Fatal(err)
		}
		if c.Output != "hi\n" {
			t.Fatalf("printed %q", c.Output)
		}
		k := key{tag, snapshotter}
		times[k] = append(times[k], c.Total().Seconds())
		mounts[k] = max(mounts[k], c.Mounts)
		if len(times[k]) == 1 {
			t.Logf("FIGURE debian:%s by %s: %.2f s (pull %.2f, run %.2f), %.1f MB, %d connections, %d mounts", tag, snapshotter,
				c.Total().Seconds(), c.Pull.Seconds(), c.FirstOutput.Seconds(), float64(c.Bytes)/1e6, c.Connections, c.Mounts)
		}
	}
	for range 5 {
		cold("1", bed.Sluice)
		cold("28", bed.Sluice)
	}
	cold("1", bed.Overlayfs)
	cold("28", bed.Overlayfs)
	ones, manies := times[key{"1", bed.Sluice}], times[key{"28", bed.Sluice}]
	one, many := median(ones), median(manies)
	pulled := median(times[key{"28", bed.Overlayfs}])
	t.Logf("FIGURE streamed start: %.3f s with one layer, %.3f s with 28 (ratio %.2f); the ordinary pull takes %.1f times as long", one, many, many/one, pulled/many)
	if a, b := mounts[key{"1", bed.Sluice}], mounts[key{"28", bed.Sluice}]; a != b {
		t.Errorf("%d mounts with one layer, %d with 28: an image is one mount", a, b)
	}
	// Of a shared machine, whose medians wander by a third, and whose disk may be slow
	// for what containerd writes of each layer; the goal, 1.05, is printed above.
	// Mounting layer by layer would take four times as long.
	if slices.Min(manies) > 3*slices.Min(ones) {
		t.Errorf("28 layers start in %.3f s at best, one in %.3f s: layers must not cost", slices.Min(manies), slices.Min(ones))
	}
	if many*4 > pulled {
		t.Errorf("streaming takes %.2f s, the ordinary pull %.2f s", many, pulled)
	}
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}
