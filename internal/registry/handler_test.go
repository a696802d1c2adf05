package registry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/internal/storage"
	"sluice/oci"
	"sluice/oci/ocitest"
)

// Client, handler and store together must be as good a registry as any.
func TestRemote(t *testing.T) {
	ocitest.Run(t, func(t *testing.T) oci.Registry {
		stored := openStored(t, openLocal(t, t.TempDir()))
		return connect(t, serve(t, stored, registry.Options{PageSize: 13}))
	})
}

func serve(t *testing.T, reg oci.Registry, opts registry.Options) *httptest.Server {
	t.Helper()
	return serveFront(t, reg, opts, registry.FrontOptions{})
}

// serveFront starts a server with a front and a handler.
func serveFront(t *testing.T, reg oci.Registry, opts registry.Options, front registry.FrontOptions) *httptest.Server {
	t.Helper()
	server := httptest.NewUnstartedServer(nil)
	server.Config = registry.NewServer(registry.Wrap(registry.NewHandler(reg, opts), front), nil)
	server.Start()
	t.Cleanup(server.Close)
	return server
}

func connect(t *testing.T, server *httptest.Server) *remote.Registry {
	t.Helper()
	transport := remote.NewTransport()
	t.Cleanup(transport.CloseIdleConnections)
	r, err := remote.New(server.Listener.Addr().String(), remote.Options{Transport: transport, Credentials: remote.Anonymous, Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// exchange is a request and what is wanted of its response. In all strings,
// {NAME} stands for the variable of that name.
type exchange struct {
	request string // METHOD PATH
	header  string // "K: V" lines
	body    string
	status  int
	want    string // header lines; "-K" means that there is none
	answer  string // body, if not empty; an error's code if it is one in capitals
}

const (
	content      = "0123456789abcdefghij"
	emptyDigest  = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	indexType    = "Content-Type: application/vnd.oci.image.index.v1+json"
	emptyIndex   = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`
	bareIndex    = `{"schemaVersion":2,"manifests":[]}`
	octets       = "Content-Type: application/octet-stream"
	errorContent = "Content-Type: application/json"
)

func TestProtocol(t *testing.T) {
	vars := map[string]string{
		"content": oci.DigestOf([]byte(content)).String(),
		"other":   oci.DigestOf([]byte("other")).String(),
		"index":   oci.DigestOf([]byte(emptyIndex)).String(),
		"index5":  oci.SHA512.FromString(emptyIndex).String(),
		"bare":    oci.DigestOf([]byte(bareIndex)).String(),
		"none":    emptyDigest,
		"long":    strings.Repeat("a", 5000),
	}
	for name, exchanges := range map[string][]exchange{
		"paths": {
			{request: "GET /v2/", status: 200, want: "Docker-Distribution-API-Version: registry/2.0", answer: "{}"},
			{request: "HEAD /v2/", status: 200},
			{request: "GET /v2", status: 200},
			{request: "POST /v2/", status: 405, want: "Allow: GET, HEAD", answer: "UNSUPPORTED"},
			{request: "GET /", status: 404, answer: "NOT_FOUND"},
			{request: "GET /v2x/", status: 404, answer: "NOT_FOUND"},
			{request: "GET /v2/a", status: 404, answer: "NOT_FOUND"},
			{request: "GET /v2/a/unknown/b", status: 404, answer: "NOT_FOUND"},
			{request: "GET /v2/blobs/{content}", status: 404, answer: "NOT_FOUND"},
			{request: "GET /v2/A/tags/list", status: 400, want: errorContent, answer: "NAME_INVALID"},
			{request: "GET /v2/a//b/tags/list", status: 400, answer: "NAME_INVALID"},
			{request: "GET /v2/a/../b/tags/list", status: 400, answer: "NAME_INVALID"},
			{request: "GET /v2/a%2f..%2f..%2fetc/tags/list", status: 400, answer: "NAME_INVALID"},
			{request: "GET /v2/a/blobs/sha256:zz", status: 400, answer: "DIGEST_INVALID"},
			{request: "GET /v2/a/manifests/sha256:zz", status: 400, answer: "DIGEST_INVALID"},
			{request: "GET /v2/a/manifests/.x", status: 400, answer: "MANIFEST_INVALID"},
			{request: "GET /v2/a/tags/list?n=%zz", status: 400, answer: "BAD_REQUEST"},
			{request: "PATCH /v2/a/blobs/{content}", status: 405, want: "Allow: DELETE, GET, HEAD"},
			{request: "GET /v2/a/blobs/uploads/", status: 405, want: "Allow: POST"},
			{request: "GET /v2/a/tags/list", status: 404, answer: "NAME_UNKNOWN"},
			{request: "GET /v2/a/blobs/{content}", status: 404, answer: "NAME_UNKNOWN"},
			{request: "HEAD /v2/a/manifests/x", status: 404, want: errorContent},
			{request: "GET /healthz", status: 200, answer: "ok\n"},
			{request: "GET /readyz", status: 200, answer: "ready\n"},
		},
		"push": {
			{request: "POST /v2/a/blobs/uploads/?digest={content}", header: octets, body: content, status: 201,
				want: "Location: /v2/a/blobs/{content}\nDocker-Content-Digest: {content}\nContent-Length: 0"},
			{request: "POST /v2/a/blobs/uploads/?digest={other}", body: content, status: 400, answer: "DIGEST_INVALID"},
			{request: "POST /v2/a/blobs/uploads/?digest=sha256:1", body: content, status: 400, answer: "DIGEST_INVALID"},
			{request: "POST /v2/a/blobs/uploads?digest={none}", status: 201, want: "Docker-Content-Digest: {none}"},
			{request: "POST /v2/a/blobs/uploads/?digest={content}", status: 202, want: "Range: 0-0\nUpload-Offset: 0\n-Docker-Content-Digest"},
			{request: "POST /v2/a/blobs/uploads/?digest-algorithm=sha512", status: 202},
			{request: "POST /v2/a/blobs/uploads/?digest-algorithm=md5", status: 400, answer: "DIGEST_INVALID"},
			{request: "POST /v2/b/blobs/uploads/?mount={content}&from=a", status: 201, want: "Location: /v2/b/blobs/{content}"},
			{request: "POST /v2/c/blobs/uploads/?mount={content}", status: 201, want: "Location: /v2/c/blobs/{content}"},
			{request: "POST /v2/c/blobs/uploads/?mount={other}", status: 202, want: "Range: 0-0"},
			{request: "POST /v2/c/blobs/uploads/?mount={other}&from=a", status: 202},
			{request: "POST /v2/c/blobs/uploads/?mount={content}&from=UNKNOWN", status: 202},
			{request: "POST /v2/c/blobs/uploads/?mount=x&from=a", status: 400, answer: "DIGEST_INVALID"},
		},
		"upload": {
			{request: "POST /v2/a/blobs/uploads/", status: 202, want: "Range: 0-0\nUpload-Offset: 0\nContent-Length: 0"},
			{request: "GET {location}", status: 204, want: "Range: 0-0\nUpload-Offset: 0\nLocation: {location}"},
			{request: "PATCH {location}", header: "Content-Range: 0-4", body: content[:5], status: 202, want: "Range: 0-4\nUpload-Offset: 5"},
			{request: "PATCH {location}", header: "Content-Range: 0-4", body: content[:5], status: 416, want: "Range: 0-4\nLocation: {location}", answer: "RANGE_INVALID"},
			{request: "PATCH {location}", header: "Content-Range: 7-8", body: content[7:9], status: 416, want: "Range: 0-4"},
			{request: "PATCH {location}", header: "Content-Range: 5-9", body: content[5:8], status: 400, answer: "SIZE_INVALID"},
			{request: "PATCH {location}", header: "Content-Range: 9-5", body: content[5:8], status: 400, answer: "BLOB_UPLOAD_INVALID"},
			{request: "PATCH {location}", header: "Content-Range: x", body: content[5:8], status: 400, answer: "BLOB_UPLOAD_INVALID"},
			{request: "PATCH {location}", header: "Content-Range: bytes 5-7/*", body: content[5:8], status: 202, want: "Range: 0-7"},
			{request: "PATCH {location}", body: content[8:10], status: 202, want: "Range: 0-9"},
			{request: "GET {location}", status: 204, want: "Range: 0-9"},
			{request: "PUT {location}", body: content[10:], status: 400, answer: "DIGEST_INVALID"},
			{request: "PUT {location}?digest={content}", header: "Content-Range: 11-19", body: content[11:], status: 416},
			{request: "PUT {location}?digest={content}", header: "Content-Range: 10-19", body: content[10:], status: 201,
				want: "Location: /v2/a/blobs/{content}\nDocker-Content-Digest: {content}"},
			{request: "GET {location}", status: 404, answer: "BLOB_UPLOAD_UNKNOWN"},
			{request: "GET /v2/a/blobs/{content}", status: 200, answer: content},
			{request: "POST /v2/a/blobs/uploads/", status: 202},
			{request: "PUT {location}?digest={other}", body: content, status: 400, answer: "DIGEST_INVALID"},
			{request: "GET {location}", status: 404, answer: "BLOB_UPLOAD_UNKNOWN"},
			{request: "POST /v2/a/blobs/uploads/", status: 202},
			{request: "DELETE {location}", status: 204},
			{request: "DELETE {location}", status: 404, answer: "BLOB_UPLOAD_UNKNOWN"},
			{request: "PATCH /v2/a/blobs/uploads/{long}", body: "x", status: 404, answer: "BLOB_UPLOAD_UNKNOWN"},
			{request: "GET /v2/a/blobs/uploads/..", status: 404, answer: "BLOB_UPLOAD_UNKNOWN"},
		},
		"get": {
			{request: "POST /v2/a/blobs/uploads/?digest={content}", body: content, status: 201},
			{request: "GET /v2/a/blobs/{content}", status: 200, answer: content,
				want: "Content-Length: 20\nAccept-Ranges: bytes\nEtag: \"{content}\"\nDocker-Content-Digest: {content}\n" + octets},
			{request: "HEAD /v2/a/blobs/{content}", status: 200, want: "Content-Length: 20\nDocker-Content-Digest: {content}"},
			{request: "GET /v2/a/blobs/{content}", header: `If-None-Match: "x", W/"{content}"`, status: 304, want: "Etag: \"{content}\""},
			{request: "GET /v2/a/blobs/{other}", header: `If-None-Match: "{other}"`, status: 404, answer: "BLOB_UNKNOWN"},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=3-5", status: 206, answer: "345", want: "Content-Range: bytes 3-5/20\nContent-Length: 3"},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=15-", status: 206, answer: "fghij", want: "Content-Range: bytes 15-19/20"},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=-4", status: 206, answer: "ghij", want: "Content-Range: bytes 16-19/20"},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=-400", status: 206, answer: content, want: "Content-Range: bytes 0-19/20"},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=18-99999999999999999999999", status: 206, answer: "ij"},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=20-", status: 416, want: "Content-Range: bytes */20\n-Etag", answer: "RANGE_INVALID"},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=99999999999999999999999-", status: 416},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=-0", status: 416},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=5-4", status: 416},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=0-1,4-5", status: 200, answer: content},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=x-1", status: 200, answer: content},
			{request: "GET /v2/a/blobs/{content}", header: "Range: lines=0-1", status: 200, answer: content},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=3-5\nIf-Range: \"{content}\"", status: 206, answer: "345"},
			{request: "GET /v2/a/blobs/{content}", header: "Range: bytes=3-5\nIf-Range: \"{other}\"", status: 200, answer: content},
			{request: "DELETE /v2/a/blobs/{content}", status: 202},
			{request: "DELETE /v2/a/blobs/{content}", status: 404},
		},
		"manifest": {
			{request: "PUT /v2/a/manifests/v1", header: indexType, body: emptyIndex, status: 201,
				want: "Location: /v2/a/manifests/{index}\nDocker-Content-Digest: {index}\n-Oci-Subject"},
			{request: "GET /v2/a/manifests/v1", header: "Accept: text/html", status: 200, answer: emptyIndex,
				want: indexType + "\nDocker-Content-Digest: {index}\nEtag: \"{index}\"\n-Cache-Control"},
			{request: "HEAD /v2/a/manifests/{index}", status: 200, want: indexType + "\nContent-Length: 88"},
			{request: "GET /v2/a/manifests/v1", header: `If-None-Match: "{index}"`, status: 304},
			{request: "PUT /v2/a/manifests/{other}", header: indexType, body: emptyIndex, status: 400, answer: "DIGEST_INVALID"},
			{request: "PUT /v2/a/manifests/v2", header: indexType + "; charset=utf-8", body: emptyIndex, status: 201},
			{request: "PUT /v2/a/manifests/v3", header: "Content-Type: application/json", body: emptyIndex, status: 201},
			{request: "PUT /v2/a/manifests/v4", body: emptyIndex, status: 201},
			{request: "PUT /v2/a/manifests/v5", header: "Content-Type: text/html", body: "<html>", status: 400, answer: "MANIFEST_INVALID"},
			{request: "PUT /v2/a/manifests/v5", header: "Content-Type: application/vnd.oci.image.manifest.v1+json", body: emptyIndex, status: 400, answer: "MANIFEST_INVALID"},
			{request: "PUT /v2/a/manifests/v5", header: indexType, body: bareIndex, status: 201, want: "Docker-Content-Digest: {bare}"},
			{request: "GET /v2/a/manifests/v5", status: 200, want: indexType, answer: bareIndex},
			{request: "PUT /v2/a/manifests/{index5}?tag=x&tag=y", header: indexType, body: emptyIndex, status: 201, want: "Oci-Tag: x\nDocker-Content-Digest: {index5}"},
			{request: "GET /v2/a/manifests/y", status: 200, want: "Docker-Content-Digest: {index5}"},
			{request: "PUT /v2/a/manifests/{index}?tag=-", header: indexType, body: emptyIndex, status: 400},
			{request: "PUT /v2/a/manifests/{index}?" + strings.Repeat("tag=x&", 101), header: indexType, body: emptyIndex, status: 414},
			{request: "PUT /v2/a/manifests/big", header: indexType, body: strings.Repeat(" ", oci.MaxManifestSize+1), status: 413, answer: "SIZE_INVALID"},
			{request: "DELETE /v2/a/manifests/v1", status: 202},
			{request: "GET /v2/a/manifests/v1", status: 404, answer: "MANIFEST_UNKNOWN"},
			{request: "GET /v2/a/manifests/{index}", status: 200},
			{request: "DELETE /v2/a/manifests/{index}", status: 202},
			{request: "GET /v2/a/manifests/v2", status: 404},
			{request: "GET /v2/a/manifests/{index}", status: 404},
		},
		"lists": {
			{request: "GET /v2/_catalog", status: 200, answer: `{"repositories":[]}`},
			{request: "PUT /v2/a/manifests/{index}", header: indexType, body: emptyIndex, status: 201},
			{request: "GET /v2/a/tags/list", status: 200, answer: `{"name":"a","tags":[]}`},
			{request: "PUT /v2/a/manifests/{index}?tag=t1&tag=t2&tag=t3", header: indexType, body: emptyIndex, status: 201},
			{request: "PUT /v2/a/b/manifests/x", header: indexType, body: emptyIndex, status: 201},
			{request: "PUT /v2/a-b/manifests/x", header: indexType, body: emptyIndex, status: 201},
			{request: "GET /v2/a/tags/list", status: 200, want: "-Link", answer: `{"name":"a","tags":["t1","t2","t3"]}`},
			{request: "GET /v2/a/tags/list?n=2", status: 200, want: `Link: </v2/a/tags/list?last=t2&n=2>; rel="next"`, answer: `{"name":"a","tags":["t1","t2"]}`},
			{request: "GET /v2/a/tags/list?last=t2&n=2", status: 200, want: "-Link", answer: `{"name":"a","tags":["t3"]}`},
			{request: "GET /v2/a/tags/list?n=3", status: 200, want: "-Link", answer: `{"name":"a","tags":["t1","t2","t3"]}`},
			{request: "GET /v2/a/tags/list?n=0", status: 200, want: "-Link", answer: `{"name":"a","tags":[]}`},
			{request: "GET /v2/a/tags/list?n=-1", status: 400, answer: "PAGINATION_NUMBER_INVALID"},
			{request: "GET /v2/a/tags/list?n=99999999999999999999", status: 200, answer: `{"name":"a","tags":["t1","t2","t3"]}`},
			{request: "GET /v2/_catalog?n=2", status: 200, want: `Link: </v2/_catalog?last=a-b&n=2>; rel="next"`, answer: `{"repositories":["a","a-b"]}`},
			{request: "GET /v2/_catalog?n=2&last=a-b", status: 200, want: "-Link", answer: `{"repositories":["a/b"]}`},
			{request: "GET /v2/none/referrers/{other}", status: 200, want: indexType + "\n-Oci-Filters-Applied", answer: emptyIndex},
			{request: "GET /v2/a/referrers/x", status: 400, answer: "DIGEST_INVALID"},
			{request: "GET /v2/a/referrers/{other}?artifactType=x/y", status: 200, want: "Oci-Filters-Applied: artifactType", answer: emptyIndex},
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := serve(t, openStored(t, &storage.Memory{}), registry.Options{})
			for _, e := range exchanges {
				e.run(t, server, vars)
			}
		})
	}
}

func (e exchange) run(t *testing.T, server *httptest.Server, vars map[string]string) {
	t.Helper()
	fill := func(s string) string {
		for k, v := range vars {
			s = strings.ReplaceAll(s, "{"+k+"}", v)
		}
		return s
	}
	method, path, _ := strings.Cut(fill(e.request), " ")
	req, err := http.NewRequestWithContext(t.Context(), method, server.URL+path, strings.NewReader(e.body))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(fill(e.header)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), ": ")
		req.Header.Set(k, v)
	}
	client := http.Client{Transport: server.Client().Transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatalf("%.200s: %v", e.request, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Errorf("%.200s: %v", e.request, err)
	}
	if resp.StatusCode != e.status {
		t.Errorf("%.200s: status %d, want %d; %.300s", e.request, resp.StatusCode, e.status, answer)
	}
	for line := range strings.Lines(fill(e.want)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if k, none := strings.CutPrefix(k, "-"); none {
			if got := resp.Header.Get(k); got != "" {
				t.Errorf("%.200s: header %s is %q, want none", e.request, k, got)
			}
		} else if got := resp.Header.Get(k); got != v {
			t.Errorf("%.200s: header %s is %q, want %q", e.request, k, got, v)
		}
	}
	if e.answer != "" {
		got := string(answer)
		if strings.ToUpper(e.answer) == e.answer && e.answer[0] >= 'A' && e.answer[0] <= 'Z' {
			got = errorCode(answer)
		}
		if got != e.answer {
			t.Errorf("%.200s: answer is %.300s, want %s", e.request, answer, e.answer)
		}
	}
	if l := resp.Header.Get("Location"); l != "" && strings.Contains(l, "/uploads/") {
		vars["location"] = l
	}
}

func errorCode(answer []byte) string {
	var doc struct {
		Errors []struct{ Code, Message string }
	}
	if err := json.Unmarshal(answer, &doc); err != nil || len(doc.Errors) != 1 || doc.Errors[0].Message == "" {
		return "not an error document: " + string(answer)
	}
	return doc.Errors[0].Code
}

func TestReferrersPages(t *testing.T) {
	stored := openStored(t, &storage.Memory{})
	server := serve(t, stored, registry.Options{})
	subject := oci.Descriptor{MediaType: oci.MediaTypeImageManifest, Digest: oci.DigestOf([]byte("subject")), Size: 7}
	push := func(i int, padding string) {
		content, err := json.Marshal(oci.Index{
			Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex, ArtifactType: "x/y", Subject: &subject,
			Manifests: []oci.Descriptor{}, Annotations: map[string]string{"i": fmt.Sprint(i), "padding": padding},
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stored.PushManifest(t.Context(), "a", oci.DigestOf(content).String(), oci.MediaTypeIndex, content); err != nil {
			t.Fatal(err)
		}
	}
	pages := func(query string) (sizes []int, all map[oci.Digest]bool) {
		all = map[oci.Digest]bool{}
		for next := "/v2/a/referrers/" + subject.Digest.String() + query; next != ""; {
			resp, err := http.Get(server.URL + next)
			if err != nil {
				t.Fatal(err)
			}
			var index oci.Index
			err = json.NewDecoder(resp.Body).Decode(&index)
			resp.Body.Close()
			if err != nil {
				t.Fatal(err)
			}
			sizes = append(sizes, len(index.Manifests))
			for _, d := range index.Manifests {
				all[d.Digest] = true
			}
			next, _, _ = strings.Cut(strings.TrimPrefix(resp.Header.Get("Link"), "<"), ">")
		}
		return sizes, all
	}
	for i := range 5 {
		push(i, "")
	}
	sizes, all := pages("?n=2&artifactType=x/y")
	if d := cmp.Diff([]int{2, 2, 1}, sizes); d != "" || len(all) != 5 {
		t.Errorf("pages of 2: %v with %d referrers in all", sizes, len(all))
	}
	// An answer must not be larger than clients are ready to read.
	for i := range 5 {
		push(100+i, strings.Repeat("x", 1<<20))
	}
	sizes, all = pages("")
	if len(all) != 10 || len(sizes) < 2 {
		t.Errorf("large referrers: pages %v with %d referrers in all", sizes, len(all))
	}
}

// A request that stands still is ended; one that flows, however slowly, is not.
func TestIdleTimeout(t *testing.T) { synctest.Test(t, testIdleTimeout) }

func testIdleTimeout(t *testing.T) {
	const idle = time.Minute
	stored := openStored(t, &storage.Memory{})
	listener := newPipes()
	server := registry.NewServer(registry.Wrap(registry.NewHandler(stored, registry.Options{}), registry.FrontOptions{IdleTimeout: idle}), nil)
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-done })
	slow := bytes.Repeat([]byte("x"), 10)
	digest := oci.DigestOf(slow)

	dial := func(request string) net.Conn {
		conn, err := listener.dial(t.Context(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		io.WriteString(conn, request)
		return conn
	}
	post := fmt.Sprintf("POST /v2/a/blobs/uploads/?digest=%s HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n", digest)
	conn := dial(post)
	for i := range slow {
		time.Sleep(idle - time.Second)
		conn.Write(slow[i : i+1])
	}
	if got := readStatus(t, conn); got != "HTTP/1.1 201 Created" {
		t.Errorf("a slow push: %s", got)
	}
	conn = dial(post + "xxx")
	if got := readStatus(t, conn); got != "HTTP/1.1 408 Request Timeout" {
		t.Errorf("a push that stands still: %s", got)
	}
	if rest, err := io.ReadAll(conn); err != nil || !bytes.Contains(rest, []byte("TIMEOUT")) {
		t.Errorf("after the timeout: %q, %v", rest, err)
	}
	// One that is refused before its body is read must not wait for it either.
	conn = dial("PATCH /v2/a/blobs/uploads/x HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
	if _, err := io.ReadAll(conn); err != nil {
		t.Errorf("a refused push: %v", err)
	}

	// A reader that stops reading.
	big := oci.Descriptor{Digest: oci.DigestOf(make([]byte, 32<<20)), Size: 32 << 20}
	if _, err := stored.PushBlob(t.Context(), "a", big, bytes.NewReader(make([]byte, 32<<20))); err != nil {
		t.Fatal(err)
	}
	conn = dial(fmt.Sprintf("GET /v2/a/blobs/%s HTTP/1.1\r\nHost: x\r\n\r\n", big.Digest))
	time.Sleep(3 * idle)
	if n, _ := io.Copy(io.Discard, conn); n >= 32<<20 {
		t.Error("a pull that stood still went on")
	}
}

func readStatus(t *testing.T, conn net.Conn) string {
	t.Helper()
	var line []byte
	for one := make([]byte, 1); ; line = append(line, one[0]) {
		if _, err := conn.Read(one); err != nil {
			t.Fatalf("after %q: %v", line, err)
		}
		if one[0] == '\n' {
			return strings.TrimSpace(string(line))
		}
	}
}

// broken fails in ways that registries should not.
type broken struct{ oci.Registry }

func (broken) ResolveBlob(context.Context, string, oci.Digest) (oci.Descriptor, error) {
	panic("boom")
}

func (broken) GetManifest(context.Context, string, string) (oci.Manifest, error) {
	return oci.Manifest{}, errors.New("secret path /var/lib")
}

func TestFailures(t *testing.T) {
	var log bytes.Buffer
	ready := errors.New("disk on fire")
	server := serveFront(t, broken{}, registry.Options{}, registry.FrontOptions{
		Log:   slog.New(slog.NewTextHandler(&log, nil)),
		Ready: func(context.Context) error { return ready },
	})
	vars := map[string]string{"d": emptyDigest}
	exchange{request: "HEAD /v2/a/blobs/{d}", status: 500}.run(t, server, vars)
	exchange{request: "GET /v2/a/manifests/x?token=hidden", header: "Authorization: Bearer hidden", status: 500, answer: "INTERNAL_ERROR"}.run(t, server, vars)
	exchange{request: "GET /readyz", status: 503}.run(t, server, vars)
	ready = nil
	exchange{request: "GET /readyz", status: 200}.run(t, server, vars)
	server.Close()
	for _, want := range []string{"boom", "handler_test.go", "secret path", "disk on fire", "method=HEAD path=/v2/a/blobs/" + emptyDigest + " status=500"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log doesn't have %q", want)
		}
	}
	if strings.Contains(log.String(), "hidden") {
		t.Errorf("the log has a secret: %s", log.String())
	}
	if n := strings.Count(log.String(), "msg=request"); n != 2 {
		t.Errorf("%d lines for 2 requests besides the probes", n)
	}
}
