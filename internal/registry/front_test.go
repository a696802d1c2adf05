package registry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"sluice/internal/registry"
	"sluice/oci"
	"sluice/oci/ocimem"
)

// logBuffer collects a log of JSON lines.
type logBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Buffer.Write(p)
}

// requests returns the lines of the access log.
func (l *logBuffer) requests(t *testing.T) []map[string]any {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []map[string]any
	for line := range bytes.Lines(l.Bytes()) {
		var m map[string]any
		if err := json.Unmarshal(line, &m); err != nil {
			t.Fatal(err)
		}
		if m["msg"] == "request" {
			all = append(all, m)
		}
	}
	return all
}

func newLog() (*slog.Logger, *logBuffer) {
	b := &logBuffer{}
	return slog.New(slog.NewJSONHandler(b, nil)), b
}

func pushed(t *testing.T, reg oci.Registry, repo string, content []byte) oci.Digest {
	t.Helper()
	desc := oci.Descriptor{Digest: oci.DigestOf(content), Size: int64(len(content))}
	if _, err := reg.PushBlob(t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	return desc.Digest
}

// get sends a request and returns the answer and its body.
func get(t *testing.T, client *http.Client, method, url string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Errorf("%s %s: %v", method, url, err)
	}
	return resp, string(body)
}

func TestRequestIDs(t *testing.T) {
	const traced = "4bf92f3577b34da6a3ce929d0e0e4736"
	log, lines := newLog()
	server := serveFront(t, ocimem.New(), registry.Options{}, registry.FrontOptions{Log: log})
	seen := map[string]bool{}
	for _, c := range []struct{ name, value, want string }{
		{"X-Request-Id", "abc-1.2_3", "abc-1.2_3"},
		{"X-Request-Id", "a b", ""},
		{"X-Request-Id", `"},{`, ""},
		{"X-Request-Id", strings.Repeat("x", 129), ""},
		{"Traceparent", "00-" + traced + "-00f067aa0ba902b7-01", traced},
		{"Traceparent", "00-" + strings.Repeat("0", 32) + "-00f067aa0ba902b7-01", ""},
		{"X-Nothing", "x", ""},
		{"X-Nothing", "x", ""},
	} {
		resp, _ := get(t, server.Client(), "GET", server.URL+"/v2/", c.name, c.value)
		id := resp.Header.Get("X-Request-Id")
		if other := resp.Header.Get("X-Ms-Correlation-Request-Id"); other != id {
			t.Errorf("%s: %q: the answer's IDs are %q and %q", c.name, c.value, id, other)
		}
		if c.want != "" && id != c.want || c.want == "" && (len(id) != 32 || strings.Trim(id, "0123456789abcdef") != "") || seen[id] {
			t.Errorf("%s: %q: the ID is %q, want %q or a new one", c.name, c.value, id, c.want)
		}
		seen[id] = true
		all := lines.requests(t)
		if last := all[len(all)-1]; last["id"] != id || (last["trace"] == traced) != (c.want == traced) {
			t.Errorf("%s: %q: the log's line is %v", c.name, c.value, last)
		}
	}
}

// recorder keeps the actor of the last call.
type recorder struct {
	oci.Registry
	actor oci.Actor
}

func (r *recorder) ResolveBlob(ctx context.Context, repo string, digest oci.Digest) (oci.Descriptor, error) {
	r.actor = oci.ActorOf(ctx)
	return r.Registry.ResolveBlob(ctx, repo, digest)
}

func TestActor(t *testing.T) {
	reg := &recorder{Registry: ocimem.New()}
	digest := pushed(t, reg, "a", []byte("x"))
	server := serveFront(t, reg, registry.Options{}, registry.FrontOptions{})
	get(t, server.Client(), "HEAD", server.URL+"/v2/a/blobs/"+digest.String(), "User-Agent", "test/1", "X-Request-Id", "id-1")
	if a := reg.actor; a.Agent != "test/1" || a.RequestID != "id-1" || !strings.HasPrefix(a.Remote, "127.0.0.1:") || a.Name != "" {
		t.Errorf("the registry was told of %+v", a)
	}
}

func TestAccessLog(t *testing.T) {
	log, lines := newLog()
	reg := ocimem.New()
	digest := pushed(t, reg, "team/a", []byte(content))
	server := serveFront(t, reg, registry.Options{}, registry.FrontOptions{Log: log})
	for _, path := range []string{
		"/v2/team/a/blobs/" + digest.String() + "?secret=hidden-1", "/v2/team/a/manifests/none?sig=hidden-2", "/healthz", "/nowhere",
	} {
		get(t, server.Client(), "GET", server.URL+path, "Authorization", "Bearer hidden-3", "X-Other", "hidden-4", "Cookie", "hidden-5")
	}
	all := lines.requests(t)
	if len(all) != 3 {
		t.Fatalf("%d lines for 3 requests besides the probe: %v", len(all), all)
	}
	if l := all[0]; l["repository"] != "team/a" || l["status"] != 200.0 || l["out"] != float64(len(content)) || l["error"] != nil || l["took"] == nil {
		t.Errorf("a pull: %v", l)
	}
	if l := all[1]; l["repository"] != "team/a" || l["status"] != 404.0 || l["error"] == nil || l["level"] != "INFO" {
		t.Errorf("a manifest that isn't there: %v", l)
	}
	if strings.Contains(lines.String(), "hidden") {
		t.Errorf("the log has a secret: %s", lines.String())
	}
}

func TestMetrics(t *testing.T) {
	metrics := registry.NewMetrics()
	metrics.Gauge("sluice_test_queue", "A queue.", func() float64 { return 42 })
	reg := ocimem.New()
	digest := pushed(t, reg, "team/a", []byte(content))
	server := serveFront(t, reg, registry.Options{}, registry.FrontOptions{Metrics: metrics, Limits: registry.Limits{Writes: 1}})
	for range 3 {
		get(t, server.Client(), "GET", server.URL+"/v2/team/a/blobs/"+digest.String())
	}
	get(t, server.Client(), "GET", server.URL+"/v2/team/a/manifests/none")
	get(t, server.Client(), "GET", server.URL+"/some/path")
	get(t, server.Client(), "POST", server.URL+"/v2/team/a/blobs/uploads/")
	get(t, server.Client(), "POST", server.URL+"/v2/team/a/blobs/uploads/")
	w := httptest.NewRecorder()
	metrics.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	text := w.Body.String()
	for _, want := range []string{
		`sluice_http_requests_total{kind="blob_get",status="2xx"} 3`,
		`sluice_http_requests_total{kind="manifest_get",status="4xx"} 1`,
		`sluice_http_requests_total{kind="other",status="4xx"} 2`,
		`sluice_http_request_duration_seconds_count{kind="blob_get"} 3`,
		`sluice_http_rate_limited_total{limit="writes"} 1`,
		`sluice_http_requests_in_flight 0`,
		`sluice_test_queue 42`,
		`process_resident_memory_bytes`, `go_goroutines`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics have no %s", want)
		}
	}
	if strings.Contains(text, "team") || strings.Contains(text, "/some") {
		t.Error("metrics have a name that a client chose")
	}
}

func TestTraces(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	t.Cleanup(func() { provider.Shutdown(context.Background()) })
	log, lines := newLog()
	server := serveFront(t, broken{ocimem.New()}, registry.Options{}, registry.FrontOptions{Log: log, Traces: provider})
	const parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	get(t, server.Client(), "GET", server.URL+"/v2/team/a/manifests/x", "Traceparent", parent)
	get(t, server.Client(), "GET", server.URL+"/v2/")
	ended := spans.Ended()
	if len(ended) != 2 {
		t.Fatalf("%d spans for 2 requests", len(ended))
	}
	span := ended[0]
	if span.Name() != "manifest_get" || span.SpanKind() != trace.SpanKindServer || span.Parent().SpanID().String() != "00f067aa0ba902b7" ||
		span.SpanContext().TraceID().String() != "4bf92f3577b34da6a3ce929d0e0e4736" || span.Status().Code.String() != "Error" {
		t.Errorf("span %s of %v with status %v", span.Name(), span.Parent(), span.Status())
	}
	attributes := attribute.NewSet(span.Attributes()...)
	if v, _ := attributes.Value("sluice.repository"); v.AsString() != "team/a" {
		t.Errorf("attributes: %v", span.Attributes())
	}
	if l := lines.requests(t)[1]; l["trace"] != ended[1].SpanContext().TraceID().String() {
		t.Errorf("the log has trace %v", l["trace"])
	}
}

func TestRateLimits(t *testing.T) {
	// So few that none comes back while the test runs.
	server := serveFront(t, ocimem.New(), registry.Options{}, registry.FrontOptions{
		Limits: registry.Limits{Reads: 2, Writes: 1, Referrers: 1},
	})
	count := func(n int, method, path string) (refused int) {
		for range n {
			resp, body := get(t, server.Client(), method, server.URL+path)
			if resp.StatusCode != http.StatusTooManyRequests {
				continue
			}
			refused++
			var seconds int
			if _, err := fmt.Sscan(resp.Header.Get("Retry-After"), &seconds); err != nil || seconds < 1 || seconds > 60 {
				t.Errorf("Retry-After: %q", resp.Header.Get("Retry-After"))
			}
			if errorCode([]byte(body)) != "TOOMANYREQUESTS" {
				t.Errorf("body %s", body)
			}
		}
		return refused
	}
	if n := count(3, "GET", "/v2/a/referrers/"+emptyDigest); n != 2 {
		t.Errorf("%d of 3 lists of referrers were refused, want 2", n)
	}
	if n := count(3, "POST", "/v2/a/blobs/uploads/"); n != 2 {
		t.Errorf("%d of 3 writes were refused, want 2", n)
	}
	if n := count(3, "GET", "/v2/"); n != 2 {
		t.Errorf("%d of 3 reads were refused, want 2: referrers count too", n)
	}
	if n := count(3, "GET", "/healthz"); n != 0 {
		t.Errorf("%d probes were refused", n)
	}
}

// A response that breaks off must look broken to its client.
func TestBrokenResponse(t *testing.T) {
	log, lines := newLog()
	for name, handler := range map[string]http.HandlerFunc{
		"error": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, strings.Repeat("x", 100_000))
			registry.WriteError(w, r, io.ErrUnexpectedEOF)
		},
		"panic": func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, strings.Repeat("x", 100_000))
			panic("boom")
		},
		"abort": func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, strings.Repeat("x", 100_000))
			panic(http.ErrAbortHandler)
		},
	} {
		for _, h2 := range []bool{false, true} {
			server := httptest.NewUnstartedServer(registry.Wrap(handler, registry.FrontOptions{Log: log}))
			server.EnableHTTP2 = h2
			server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
			server.StartTLS()
			t.Cleanup(server.Close)
			resp, err := server.Client().Get(server.URL + "/x")
			if err != nil {
				continue
			}
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if err == nil {
				t.Errorf("%s, HTTP/%d: the response ended as if it were whole", name, resp.ProtoMajor)
			}
		}
	}
	for _, l := range lines.requests(t) {
		if l["error"] == nil {
			t.Errorf("no error in the log: %v", l)
		}
	}
}

func TestReadiness(t *testing.T) {
	log, lines := newLog()
	server := serveFront(t, ocimem.New(), registry.Options{}, registry.FrontOptions{
		Log: log, Ready: func(context.Context) error { return fmt.Errorf("database: %w", context.DeadlineExceeded) },
	})
	resp, body := get(t, server.Client(), "GET", server.URL+"/readyz")
	if resp.StatusCode != http.StatusServiceUnavailable || strings.Contains(body, "database") {
		t.Errorf("%s: %s", resp.Status, body)
	}
	if !strings.Contains(lines.String(), "database") {
		t.Error("the log doesn't say what is not ready")
	}
}

// redirecting has its blobs elsewhere.
type redirecting struct {
	oci.Registry
	url string
	ttl time.Duration
}

func (r *redirecting) BlobURL(ctx context.Context, repo string, digest oci.Digest, ttl time.Duration) (string, error) {
	r.ttl = ttl
	if _, err := r.ResolveBlob(ctx, repo, digest); err != nil || r.url == "" {
		return "", err
	}
	return r.url + "/" + digest.Encoded() + "?sig=hidden-signature", nil
}

func TestRedirect(t *testing.T) {
	big := bytes.Repeat([]byte(content), 5000)
	reg := &redirecting{Registry: ocimem.New()}
	digest := pushed(t, reg, "a", big)
	var authorized []string
	objects := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		authorized = append(authorized, r.Header.Get("Authorization"))
		if r.URL.Query().Get("sig") != "hidden-signature" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(big))
	}))
	t.Cleanup(objects.Close)
	reg.url = objects.URL
	log, lines := newLog()
	metrics := registry.NewMetrics()
	server := serveFront(t, reg, registry.Options{Redirect: time.Minute}, registry.FrontOptions{Log: log, Metrics: metrics})

	stay := http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	url := server.URL + "/v2/a/blobs/" + digest.String()
	resp, body := get(t, &stay, "GET", url)
	if resp.StatusCode != http.StatusTemporaryRedirect || resp.Header.Get("Cache-Control") != "no-store" || body != "" ||
		resp.Header.Get("Location") != objects.URL+"/"+digest.Encoded()+"?sig=hidden-signature" || reg.ttl != time.Minute {
		t.Errorf("%s, %v, %q", resp.Status, resp.Header, body)
	}
	if resp, _ = get(t, &stay, "HEAD", url); resp.StatusCode != http.StatusOK || resp.ContentLength != int64(len(big)) {
		t.Errorf("HEAD: %s, %d bytes", resp.Status, resp.ContentLength)
	}
	if resp, body = get(t, &stay, "GET", server.URL+"/v2/a/blobs/"+emptyDigest); resp.StatusCode != http.StatusNotFound {
		t.Errorf("a blob that isn't there: %s %s", resp.Status, body)
	}
	if resp, _ = get(t, &stay, "GET", url, "If-None-Match", `"`+digest.String()+`"`); resp.StatusCode != http.StatusNotModified {
		t.Errorf("a blob that the client has: %s", resp.Status)
	}
	resp, body = get(t, http.DefaultClient, "GET", url, "Range", "bytes=100-199", "Authorization", "Bearer of-the-registry")
	if resp.StatusCode != http.StatusPartialContent || body != string(big[100:200]) {
		t.Errorf("a range: %s, %q", resp.Status, body)
	}

	// Our own client, whole blobs and ranges.
	client := connect(t, server)
	for _, read := range []func() (oci.BlobReader, error){
		func() (oci.BlobReader, error) { return client.GetBlob(t.Context(), "a", digest) },
		func() (oci.BlobReader, error) { return client.GetBlobRange(t.Context(), "a", digest, 0, -1) },
	} {
		blob, err := read()
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(blob)
		blob.Close()
		if err != nil || !bytes.Equal(got, big) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	if strings.Contains(lines.String(), "hidden") {
		t.Error("the log has a signed URL")
	}
	reg.url = ""
	if resp, body = get(t, &stay, "GET", url); resp.StatusCode != http.StatusOK || body != string(big) {
		t.Errorf("a blob without a URL: %s", resp.Status)
	}
}

func TestMaxManifest(t *testing.T) {
	server := serve(t, ocimem.New(), registry.Options{MaxManifest: int64(len(emptyIndex))})
	vars := map[string]string{}
	exchange{request: "PUT /v2/a/manifests/v1", header: indexType, body: emptyIndex, status: 201}.run(t, server, vars)
	exchange{request: "PUT /v2/a/manifests/v1", header: indexType, body: emptyIndex + " ", status: 413, answer: "SIZE_INVALID"}.run(t, server, vars)
}
