package peers

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"sluice/oci"
	"sluice/test/bed"
)

const killRepo = "kills/images"

// image is an image of one layer, as a client knows it that pushed it.
type image struct {
	layer    oci.Descriptor
	end      []byte // of the layer, after the beginning that all share
	manifest []byte
	digest   oci.Digest // of the manifest
	tag      string
	subject  *oci.Descriptor
}

// pusher pushes images one after the other, and remembers what the registry
// acknowledged.
type pusher struct {
	addr   string
	base   []byte
	number int
	rng    *rand.Rand
	conn   *conn

	next   int
	blobs  []image // whose layer was acknowledged
	images []image // acknowledged as a whole
	broken int     // pushes that got no answer
}

// push pushes images until stop is closed, and tells when one was acknowledged. A
// connection that breaks is a kill; any other answer than success is a failure.
func (p *pusher) push(t *testing.T, stop <-chan struct{}, tell func()) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		if p.conn == nil {
			c, err := dial(t.Context(), p.addr)
			if err != nil {
				time.Sleep(time.Millisecond) // it's down
				continue
			}
			p.conn = c
		}
		if err := p.one(); err != nil {
			var refused refusal
			if errors.As(err, &refused) {
				t.Error(err)
				return
			}
			p.broken++
			p.conn.Close()
			p.conn = nil
			continue
		}
		tell()
	}
}

// one pushes an image.
func (p *pusher) one() error {
	p.next++
	i := image{end: fmt.Appendf(nil, "pusher %d, image %d", p.number, p.next), tag: fmt.Sprintf("p%d-%d", p.number, p.next)}
	size := p.rng.IntN(len(p.base))
	h := sha256.New()
	h.Write(p.base[:size])
	h.Write(i.end)
	i.layer = oci.Descriptor{
		MediaType: oci.MediaTypeLayer, Size: int64(size + len(i.end)), Digest: oci.Digest(fmt.Sprintf("sha256:%x", h.Sum(nil))),
	}
	if n := len(p.images); n > 0 && p.next%3 == 0 {
		s := p.images[n-1]
		i.subject = &oci.Descriptor{MediaType: oci.MediaTypeImageManifest, Digest: s.digest, Size: int64(len(s.manifest))}
	}
	if err := p.conn.pushBlob(killRepo, i.layer.Digest.String(), p.base[:size], i.end); err != nil {
		return err
	}
	p.blobs = append(p.blobs, i)
	var err error
	if i.manifest, err = manifest(i.layer, i.subject); err != nil {
		return err
	}
	i.digest = oci.Digest(fmt.Sprintf("sha256:%x", sha256.Sum256(i.manifest)))
	if err := p.conn.pushManifest(killRepo, i.tag, oci.MediaTypeImageManifest, i.manifest); err != nil {
		return err
	}
	p.images = append(p.images, i)
	return nil
}

// TestKills kills the registry again and again while images are pushed, and
// looks for everything that it acknowledged: after each kill for what came
// since the one before, at the end for everything. SLUICE_PUSH_KILLS says how
// often (default 30).
func TestKills(t *testing.T) {
	kills := 30
	if v := os.Getenv("SLUICE_PUSH_KILLS"); v != "" {
		var err error
		if kills, err = strconv.Atoi(v); err != nil {
			t.Fatalf("SLUICE_PUSH_KILLS: %v", err)
		}
	}
	r := start(t, t.TempDir())
	c, err := dial(t.Context(), r.Addr)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.pushBlob(killRepo, emptyConfig.Digest.String(), []byte("{}")); err != nil {
		t.Fatal(err)
	}
	c.Close()
	pushers := make([]*pusher, 6)
	base := random(6, 256<<10)
	for i := range pushers {
		pushers[i] = &pusher{addr: r.Addr, base: base, number: i, rng: rand.New(rand.NewPCG(7, uint64(i)))}
	}
	rng := rand.New(rand.NewPCG(8, 8))
	var slowest time.Duration
	checkedBlobs, checkedImages := make([]int, len(pushers)), make([]int, len(pushers))
	for kill := range kills {
		stop, acknowledged := make(chan struct{}), make(chan struct{})
		tell := sync.OnceFunc(func() { close(acknowledged) })
		var wg sync.WaitGroup
		for _, p := range pushers {
			wg.Go(func() { p.push(t, stop, tell) })
		}
		select {
		case <-acknowledged: // or it might die before anything was pushed
		case <-time.After(patience):
			t.Error("no image was acknowledged")
		}
		time.Sleep(time.Duration(rng.IntN(120)) * time.Millisecond)
		r.Kill()
		close(stop)
		wg.Wait()
		begin := time.Now()
		if err := r.Restart(t.Context()); err != nil {
			t.Fatalf("after kill %d: %v", kill+1, err)
		}
		slowest = max(slowest, time.Since(begin))
		for i, p := range pushers {
			intact(t, r, base, p.blobs[checkedBlobs[i]:], p.images[checkedImages[i]:])
			checkedBlobs[i], checkedImages[i] = len(p.blobs), len(p.images)
		}
		if t.Failed() {
			t.Fatalf("that was after kill %d", kill+1)
		}
	}
	var blobs, images []image
	broken := 0
	for _, p := range pushers {
		blobs, images, broken = append(blobs, p.blobs...), append(images, p.images...), broken+p.broken
	}
	intact(t, r, base, blobs, images)
	whatIsThereIsWhole(t, r, images)
	t.Logf("FIGURE %d kills of the registry, which broke %d pushes off: %d acknowledged blobs and %d images are there and whole; it was up again after %.0f ms at most",
		kills, broken, len(blobs), len(images), slowest.Seconds()*1e3)
	if len(images) < kills || broken < kills {
		t.Error("that is too little to mean something")
	}
}

// intact fails the test for everything acknowledged that is lost or damaged.
func intact(t *testing.T, r *bed.Registry, base []byte, blobs, images []image) {
	t.Helper()
	for _, b := range blobs {
		want := slices.Concat(base[:int(b.layer.Size)-len(b.end)], b.end)
		if got := fetch(t, r, "/blobs/"+b.layer.Digest.String()); string(got) != string(want) {
			t.Errorf("blob %s, acknowledged: %d bytes that are not its %d", b.layer.Digest, len(got), len(want))
		}
	}
	for _, i := range images {
		for _, reference := range []string{i.tag, i.digest.String()} {
			if got := fetch(t, r, "/manifests/"+reference); string(got) != string(i.manifest) {
				t.Errorf("manifest %s, acknowledged: %q", reference, got)
			}
		}
		if i.subject == nil {
			continue
		}
		var referrers oci.Index
		if err := json.Unmarshal(fetch(t, r, "/referrers/"+i.subject.Digest.String()), &referrers); err != nil {
			t.Error(err)
		}
		if !slices.ContainsFunc(referrers.Manifests, func(d oci.Descriptor) bool { return d.Digest == i.digest }) {
			t.Errorf("%s, acknowledged, is not among the referrers of its subject", i.digest)
		}
	}
}

// whatIsThereIsWhole fails the test unless every tag can be pulled, and all
// that was acknowledged is listed.
func whatIsThereIsWhole(t *testing.T, r *bed.Registry, images []image) {
	t.Helper()
	var list struct{ Tags []string }
	last := ""
	listed := map[string]bool{}
	for {
		if err := json.Unmarshal(fetch(t, r, "/tags/list?n=1000&last="+last), &list); err != nil {
			t.Fatal(err)
		}
		if len(list.Tags) == 0 {
			break
		}
		last = list.Tags[len(list.Tags)-1]
		for _, tag := range list.Tags {
			listed[tag] = true
			var m oci.ImageManifest
			if err := json.Unmarshal(fetch(t, r, "/manifests/"+tag), &m); err != nil || len(m.Layers) != 1 {
				t.Errorf("tag %s: %v", tag, err)
				continue
			}
			if got := fmt.Sprintf("sha256:%x", sha256.Sum256(fetch(t, r, "/blobs/"+m.Layers[0].Digest.String()))); got != m.Layers[0].Digest.String() {
				t.Errorf("tag %s: the layer's content is %s", tag, got)
			}
		}
	}
	for _, i := range images {
		if !listed[i.tag] {
			t.Errorf("tag %s, acknowledged, isn't listed", i.tag)
		}
	}
}

// fetch returns what is at a path of the repository, nothing if it isn't there.
func fetch(t *testing.T, r *bed.Registry, path string) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+r.Addr+"/v2/"+killRepo+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", oci.MediaTypeImageManifest)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		t.Errorf("GET %s: %s", path, resp.Status)
	}
	return b
}
