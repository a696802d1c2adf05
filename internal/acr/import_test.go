package acr_test

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/acr"
	"sluice/internal/registry"
	"sluice/internal/stored"
	"sluice/oci"
	"sluice/oci/ocimem"
)

// source is a registry to import from, which wants a password.
type source struct {
	reg      *ocimem.Registry
	host     string
	gate     atomic.Pointer[chan struct{}] // blobs wait until it is closed; nil: none
	attempts atomic.Int64
}

const sourcePassword = "of the source, and secret"

func newSource(t *testing.T) *source {
	t.Helper()
	s := &source{reg: ocimem.New()}
	next := registry.NewHandler(s.reg, registry.Options{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.attempts.Add(1)
		if user, password, _ := r.BasicAuth(); user != "reader" || password != sourcePassword {
			w.Header().Set("WWW-Authenticate", `Basic realm="source"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if gate := s.gate.Load(); gate != nil && strings.Contains(r.URL.Path, "/blobs/") && r.Method == http.MethodGet {
			select {
			case <-*gate:
			case <-r.Context().Done():
				return
			}
		}
		next.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	s.host = strings.TrimPrefix(server.URL, "http://")
	return s
}

// request is one that succeeds.
func (s *source) request(from, to string) acr.ImportRequest {
	return acr.ImportRequest{Source: s.host + "/" + from, Target: to, Username: "reader", Password: sourcePassword}
}

// end waits for an operation's end.
func (b *bench) end(op acr.Operation) acr.Operation {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 2*time.Minute)
	defer cancel()
	op, err := b.admin().Wait(ctx, op.ID, 10*time.Millisecond, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	return op
}

func TestImport(t *testing.T) {
	b, src := newBench(t, stored.Options{}), newSource(t)
	ctx, admin := t.Context(), b.admin()
	digest := push(t, src.reg, "library/app", "layer", "v1")
	op, err := admin.Import(ctx, src.request("library/app:v1", "mirror/app:stable"))
	if err != nil || op.ID == "" || op.Resource != "mirror/app:stable" || op.Status != acr.StatusNotStarted {
		t.Fatalf("%+v, %v", op, err)
	}
	runImports(t, b.handler)
	if op = b.end(op); op.Status != acr.StatusSucceeded || op.Digest != digest || op.Progress != "100%" {
		t.Errorf("it ended as %+v", op)
	}
	tag, err := admin.Tag(ctx, "mirror/app", "stable")
	if err != nil || tag.Digest != digest {
		t.Errorf("the tag is %+v, %v", tag, err)
	}
	if m, err := admin.Manifest(ctx, "mirror/app", digest); err != nil || m.CreatedBy != "admin" {
		t.Errorf("the manifest is %+v, %v", m, err)
	}

	// The tag is there now.
	if _, err := admin.Import(ctx, src.request("library/app:v1", "mirror/app:stable")); !errors.Is(err, acr.ErrConflict) {
		t.Errorf("over a tag that exists: %v", err)
	}
	newer := push(t, src.reg, "library/app", "newer", "v1")
	forced := src.request("library/app:v1", "mirror/app:stable")
	forced.Force = true
	if op, err = admin.Import(ctx, forced); err != nil {
		t.Fatal(err)
	}
	if op = b.end(op); op.Digest != newer {
		t.Errorf("forced, it ended as %+v", op)
	}
	// Target and tag of the source; a digest gets no tag.
	for target, from := range map[string]string{"library/app:v1": "library/app:v1", "by-digest": "library/app@" + digest.String()} {
		r := src.request(from, strings.TrimSuffix(target, ":v1"))
		if op, err = admin.Import(ctx, r); err != nil || op.Resource != target {
			t.Fatalf("%+v, %v", op, err)
		}
		if op = b.end(op); op.Status != acr.StatusSucceeded {
			t.Errorf("%s: %+v", target, op)
		}
	}
	if _, err := admin.Manifest(ctx, "by-digest", digest); err != nil {
		t.Error(err)
	}

	for name, r := range map[string]acr.ImportRequest{
		"no such tag":  src.request("library/app:none", "x"),
		"no password":  {Source: src.host + "/library/app:v1", Target: "x"},
		"wrong":        {Source: src.host + "/library/app:v1", Target: "x", Username: "reader", Password: "wrong"},
		"other system": {Source: src.host + "/library/app:v1", Target: "x", Username: "reader", Password: sourcePassword, Platform: "windows/amd64"},
	} {
		op, err := admin.Import(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		if op = b.end(op); op.Status != acr.StatusFailed || op.Details == "" || strings.Contains(op.Details, sourcePassword) {
			t.Errorf("%s: %+v", name, op)
		}
	}
}

// Of credentials nothing readable is in the database, nor in answers.
func TestImportKeepsSecrets(t *testing.T) {
	b, src := newBench(t, stored.Options{}), newSource(t)
	push(t, src.reg, "app", "layer", "v1")
	op, err := b.admin().Import(t.Context(), src.request("app:v1", "app:v1"))
	if err != nil {
		t.Fatal(err)
	}
	job, err := b.db.Job(t.Context(), op.ID)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(job.Payload, []byte(sourcePassword)) || bytes.Contains(job.Payload, []byte(`"password"`)) || !bytes.Contains(job.Payload, []byte(`"credential"`)) {
		t.Errorf("the database has %s", job.Payload)
	}
	// Another replica, which was never told, opens them.
	replica := acr.New(b.reg, b.db, b.store, acr.Options{})
	runImports(t, replica)
	if op = b.end(op); op.Status != acr.StatusSucceeded {
		t.Errorf("it ended as %+v", op)
	}
	if _, body := b.send("admin", adminPassword, "GET", "/acr/v1/_operations/"+op.ID, ""); strings.Contains(body, "reader") || strings.Contains(body, "credential") {
		t.Errorf("the answer has %s", body)
	}
}

func TestImportIsCanceledAndContinued(t *testing.T) {
	b, src := newBench(t, stored.Options{}), newSource(t)
	ctx, admin := t.Context(), b.admin()
	push(t, src.reg, "app", strings.Repeat("layer", 1000), "v1")
	gate := make(chan struct{})
	src.gate.Store(&gate)

	// While nobody runs it.
	op, err := admin.Import(ctx, src.request("app:v1", "queued:v1"))
	if err != nil || op.Status != acr.StatusNotStarted {
		t.Fatalf("%+v, %v", op, err)
	}
	if op, err = admin.CancelOperation(ctx, op.ID); err != nil || op.Status != acr.StatusCanceled || !strings.HasPrefix(op.Name, "Cancel: ") {
		t.Errorf("%+v, %v", op, err)
	}
	resp, _ := b.send("admin", adminPassword, "DELETE", "/acr/v1/_operations/"+op.ID, "")
	if resp.StatusCode != http.StatusOK {
		t.Errorf("canceled again: %s", resp.Status)
	}

	// While it runs: the process stops, and another one goes on.
	stop := runImports(t, b.handler)
	if op, err = admin.Import(ctx, src.request("app:v1", "app:v1")); err != nil {
		t.Fatal(err)
	}
	for op.Status != acr.StatusRunning {
		time.Sleep(5 * time.Millisecond)
		if op, err = admin.Operation(ctx, op.ID); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	if op, err = admin.Operation(ctx, op.ID); err != nil || op.Status != acr.StatusNotStarted {
		t.Fatalf("when the process has stopped, it is %+v, %v", op, err)
	}
	close(gate)
	runImports(t, acr.New(b.reg, b.db, b.store, acr.Options{}))
	if op = b.end(op); op.Status != acr.StatusSucceeded {
		t.Errorf("it ended as %+v", op)
	}
	if _, err := b.reg.GetManifest(oci.WithActor(ctx, oci.Actor{}), "app", "v1"); err != nil {
		t.Error(err)
	}
}
