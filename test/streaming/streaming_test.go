package streaming

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/internal/remote"
	"sluice/oci"
	"sluice/test/bed"
)

const repo = "team/app"

// replica is a registry of several, and its client.
type replica struct {
	*bed.Registry
	images *remote.Registry
}

func replicas(t *testing.T, n int) []*replica {
	t.Helper()
	ctx := t.Context()
	src, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	sluice, err := bed.BuildSluice(ctx, src, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	objects, err := bed.StartMinIO(ctx, src, t.TempDir(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(objects.Stop)
	if err := objects.NewBucket("images"); err != nil {
		t.Fatal(err)
	}
	database, err := bed.StartPostgres(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(database.Stop)
	address, err := database.NewDatabase(ctx, "registry")
	if err != nil {
		t.Fatal(err)
	}
	env := append(objects.RegistryEnv("images"), "SLUICE_REGISTRY_DATABASE_URL="+address, "SLUICE_REGISTRY_LOG_LEVEL=warn")
	var all []*replica
	for range n {
		r := new(replica)
		if r.Registry, err = bed.StartRegistry(ctx, sluice, t.TempDir(), env...); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Stop() })
		if r.images, err = remote.New(r.Addr, remote.Options{}); err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	return all
}

// layer makes a layer of one file that doesn't compress.
func layer(seed byte, n int) (content, compressed []byte) {
	data := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(data)
	var raw, small bytes.Buffer
	w := tar.NewWriter(&raw)
	_ = w.WriteHeader(&tar.Header{Name: fmt.Sprintf("file-%d", seed), Size: int64(n), Mode: 0o644})
	_, _ = w.Write(data)
	_ = w.Close()
	z := gzip.NewWriter(&small)
	_, _ = z.Write(raw.Bytes())
	_ = z.Close()
	return raw.Bytes(), small.Bytes()
}

// push pushes an image of two layers, the first of which all images have.
func (r *replica) push(t *testing.T, tag string, seed byte) oci.Digest {
	t.Helper()
	blob := func(mediaType string, content []byte) oci.Descriptor {
		desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
		if _, err := r.images.PushBlob(t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	var config oci.ImageConfig
	config.OS, config.Architecture = "linux", "amd64"
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest}
	for _, s := range []byte{0, seed} {
		content, compressed := layer(s, 24<<20)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf(content))
		m.Layers = append(m.Layers, blob(oci.MediaTypeLayerGzip, compressed))
	}
	doc, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	m.Config = blob(oci.MediaTypeImageConfig, doc)
	if doc, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	desc, err := r.images.PushManifest(t.Context(), repo, tag, m.MediaType, doc)
	if err != nil {
		t.Fatal(err)
	}
	return desc.Digest
}

// manage asks the API of conversion, and returns the status of the operation.
func (r *replica) manage(t *testing.T, method, path, body string, want int) (status string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+r.Addr+"/acr/v1/"+repo+"/_streaming"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var doc struct{ Status string }
	if err := json.NewDecoder(resp.Body).Decode(&doc); err != nil || resp.StatusCode != want {
		t.Fatalf("%s %s: %s, %+v, %v", method, path, resp.Status, doc, err)
	}
	return doc.Status
}

// artifacts returns how many streaming artifacts an image has. Each must be
// complete; whole has those that were.
func (r *replica) artifacts(t *testing.T, subject oci.Digest, whole map[oci.Digest]bool) (n int) {
	t.Helper()
	ctx := t.Context()
	for desc, err := range r.images.Referrers(ctx, repo, subject, oci.ArtifactTypeStreaming) {
		if err != nil {
			t.Fatal(err)
		}
		n++
		if whole[desc.Digest] {
			continue
		}
		whole[desc.Digest] = true
		m, err := r.images.GetManifest(ctx, repo, desc.Digest.String())
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := artifact.ParseManifest(m.Content)
		if err != nil {
			t.Fatal(err)
		}
		b, err := r.images.GetBlob(ctx, repo, parsed.Config.Digest)
		if err != nil {
			t.Fatal(err)
		}
		config, err := io.ReadAll(b)
		b.Close()
		if err != nil {
			t.Fatal(err)
		}
		source := func(d oci.Descriptor) blob.Source { return blob.FromRegistry(r.images, repo, d) }
		if _, err := artifact.Verify(ctx, parsed, config, source); err != nil {
			t.Errorf("an artifact of %s can be seen and isn't complete: %v", subject, err)
		}
	}
	return n
}

// Images are pushed to one replica while the other is killed: what is converted
// is whole whenever it's seen, and in the end all of it is.
func TestReplicasKilledInTurns(t *testing.T) {
	r := replicas(t, 2)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	images := []oci.Digest{r[0].push(t, "v0", 1)}
	r[0].manage(t, http.MethodPost, "", `{"convertPushedImages":true,"backfill":true}`, http.StatusAccepted)
	cut, whole := 0, map[oci.Digest]bool{}
	for round := range 8 {
		victim, other := r[round%2], r[(round+1)%2]
		for n := range 2 {
			images = append(images, other.push(t, fmt.Sprintf("v%d-%d", round, n), byte(2+round*2+n)))
		}
		if round%3 > 0 { // at once, there's certainly something to do
			time.Sleep(time.Duration(random.Int64N(int64(4 * time.Second))))
		}
		victim.Kill()
		for _, i := range images {
			switch n := other.artifacts(t, i, whole); n {
			case 0:
				cut++
			case 1:
			default:
				t.Errorf("%d artifacts of %s", n, i)
			}
		}
		if err := victim.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("at the kills, %d times an image was waiting or being converted", cut)
	if cut == 0 {
		t.Error("the replicas were killed when there was nothing to do")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	for len(images) > 0 {
		images = slices.DeleteFunc(images, func(i oci.Digest) bool {
			switch status := r[0].manage(t, http.MethodGet, "/"+i.String(), "", http.StatusOK); status {
			case "NotStarted", "Running":
				return false
			case "Succeeded":
				if r[1].artifacts(t, i, map[oci.Digest]bool{}) != 1 {
					t.Errorf("%s has been converted, and has no artifact", i)
				}
			default:
				t.Errorf("the conversion of %s is %s", i, status)
			}
			return true
		})
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("%d images aren't converted yet", len(images))
		}
	}
}
