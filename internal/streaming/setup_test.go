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
	"sync"
	"testing"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/internal/index"
	"sluice/internal/operation"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

const repo = "team/app"

// bench is a registry.
type bench struct {
	t     testing.TB
	store storage.Store
	db    *index.DB
	reg   *stored.Registry
}

func newBench(t testing.TB, opts stored.Options) *bench {
	t.Helper()
	db, err := index.Open(t.Context(), index.Options{URL: "sqlite::memory:"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	b := &bench{t: t, store: new(storage.Memory), db: db}
	b.reg = stored.New(b.store, db, opts)
	return b
}

// service returns a replica's service, which is in a hurry.
func (b *bench) service(opts Options) *Service {
	opts.Store = b.store
	return newService(b.reg, b.db, opts, hurry())
}

// hurry is timing for tests: a worker of theirs never stands still for as long as its
// lease, but everything else happens soon.
func hurry() operation.Timing {
	return operation.Timing{Lease: time.Minute, Beat: 50 * time.Millisecond, Poll: 10 * time.Millisecond, Pause: 10 * time.Millisecond}
}

// start runs a service until the test ends or stop is called, which waits.
func start(t testing.TB, s *Service) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { s.Run(ctx) })
	stop = func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return stop
}

// end waits for an operation's end.
func end(t testing.TB, s *Service, op Operation) Operation {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		now, err := s.Operation(t.Context(), op.Repo, op.ID)
		if err != nil {
			t.Fatal(err)
		}
		if now.Status != operation.StatusNotStarted && now.Status != operation.StatusRunning {
			return now
		}
	}
	t.Fatalf("%+v doesn't end", op)
	return op
}

// must starts a conversion.
func must(t testing.TB, s *Service, repo, reference string) Operation {
	t.Helper()
	op, err := s.Start(t.Context(), repo, reference)
	if err != nil {
		t.Fatal(err)
	}
	return op
}

// succeed converts an image.
func succeed(t testing.TB, s *Service, repo, reference string) Operation {
	t.Helper()
	op := end(t, s, must(t, s, repo, reference))
	if op.Status != operation.StatusSucceeded || op.Progress != 100 {
		t.Fatalf("it ended as %+v", op)
	}
	return op
}

// files makes a layer's tar with one file of each content.
func files(contents ...string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i, content := range contents {
		h := &tar.Header{Name: fmt.Sprintf("dir/file-%d", i), Size: int64(len(content)), Mode: 0o755, ModTime: time.Unix(1e9, 0)}
		if err := w.WriteHeader(h); err != nil {
			panic(err)
		}
		_, _ = io.WriteString(w, content)
	}
	_ = w.Close()
	return b.Bytes()
}

// noise is content that doesn't compress.
func noise(seed uint64, n int) string {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = r.Read(b)
	return string(b)
}

func gzipped(content []byte, level int) []byte {
	var b bytes.Buffer
	w, _ := gzip.NewWriterLevel(&b, level)
	_, _ = w.Write(content)
	_ = w.Close()
	return b.Bytes()
}

// image says what to push. Zero values are those of an ordinary image.
type image struct {
	repo, os, arch string
	tars           [][]byte
	level          int // of gzip
	diffIDs        []oci.Digest
	configType     string
	artifactType   string
	subject        *oci.Descriptor
}

func (b *bench) blob(repo, mediaType string, content []byte) oci.Descriptor {
	b.t.Helper()
	desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
	if _, err := b.reg.PushBlob(b.t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
		b.t.Fatal(err)
	}
	return desc
}

func (b *bench) manifest(repo, tag, mediaType string, doc any) oci.Descriptor {
	b.t.Helper()
	content, err := json.Marshal(doc)
	if err != nil {
		b.t.Fatal(err)
	}
	if tag == "" {
		tag = oci.DigestOf(content).String()
	}
	desc, err := b.reg.PushManifest(b.t.Context(), repo, tag, mediaType, content)
	if err != nil {
		b.t.Fatal(err)
	}
	return desc
}

// push pushes an image.
func (b *bench) push(tag string, i image) oci.Descriptor {
	b.t.Helper()
	orElse := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	orElse(&i.repo, repo)
	orElse(&i.os, "linux")
	orElse(&i.arch, "amd64")
	orElse(&i.configType, oci.MediaTypeImageConfig)
	if i.level == 0 {
		i.level = gzip.BestSpeed
	}
	var config oci.ImageConfig
	config.OS, config.Architecture = i.os, i.arch
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest, ArtifactType: i.artifactType, Subject: i.subject}
	for _, content := range i.tars {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, oci.DigestOf(content))
		m.Layers = append(m.Layers, b.blob(i.repo, oci.MediaTypeLayerGzip, gzipped(content, i.level)))
	}
	if i.diffIDs != nil {
		config.RootFS.DiffIDs = i.diffIDs
	}
	content, err := json.Marshal(config)
	if err != nil {
		b.t.Fatal(err)
	}
	m.Config = b.blob(i.repo, i.configType, content)
	return b.manifest(i.repo, tag, m.MediaType, m)
}

// index pushes an index of images.
func (b *bench) index(tag string, images ...oci.Descriptor) oci.Descriptor {
	b.t.Helper()
	return b.manifest(repo, tag, oci.MediaTypeIndex, oci.Index{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex, Manifests: images})
}

// artifacts returns the streaming artifacts of a subject. Each must be complete:
// it is decoded as a whole.
func (b *bench) artifacts(repo string, subject oci.Digest) []oci.Digest {
	b.t.Helper()
	ctx := context.WithoutCancel(b.t.Context())
	var all []oci.Digest
	for desc, err := range b.reg.Referrers(ctx, repo, subject, oci.ArtifactTypeStreaming) {
		if err != nil {
			b.t.Fatal(err)
		}
		all = append(all, desc.Digest)
		m, err := b.reg.GetManifest(ctx, repo, desc.Digest.String())
		if err != nil {
			b.t.Fatal(err)
		}
		parsed, err := artifact.ParseManifest(m.Content)
		if err != nil {
			b.t.Fatal(err)
		}
		r, err := b.reg.GetBlob(ctx, repo, parsed.Config.Digest)
		if err != nil {
			b.t.Fatal(err)
		}
		config, err := io.ReadAll(r)
		r.Close()
		if err != nil {
			b.t.Fatal(err)
		}
		if _, err := artifact.Verify(ctx, parsed, config, func(d oci.Descriptor) blob.Source { return blob.FromRegistry(b.reg, repo, d) }); err != nil {
			b.t.Errorf("artifact %s can be seen, but isn't complete: %v", desc.Digest, err)
		}
	}
	return all
}
