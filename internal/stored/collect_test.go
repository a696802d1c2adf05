package stored_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

const grace = 10 * time.Minute

// careful is a client that asks for each blob, pushes those that aren't there,
// does something else for less than the grace, and pushes the manifest.
type careful struct {
	t    *testing.T
	reg  oci.Registry
	rng  *rand.Rand
	repo string

	skipped int // blobs that were there already
}

func (c *careful) push(ctx context.Context, n int) oci.Digest {
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest, Annotations: map[string]string{"n": fmt.Sprint(n)}}
	layers := c.rng.Perm(20)[:1+c.rng.IntN(3)]
	for tries := c.rng.IntN(3); tries >= 0; tries-- { // some begin again
		m.Layers = nil
		for _, layer := range layers {
			m.Layers = append(m.Layers, c.blob(ctx, fmt.Sprint("layer", layer)))
		}
		m.Config = c.blob(ctx, "{}")
		if tries > 0 {
			time.Sleep(time.Duration(c.rng.Int64N(int64(time.Minute))))
		}
	}
	gap := time.Duration(c.rng.Int64N(int64(grace)))
	if c.rng.IntN(2) == 0 {
		gap = grace - gap/60 // nearly too long
	}
	time.Sleep(gap)
	content, err := json.Marshal(m)
	if err != nil {
		c.t.Fatal(err)
	}
	desc, err := c.reg.PushManifest(ctx, c.repo, oci.DigestOf(content).String(), m.MediaType, content)
	if err != nil {
		c.t.Errorf("push of a manifest whose blobs were there: %v", err)
	}
	return desc.Digest
}

func (c *careful) blob(ctx context.Context, content string) oci.Descriptor {
	desc := oci.Descriptor{MediaType: oci.MediaTypeLayer, Digest: oci.DigestOf([]byte(content)), Size: int64(len(content))}
	_, err := c.reg.ResolveBlob(ctx, c.repo, desc.Digest)
	switch {
	case err == nil:
		c.skipped++
	case !errors.Is(err, oci.ErrBlobUnknown) && !errors.Is(err, oci.ErrNameUnknown):
		c.t.Error(err)
	case c.rng.IntN(3) == 0: // of another repository
		_, err = c.reg.MountBlob(ctx, "source", c.repo, desc.Digest)
		if !errors.Is(err, oci.ErrBlobUnknown) && !errors.Is(err, oci.ErrNameUnknown) {
			break
		}
		fallthrough
	default:
		_, err = c.reg.PushBlob(ctx, c.repo, desc, bytes.NewReader([]byte(content)))
	}
	if err != nil && !errors.Is(err, oci.ErrBlobUnknown) && !errors.Is(err, oci.ErrNameUnknown) {
		c.t.Error(err)
	}
	return desc
}

// Clients push and delete images while garbage is collected all the time, in a
// time of their own in which hours pass at once. No push fails for a blob that
// was said to be there, no image lacks one, and garbage does go.
func TestCollectDuringPushes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db, err := index.Open(t.Context(), index.Options{URL: "sqlite::memory:"})
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		store := &storage.Memory{}
		// Two, as two replicas.
		regs := []*stored.Registry{stored.New(store, db, stored.Options{}), stored.New(store, db, stored.Options{SoftDelete: time.Hour})}
		ctx, cancel := context.WithCancel(t.Context())
		var collectors, pushers sync.WaitGroup
		var collected atomic.Int64
		for _, reg := range regs {
			collectors.Go(func() {
				for ctx.Err() == nil {
					n, err := reg.Collect(ctx, grace)
					if err != nil && ctx.Err() == nil {
						t.Error(err)
					}
					collected.Add(int64(n.Blobs))
					if _, err := reg.Purge(ctx); err != nil && ctx.Err() == nil {
						t.Error(err)
					}
					time.Sleep(time.Duration(rand.Int64N(int64(30 * time.Second))))
				}
			})
		}
		clients := make([]*careful, 6)
		for i := range clients {
			c := &careful{t: t, reg: regs[i%2], rng: rand.New(rand.NewPCG(1, uint64(i))), repo: fmt.Sprint("r", i%2)}
			clients[i] = c
			pushers.Go(func() {
				var mine []oci.Digest
				for n := range 20 {
					mine = append(mine, c.push(ctx, i*1000+n))
					if len(mine) > c.rng.IntN(4) {
						if err := c.reg.DeleteManifest(ctx, c.repo, mine[0]); err != nil {
							t.Error(err)
						}
						mine = mine[1:]
					}
					time.Sleep(time.Duration(c.rng.Int64N(int64(3 * grace))))
				}
			})
		}
		pushers.Wait()
		cancel()
		collectors.Wait()
		checkImages(t, regs[0])
		skipped := 0
		for _, c := range clients {
			skipped += c.skipped
		}
		if collected.Load() < 20 || skipped < 100 {
			t.Errorf("%d blobs were collected and %d found: too few to prove anything", collected.Load(), skipped)
		}
		// At the end, when nobody needs anything any more.
		for repo, err := range regs[0].Repositories(t.Context(), "") {
			if err != nil {
				t.Fatal(err)
			}
			if err := regs[0].DeleteRepository(t.Context(), repo); err != nil {
				t.Error(err)
			}
		}
		time.Sleep(3 * time.Hour)
		if _, err := regs[1].Purge(t.Context()); err != nil {
			t.Error(err)
		}
		if _, err := regs[1].Collect(t.Context(), grace); err != nil {
			t.Error(err)
		}
		for key, err := range store.List(t.Context(), "repositories/r0/_layers/", "") {
			t.Errorf("%s is left (%v)", key, err)
		}
	})
}

// checkImages checks that every manifest has what it needs.
func checkImages(t *testing.T, reg *stored.Registry) {
	t.Helper()
	n := 0
	for repo, err := range reg.Repositories(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		page, err := reg.ManifestsPage(t.Context(), index.ManifestQuery{Repo: repo, N: 1000})
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range page {
			n++
			for _, b := range m.Blobs {
				if r, err := reg.GetBlob(t.Context(), repo, b.Digest); err != nil {
					t.Errorf("blob of %s in %s: %v", m.Digest, repo, err)
				} else {
					r.Close()
				}
			}
		}
	}
	if n == 0 {
		t.Error("there is no image")
	}
}

// What is garbage, and what isn't.
func TestCollect(t *testing.T) {
	store := &storage.Memory{}
	reg := open(t, store, stored.Options{SoftDelete: time.Hour})
	ctx := t.Context()
	garbage := pushBlob(t, reg, "a", "garbage")
	kept := pushImage(t, reg, "a", "v1", "kept")
	deleted := pushImage(t, reg, "a", "v2", "deleted")
	if err := reg.DeleteManifest(ctx, "a", deleted.Digest); err != nil {
		t.Fatal(err)
	}
	if n, err := reg.Collect(ctx, 0); err != nil || n.Blobs != 0 {
		t.Errorf("collected what was just pushed: %v, %v", n, err)
	}
	n, err := reg.Collect(ctx, -time.Hour)
	if want := (stored.Collected{Blobs: 1, Bytes: 7}); err != nil || n != want {
		t.Errorf("collected %v, %v; want %v", n, err, want)
	}
	if _, err := reg.ResolveBlob(ctx, "a", garbage); !errors.Is(err, oci.ErrBlobUnknown) {
		t.Errorf("garbage: %v", err)
	}
	for _, b := range slices.Concat(kept.Blobs, deleted.Blobs) {
		if _, err := reg.ResolveBlob(ctx, "a", b.Digest); err != nil {
			t.Error(err)
		}
	}
}
