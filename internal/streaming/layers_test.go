package streaming

import (
	"compress/gzip"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"sluice/internal/convert"
	"sluice/internal/operation"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

// counted converts an image and tells how many layers were converted for it, and
// how many were known.
func counted(t *testing.T, s *Service, repo, reference string, converted, reused int64) {
	t.Helper()
	c, r := s.converted.Load(), s.reused.Load()
	succeed(t, s, repo, reference)
	if c, r = s.converted.Load()-c, s.reused.Load()-r; c != converted || r != reused {
		t.Errorf("%s of %s: %d layers were converted and %d known, want %d and %d", reference, repo, c, r, converted, reused)
	}
}

func TestLayersAreConvertedOnce(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	start(t, s)
	base, top := files("base", noise(1, 1<<20)), files("top")
	first := b.push("v1", image{tars: [][]byte{base, top}})
	counted(t, s, repo, "v1", 2, 0)

	// Same layers in another repository, and with something on top.
	desc := b.push("v1", image{repo: "other", tars: [][]byte{base, top}})
	counted(t, s, "other", "v1", 0, 2)
	if one, two := b.artifacts(repo, first.Digest), b.artifacts("other", desc.Digest); len(one) != 1 || len(two) != 1 || one[0] != two[0] {
		t.Errorf("artifacts of one image: %s and %s", one, two)
	}
	b.push("v2", image{repo: "third", tars: [][]byte{base, top, files("more")}})
	counted(t, s, "third", "v2", 1, 2)

	// Compressed in another way: what it is is read, once.
	other := image{repo: "fourth", tars: [][]byte{base}, level: gzip.BestCompression}
	b.push("v1", other)
	counted(t, s, "fourth", "v1", 0, 1)
	record, err := s.record(t.Context(), oci.DigestOf(base))
	if err != nil || len(record.Sources) != 2 {
		t.Errorf("%+v, %v", record, err)
	}

	// Another process knows it too.
	again := b.service(Options{})
	b.push("v1", image{repo: "fifth", tars: [][]byte{base, top}})
	op := must(t, again, "fifth", "v1")
	start(t, again)
	if op = end(t, again, op); op.Status != operation.StatusSucceeded || again.converted.Load()+s.converted.Load() != 3 {
		t.Errorf("%+v: %d layers were converted", op, again.converted.Load()+s.converted.Load())
	}
}

// Whoever knows the diff ID of somebody's layer doesn't get its content.
func TestDiffIDsAreNotBelieved(t *testing.T) {
	b := newBench(t, stored.Options{AllowSparse: true})
	s := b.service(Options{})
	start(t, s)
	secret := files("secret")
	b.push("v1", image{repo: "victim", tars: [][]byte{secret}})
	counted(t, s, "victim", "v1", 1, 0)

	desc := b.push("claim", image{repo: "thief", tars: [][]byte{files("else")}, diffIDs: []oci.Digest{oci.DigestOf(secret)}})
	op := end(t, s, must(t, s, "thief", "claim"))
	if op.Status != operation.StatusFailed || op.ErrorCode != convert.ErrImageNotRunnable.Code || len(b.artifacts("thief", desc.Digest)) != 0 {
		t.Errorf("%+v", op)
	}
	// Nor does whoever knows the digest of the blob itself, where manifests may
	// name what isn't there.
	content := gzipped(secret, gzip.BestSpeed)
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest,
		Config: b.blob("thief", oci.MediaTypeImageConfig, []byte(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["`+oci.DigestOf(secret).String()+`"]}}`)),
		Layers: []oci.Descriptor{{MediaType: oci.MediaTypeLayerGzip, Digest: oci.DigestOf(content), Size: int64(len(content))}},
	}
	desc = b.manifest("thief", "sparse", m.MediaType, m)
	op = end(t, s, must(t, s, "thief", "sparse"))
	if op.Status != operation.StatusFailed || op.ErrorCode != convert.ErrResourceNotFound.Code || len(b.artifacts("thief", desc.Digest)) != 0 {
		t.Errorf("%+v", op)
	}
}

func TestLayersThatAreGoneAreConvertedAgain(t *testing.T) {
	ctx := t.Context()
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	start(t, s)
	layer := [][]byte{files("one", noise(1, 100_000))}
	desc := b.push("v1", image{tars: layer})
	counted(t, s, repo, "v1", 1, 0)
	if n, err := s.Tidy(ctx); n != 0 || err != nil {
		t.Errorf("forgot %d that are there, %v", n, err)
	}
	if err := b.reg.DeleteManifest(ctx, repo, desc.Digest); err != nil {
		t.Fatal(err)
	}
	if _, err := b.reg.Collect(ctx, -time.Hour); err != nil {
		t.Fatal(err)
	}
	desc = b.push("v2", image{tars: layer})
	counted(t, s, repo, "v2", 1, 0)
	b.artifacts(repo, desc.Digest)

	// Damage is found.
	diffID := oci.DigestOf(layer[0])
	for _, key := range []string{recordKey(diffID), contentKey(diffID)} {
		if err := b.store.Put(ctx, key, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		other := b.push("v3", image{repo: "damaged", tars: layer})
		counted(t, s, "damaged", "v3", 1, 0)
		if len(b.artifacts("damaged", other.Digest)) != 1 {
			t.Error("no artifact")
		}
		if err := b.reg.DeleteManifest(ctx, "damaged", b.artifacts("damaged", other.Digest)[0]); err != nil {
			t.Fatal(err)
		}
		counted(t, s, "damaged", "v3", 0, 1)
		if err := b.reg.DeleteManifest(ctx, "damaged", other.Digest); err != nil {
			t.Fatal(err)
		}
	}

	// What no repository has any more is forgotten, and what a crash left.
	for _, r := range []string{repo, "damaged"} {
		if err := b.reg.DeleteRepository(ctx, r); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.reg.Collect(ctx, -time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := b.store.Put(ctx, contentKey(oci.DigestOf(nil)), []byte("half")); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Tidy(ctx); n != 2 || err != nil {
		t.Errorf("forgot %d, %v", n, err)
	}
	for dir, err := range b.store.List(ctx, layersPrefix, "") {
		t.Errorf("%s is left, %v", dir, err)
	}
}

// A store that takes no records fails no conversion.
func TestLayersThatCanNotBeWrittenDown(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	s.opts.Store = noUploads{b.store}
	start(t, s)
	desc := b.push("v1", image{tars: [][]byte{files("one")}})
	counted(t, s, repo, "v1", 1, 0)
	if len(b.artifacts(repo, desc.Digest)) != 1 {
		t.Error("no artifact")
	}
}

type noUploads struct{ storage.Store }

func (s noUploads) Put(ctx context.Context, key string, data []byte) error {
	if strings.HasPrefix(key, layersPrefix) {
		return errors.New("the store is full")
	}
	return s.Store.Put(ctx, key, data)
}
