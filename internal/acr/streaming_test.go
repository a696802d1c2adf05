package acr_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/acr"
	"sluice/internal/convert"
	"sluice/internal/stored"
	"sluice/oci"
)

// pushRunnable pushes a linux image.
func pushRunnable(t *testing.T, reg oci.Registry, repo, tag string) oci.Digest {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: tag, Mode: 0o755}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	var config oci.ImageConfig
	config.OS, config.Architecture = "linux", "amd64"
	config.RootFS.DiffIDs = []oci.Digest{oci.DigestOf(layer.Bytes())}
	content, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest}
	for _, b := range []struct {
		mediaType string
		content   []byte
		to        *oci.Descriptor
	}{{oci.MediaTypeImageConfig, content, &m.Config}, {oci.MediaTypeLayer, layer.Bytes(), new(oci.Descriptor)}} {
		*b.to = oci.Descriptor{MediaType: b.mediaType, Digest: oci.DigestOf(b.content), Size: int64(len(b.content))}
		if _, err := reg.PushBlob(t.Context(), repo, *b.to, bytes.NewReader(b.content)); err != nil {
			t.Fatal(err)
		}
		if b.mediaType == oci.MediaTypeLayer {
			m.Layers = append(m.Layers, *b.to)
		}
	}
	return pushDocument(t, reg, repo, m.MediaType, m, tag)
}

// convertImages runs a bench's conversions.
func (b *bench) convertImages() {
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.t.Context()))
	var running sync.WaitGroup
	running.Go(func() { b.streaming.Run(ctx) })
	b.t.Cleanup(func() { cancel(); running.Wait() })
}

// exchange is one of the requests that Azure's command line sends, as its own
// tests have recorded them, and what must be in the answer.
type exchange struct {
	what, method, path, body string
	status                   int
	answer                   string // regular expression of the whole body; ID and DIGEST stand for what they are
	located                  bool   // the headers tell where the operation is
}

// The sequence of azure-cli's tests of artifact streaming: show, update, create
// without waiting, cancel, show of the operation.
func TestStreamingAsAzureCLIDoes(t *testing.T) {
	b := newBench(t, stored.Options{Convert: true})
	digest := pushRunnable(t, b.reg, "microsoft", "azure-cli")
	password := b.token("pusher", "repositories/microsoft/content/read", "repositories/microsoft/content/write", "repositories/microsoft/metadata/read")
	id := ""
	const (
		overlaybd = `"conversionFormat":"overlaybd","conversionVersion":"v1"`
		streams   = "/acr/v1/microsoft/_streaming"
		operation = "/acr/v1/microsoft/_operations/"
		resource  = `"resource":"microsoft@DIGEST"`
		times     = `"startTime":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ","lastUpdateTime":"[^"]*"`
	)
	image := streams + "/" + digest.String()
	run := func(e exchange) {
		t.Helper()
		resp, body := b.send("pusher", password, e.method, strings.ReplaceAll(e.path, "ID", id), e.body)
		pattern := strings.NewReplacer("DIGEST", digest.String(), "ID", "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").Replace(e.answer)
		if resp.StatusCode != e.status || !regexp.MustCompile("^"+pattern+"\n?$").MatchString(body) {
			t.Fatalf("%s: %s %s, want %d %s", e.what, resp.Status, body, e.status, pattern)
		}
		if !e.located {
			return
		}
		var doc struct{ ID string }
		if err := json.Unmarshal([]byte(body), &doc); err != nil {
			t.Fatal(err)
		}
		id = doc.ID
		for name, want := range map[string]string{"Location": operation + id, "Operation-Location": operation + id, "Operation-Id": id} {
			if got := resp.Header.Get(name); got != want {
				t.Errorf("%s: %s is %q, want %q", e.what, name, got, want)
			}
		}
	}
	sequence := func(list ...exchange) {
		t.Helper()
		for _, e := range list {
			run(e)
		}
	}
	sequence(
		exchange{"show", "GET", streams, "", 200, `\{"convertPushedImages":false\}`, false},
		exchange{"update", "POST", streams, `{"convertPushedImages":true,` + overlaybd + `}`, 202,
			`\{"convertPushedImages":true,"conversionFormat":"erofs","conversionVersion":"v1","id":"ID","status":"Succeeded"\}`, true},
		exchange{"its operation", "GET", operation + "ID", "", 200, `\{.*"resource":"microsoft","status":"Succeeded",.*\}`, false},
		exchange{"show", "GET", streams, "", 200, `\{"convertPushedImages":true\}`, false},
		exchange{"digest of the tag", "GET", "/acr/v1/microsoft/_tags/azure-cli", "", 200, `.*"digest":"DIGEST".*`, false},
		exchange{"referrers", "GET", "/v2/microsoft/referrers/" + digest.String() + "?artifactType=application/vnd.azure.artifact.streaming.v1", "", 200, `.*"manifests":\[\].*`, false},
		exchange{"no operation yet", "GET", image, "", 404, `\{"errors":\[\{"code":"OPERATION_UNKNOWN","message":"the specified operation does not exist.*`, false},
		exchange{"create", "POST", image, `{` + overlaybd + `}`, 202, `\{"id":"ID","status":"NotStarted"\}`, true},
		exchange{"create again", "POST", image, `{` + overlaybd + `}`, 202, `\{"id":"ID","status":"NotStarted"\}`, true},
		exchange{"latest", "GET", image, "", 200, `\{"id":"ID","status":"NotStarted"\}`, true},
		exchange{"operation", "GET", operation + "ID", "", 200,
			`\{"id":"ID","name":"ArtifactStreamingConversion",` + resource + `,"status":"NotStarted",` + times + `,"progress":"0%","details":"Conversion started for resource microsoft@DIGEST"\}`, false},
		exchange{"cancel", "POST", operation + "ID:cancel", "", 200,
			`\{"id":"ID","name":"Cancel: ArtifactStreamingConversion",` + resource + `,"status":"Canceled",` + times + `,"progress":"0%","details":".*"\}`, false},
		exchange{"latest", "GET", image, "", 200, `\{"id":"ID","status":"Canceled"\}`, true},
		exchange{"operation", "GET", operation + "ID", "", 200,
			`\{"id":"ID","name":"ArtifactStreamingConversion",` + resource + `,"status":"Canceled",` + times + `,"progress":"0%","details":".*"\}`, false},
	)
	canceled := id
	sequence(exchange{"create", "POST", image, `{` + overlaybd + `}`, 202, `\{"id":"ID","status":"NotStarted"\}`, true})
	if id == canceled {
		t.Error("what was canceled was started again under the same ID")
	}
	b.convertImages()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		_, body := b.send("pusher", password, "GET", operation+id, "")
		if strings.Contains(body, `"Succeeded"`) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(body)
		}
	}
	sequence(
		exchange{"operation", "GET", operation + "ID", "", 200, `\{.*"progress":"100%","details":"Conversion succeeded for resource microsoft@DIGEST"\}`, false},
		exchange{"referrers", "GET", "/v2/microsoft/referrers/" + digest.String() + "?artifactType=application/vnd.azure.artifact.streaming.v1", "", 200, `.*"streaming.platform.arch":"amd64".*`, false},
	)
}

func TestStreamingRefuses(t *testing.T) {
	b := newBench(t, stored.Options{})
	digest := pushRunnable(t, b.reg, "repo", "v1").String()
	notRunnable := pushDocument(t, b.reg, "repo", oci.MediaTypeIndex, oci.Index{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex, Manifests: []oci.Descriptor{}}).String()
	reader, pusher := b.token("reader", "repositories/repo/content/read"), b.token("pusher", "repositories/repo/content/write")
	passwords := map[string]string{"reader": reader, "pusher": pusher, "admin": adminPassword}
	const streams, operations = "/acr/v1/repo/_streaming", "/acr/v1/repo/_operations/"
	for _, c := range []struct {
		user, method, path, body string
		status                   int
		code                     string
	}{
		{"", "GET", streams, "", 401, "UNAUTHORIZED"},
		{"pusher", "GET", streams, "", 403, "DENIED"},
		{"reader", "POST", streams, `{"convertPushedImages":true}`, 403, "DENIED"},
		{"reader", "POST", streams + "/" + digest, `{}`, 403, "DENIED"},
		{"reader", "POST", operations + "x:cancel", "", 403, "DENIED"},
		{"reader", "GET", operations + "x", "", 404, "OPERATION_UNKNOWN"},
		{"admin", "POST", operations + "x:cancel", "", 404, "OPERATION_UNKNOWN"},
		{"admin", "GET", streams + "/" + digest, "", 404, "OPERATION_UNKNOWN"},
		{"admin", "GET", "/acr/v1/none/_streaming", "", 404, "NAME_UNKNOWN"},
		{"admin", "POST", "/acr/v1/none/_streaming", `{"convertPushedImages":true}`, 404, "NAME_UNKNOWN"},
		{"admin", "POST", streams, `{}`, 400, "BAD_REQUEST"},
		{"admin", "POST", streams, `{"convertPushedImages":true,"conversionFormat":"tar"}`, 400, "BAD_REQUEST"},
		{"admin", "POST", streams, `{"convertPushedImages":true,"conversionVersion":"v2"}`, 400, "BAD_REQUEST"},
		{"admin", "POST", streams, `{"convertPushedImages":true,"else":1}`, 400, "BAD_REQUEST"},
		{"admin", "POST", streams + "/sha256:1", `{}`, 400, "DIGEST_INVALID"},
		{"admin", "POST", streams + "/" + oci.DigestOf(nil).String(), `{}`, 404, "RESOURCE_NOT_FOUND"},
		{"admin", "POST", streams + "/" + notRunnable, `{}`, 400, "NO_SUPPORTED_PLATFORM_FOUND"},
		{"admin", "PUT", streams, `{}`, 405, "UNSUPPORTED"},
		{"admin", "GET", operations + "x:cancel", "", 405, "UNSUPPORTED"},
		{"pusher", "GET", "/acr/v1/repo/_operations", "", 403, "DENIED"},
		{"admin", "GET", "/acr/v1/repo/_operations?n=x", "", 400, "PAGINATION_NUMBER_INVALID"},
		{"admin", "GET", "/acr/v1/none/_operations", "", 404, "NAME_UNKNOWN"},
		{"admin", "GET", operations + "x/y", "", 404, "NOT_FOUND"},
		{"admin", "GET", streams + "/" + digest + "/x", "", 404, "NOT_FOUND"},
	} {
		resp, body := b.send(c.user, passwords[c.user], c.method, c.path, c.body)
		if resp.StatusCode != c.status || codeOf(body) != c.code {
			t.Errorf("%s: %s %s %s: %s %s, want %d %s", c.user, c.method, c.path, c.body, resp.Status, body, c.status, c.code)
		}
	}
	b.handler = acr.New(b.reg, b.db, b.store, acr.Options{})
	for _, path := range []string{streams + "/" + digest, operations + "x"} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
		if err != nil {
			t.Fatal(err)
		}
		w := &recorder{header: http.Header{}}
		b.handler.ServeHTTP(w, req)
		if codeOf(w.body.String()) != "UNSUPPORTED" {
			t.Errorf("%s without conversion: %s", path, &w.body)
		}
	}
}

type recorder struct {
	header http.Header
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(int)             {}
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }

func TestClientStreams(t *testing.T) {
	b := newBench(t, stored.Options{Convert: true})
	ctx, admin := t.Context(), b.admin()
	digest := pushRunnable(t, b.reg, "team/app", "v1")
	if s, err := admin.Streaming(ctx, "team/app"); err != nil || s.ConvertPushedImages {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := admin.LatestStreaming(ctx, "team/app", digest); !errors.Is(err, acr.ErrOperationUnknown) {
		t.Errorf("%v", err)
	}
	op, err := admin.StartStreaming(ctx, "team/app", digest)
	if err != nil || op.ID == "" || op.Status != acr.StatusNotStarted {
		t.Fatalf("%+v, %v", op, err)
	}
	if got, err := admin.CancelImageOperation(ctx, "team/app", op.ID); err != nil || got.Status != acr.StatusCanceled || got.ID != op.ID {
		t.Errorf("%+v, %v", got, err)
	}
	b.convertImages()
	if op, err = admin.BackfillStreaming(ctx, "team/app"); err != nil || op.ID == "" {
		t.Fatalf("%+v, %v", op, err)
	}
	for deadline := time.Now().Add(time.Minute); op.Status != acr.StatusSucceeded || op.Resource == "team/app"; time.Sleep(10 * time.Millisecond) {
		if latest, err := admin.LatestStreaming(ctx, "team/app", digest); err == nil {
			op, err = admin.ImageOperation(ctx, "team/app", latest.ID)
			if err != nil {
				t.Fatal(err)
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v", op)
		}
	}
	if op.Progress != "100%" || op.Resource != "team/app@"+digest.String() {
		t.Errorf("%+v", op)
	}
	if s, err := admin.Streaming(ctx, "team/app"); err != nil || !s.ConvertPushedImages {
		t.Errorf("%+v, %v", s, err)
	}
	if op, err = admin.SetStreaming(ctx, "team/app", false); err != nil || op.Status != acr.StatusSucceeded {
		t.Errorf("%+v, %v", op, err)
	}
	if _, err := admin.StartStreaming(ctx, "team/app", oci.DigestOf(nil)); !errors.Is(err, convert.ErrResourceNotFound) {
		t.Errorf("%v", err)
	}
}
