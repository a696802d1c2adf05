package webhook_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/index"
	"sluice/internal/webhook"
	"sluice/oci"
	"sluice/oci/ocimem"
)

// telling is a registry that tells a receiver of each manifest pushed to it, as
// distribution does, and now and then fails.
type telling struct {
	*ocimem.Registry
	t       *testing.T
	tell    func(body string)
	failing atomic.Int64 // how many of the next pushes of manifests fail
	pushes  atomic.Int64
}

func (r *telling) PushManifest(ctx context.Context, repo, reference, mediaType string, content []byte) (oci.Descriptor, error) {
	r.pushes.Add(1)
	if r.failing.Add(-1) >= 0 {
		return oci.Descriptor{}, errors.New("connection reset by peer")
	}
	desc, err := r.Registry.PushManifest(ctx, repo, reference, mediaType, content)
	if err == nil && r.tell != nil {
		r.tell(fmt.Sprintf(`{"events":[{"action":"push","target":{"mediaType":%q,"digest":%q,"repository":%q}}]}`, mediaType, desc.Digest, repo))
	}
	return desc, err
}

// image pushes an image of one layer.
func (r *telling) image(repo, content string) oci.Descriptor {
	r.t.Helper()
	ctx := r.t.Context()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "file", Size: int64(len(content)), Mode: 0o644}),
		func() error { _, err := io.WriteString(w, content); return err }(), w.Close()); err != nil {
		r.t.Fatal(err)
	}
	push := func(mediaType string, content []byte) oci.Descriptor {
		desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
		if _, err := r.PushBlob(ctx, repo, desc, bytes.NewReader(content)); err != nil {
			r.t.Fatal(err)
		}
		return desc
	}
	config := oci.ImageConfig{Platform: oci.Platform{OS: "linux", Architecture: "amd64"}}
	config.RootFS.Type, config.RootFS.DiffIDs = "layers", []oci.Digest{oci.DigestOf(b.Bytes())}
	text, err := json.Marshal(config)
	if err != nil {
		r.t.Fatal(err)
	}
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest,
		Layers: []oci.Descriptor{push(oci.MediaTypeLayer, b.Bytes())}, Config: push(oci.MediaTypeImageConfig, text)}
	if text, err = json.Marshal(m); err != nil {
		r.t.Fatal(err)
	}
	desc, err := r.PushManifest(ctx, repo, oci.DigestOf(text).String(), m.MediaType, text)
	if err != nil {
		r.t.Fatal(err)
	}
	return desc
}

func (r *telling) artifacts(repo string, subject oci.Digest) (n int) {
	r.t.Helper()
	for _, err := range r.Referrers(r.t.Context(), repo, subject, oci.ArtifactTypeStreaming) {
		if err != nil {
			r.t.Fatal(err)
		}
		n++
	}
	return n
}

func openIndex(t *testing.T) *index.DB {
	t.Helper()
	db, err := index.Open(t.Context(), index.Options{URL: "sqlite::memory:"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// run runs a receiver until the test ends.
func run(t *testing.T, r *webhook.Receiver) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { r.Run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
}

func post(t *testing.T, h http.Handler, body string, header ...string) int {
	t.Helper()
	req := httptest.NewRequest(http.MethodPost, "/anything", strings.NewReader(body))
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req)
	return w.Code
}

// idle waits until nothing is queued or running.
func idle(t *testing.T, db *index.DB) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		queued, running, err := db.CountJobs(t.Context(), "webhook:")
		if err != nil {
			t.Fatal(err)
		}
		if queued+running == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d jobs wait and %d run", queued, running)
		}
	}
}

func TestPushedImagesAreConverted(t *testing.T) {
	reg := &telling{Registry: ocimem.New(), t: t}
	db := openIndex(t)
	r := webhook.New(db, webhook.Options{Registry: reg, RetryMin: time.Millisecond, Repositories: []string{"team/*", "one"}})
	run(t, r)
	reg.tell = func(body string) {
		if code := post(t, r, body); code != http.StatusAccepted {
			t.Errorf("answer %d", code)
		}
	}
	wanted := map[string]oci.Digest{"team/app": reg.image("team/app", "a").Digest, "one": reg.image("one", "b").Digest}
	unwanted := reg.image("ones", "c").Digest
	idle(t, db)
	for repo, subject := range wanted {
		if n := reg.artifacts(repo, subject); n != 1 {
			t.Errorf("%s has %d artifacts", repo, n)
		}
	}
	if n := reg.artifacts("ones", unwanted); n != 0 {
		t.Error("an image was converted that nobody asked for")
	}
	// The artifacts' own pushes were told, too, and came to nothing.
	if n := reg.pushes.Load(); n != 5 {
		t.Errorf("%d manifests were pushed: three images and two artifacts are meant", n)
	}

	subject := reg.image("one", "d").Digest
	idle(t, db)
	reg.failing.Store(2)
	if err := reg.DeleteManifest(t.Context(), "one", artifactOf(t, reg, "one", subject)); err != nil {
		t.Fatal(err)
	}
	if code := post(t, r, `{"action":"push","target":{"repository":"one","digest":"`+subject.String()+`"}}`); code != http.StatusAccepted {
		t.Errorf("answer %d", code)
	}
	idle(t, db)
	if reg.artifacts("one", subject) != 1 {
		t.Error("it gave up when the registry failed")
	}
}

func artifactOf(t *testing.T, reg oci.Registry, repo string, subject oci.Digest) oci.Digest {
	t.Helper()
	for desc, err := range reg.Referrers(t.Context(), repo, subject, oci.ArtifactTypeStreaming) {
		if err != nil {
			t.Fatal(err)
		}
		return desc.Digest
	}
	t.Fatal("no artifact")
	return ""
}

func TestWebhooksThatAreRefused(t *testing.T) {
	push := func(tag int) string {
		return fmt.Sprintf(`{"action":"push","target":{"repository":"a","tag":"v%d"}}`, tag)
	}
	r := webhook.New(openIndex(t), webhook.Options{Registry: ocimem.New(), Secret: "s3cret", Queue: 2})
	for i, test := range []struct {
		body string
		auth string
		want int
	}{
		{push(1), "", http.StatusUnauthorized},
		{push(1), "Bearer wrong", http.StatusUnauthorized},
		{push(1), "Bearer s3cret", http.StatusAccepted},
		{`{"type":"DELETE_ARTIFACT"}`, "s3cret", http.StatusAccepted},
		{`{}`, "s3cret", http.StatusBadRequest},
		{strings.Repeat(" ", webhook.MaxBody+1), "s3cret", http.StatusRequestEntityTooLarge},
		{push(2), "Basic eDpzM2NyZXQ=", http.StatusAccepted}, // x:s3cret
		{push(3), "s3cret", http.StatusServiceUnavailable},
	} {
		if got := post(t, r, test.body, "Authorization", test.auth); got != test.want {
			t.Errorf("request %d: %d, want %d", i, got, test.want)
		}
	}
	w := httptest.NewRecorder()
	r.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.Code != http.StatusMethodNotAllowed {
		t.Errorf("GET: %d", w.Code)
	}
}

// What was acknowledged is converted, also by another process.
func TestTheQueueOutlivesTheReceiver(t *testing.T) {
	reg := &telling{Registry: ocimem.New(), t: t}
	subject := reg.image("a", "content").Digest
	file := t.TempDir() + "/index.db"
	open := func() *index.DB {
		db, err := index.Open(t.Context(), index.Options{URL: "sqlite:" + file})
		if err != nil {
			t.Fatal(err)
		}
		return db
	}
	db := open()
	body := `{"action":"push","target":{"repository":"a","digest":"` + subject.String() + `"}}`
	for range 3 {
		if code := post(t, webhook.New(db, webhook.Options{Registry: reg}), body); code != http.StatusAccepted {
			t.Fatal(code)
		}
	}
	if queued, _, err := db.CountJobs(t.Context(), "webhook:"); queued != 1 || err != nil {
		t.Errorf("told three times, %d jobs wait, error %v", queued, err)
	}
	db.Close()
	db = open()
	t.Cleanup(func() { db.Close() })
	run(t, webhook.New(db, webhook.Options{Registry: reg}))
	idle(t, db)
	if reg.artifacts("a", subject) != 1 {
		t.Error("it was forgotten")
	}
}
