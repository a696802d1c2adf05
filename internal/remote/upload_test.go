package remote_test

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"sluice/internal/remote"
	"sluice/oci"
)

// cutting is a server whose connection breaks at some requests: before they are
// handled, midway through their body, or before the answer.
type cutting struct {
	http.Handler
	method string
	when   string
	left   atomic.Int64 // how often yet
}

func (c *cutting) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.Method != c.method || c.left.Add(-1) < 0 {
		c.Handler.ServeHTTP(w, req)
		return
	}
	switch c.when {
	case "midway":
		req.Body = io.NopCloser(io.MultiReader(io.LimitReader(req.Body, 50_000), broken{}))
		c.Handler.ServeHTTP(httptest.NewRecorder(), req)
	case "after":
		c.Handler.ServeHTTP(httptest.NewRecorder(), req)
	}
	panic(http.ErrAbortHandler)
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// unseekable hides that a reader can be read again.
type unseekable struct{ io.Reader }

func TestPushBlobAfterCut(t *testing.T) {
	content := bytes.Repeat([]byte("content "), 50_000)
	desc := oci.Descriptor{Digest: oci.DigestOf(content), Size: int64(len(content))}
	for _, when := range []string{"before", "midway", "after"} {
		for _, method := range []string{http.MethodPost, http.MethodPut} {
			server := &cutting{Handler: inMemory(), method: method, when: when}
			server.left.Store(2)
			reg := serve(t, server, remote.Options{})
			source := bytes.NewReader(append([]byte("skipped"), content...))
			io.CopyN(io.Discard, source, 7) // the blob begins where the reader is
			if _, err := reg.PushBlob(t.Context(), "some/repo", desc, source); err != nil {
				t.Errorf("cut %s %s: %v", when, method, err)
				continue
			}
			r, err := reg.GetBlob(t.Context(), "some/repo", desc.Digest)
			if err != nil {
				t.Errorf("cut %s %s: %v", when, method, err)
				continue
			}
			if got, err := io.ReadAll(oci.VerifyReader(r, desc)); err != nil || !bytes.Equal(got, content) {
				t.Errorf("cut %s %s: read %d bytes, %v", when, method, len(got), err)
			}
			r.Close()
		}
	}
	server := &cutting{Handler: inMemory(), method: http.MethodPut, when: "before"}
	server.left.Store(1)
	reg := serve(t, server, remote.Options{})
	_, err := reg.PushBlob(t.Context(), "some/repo", desc, unseekable{bytes.NewReader(content)})
	checkMessage(t, "source that can't be read again", err, reg, desc.Digest.String())
}

func TestUploadAfterCut(t *testing.T) {
	content := bytes.Repeat([]byte("content "), 50_000)
	for _, when := range []string{"before", "midway", "after"} {
		for _, method := range []string{http.MethodPatch, http.MethodPut} {
			if method == http.MethodPut && when != "after" {
				continue // a commit isn't repeated
			}
			server := &cutting{Handler: inMemory(), method: method, when: when}
			server.left.Store(2)
			reg := serve(t, server, remote.Options{ChunkSize: 150_000})
			u, err := reg.StartUpload(t.Context(), "some/repo")
			if err != nil {
				t.Fatal(err)
			}
			if err := u.Append(t.Context(), 0, unseekable{bytes.NewReader(content)}); err != nil {
				t.Errorf("cut %s %s: %v", when, method, err)
				continue
			}
			if u.Size() != int64(len(content)) {
				t.Errorf("cut %s %s: size is %d", when, method, u.Size())
			}
			if _, err := u.Commit(t.Context(), oci.DigestOf(content)); err != nil {
				t.Errorf("cut %s %s: %v", when, method, err)
			}
		}
	}
}

func TestHostileUploads(t *testing.T) {
	good := inMemory()
	// after gives another answer to one kind of request.
	after := func(method string, bad http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, req *http.Request) {
			if req.Method == method {
				io.Copy(io.Discard, req.Body)
				bad(w, req)
			} else {
				good.ServeHTTP(w, req)
			}
		}
	}
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		want    string
	}{
		"no location":   {after("POST", answer(202, "")), "location"},
		"bad location":  {after("POST", answer(202, "", "Location", "http://[::1")), "location"},
		"script":        {after("POST", answer(202, "", "Location", "javascript:alert(1)")), "location"},
		"file":          {after("POST", answer(202, "", "Location", "file://host/x")), "TLS"},
		"password":      {after("POST", answer(202, "", "Location", "http://u:p@host/x")), "location"},
		"page":          {after("POST", answer(200, "<html>log in</html>")), "log in"},
		"wrong range":   {after("PATCH", answer(202, "", "Range", "0-5")), "0-5"},
		"garbage range": {after("PATCH", answer(202, "", "Range", "lots")), "lots"},
		"refused":       {after("PATCH", answer(403, "")), "403"},
		"other digest":  {after("PUT", answer(201, "", "Docker-Content-Digest", oci.DigestOf(nil).String())), oci.DigestOf(nil).String()},
		"not created":   {after("PUT", answer(202, "")), "HTTP 202"},
		"loop":          {after("PUT", answer(307, "", "Location", "/v2/again")), "redirects"},
	} {
		reg := serve(t, test.handler, once)
		checkMessage(t, name, func() error {
			u, err := reg.StartUpload(t.Context(), "some/repo")
			if err != nil {
				return err
			}
			if err := u.Append(t.Context(), 0, bytes.NewReader(blob)); err != nil {
				return err
			}
			_, err = u.Commit(t.Context(), blobDigest)
			return err
		}(), reg, test.want)
		if strings.Contains(name, "range") || name == "refused" {
			continue // PushBlob doesn't send pieces
		}
		_, err := reg.PushBlob(t.Context(), "some/repo", oci.Descriptor{Digest: blobDigest, Size: int64(len(blob))}, bytes.NewReader(blob))
		checkMessage(t, name, err, reg, test.want)
	}
}

// A server that keeps an upload whose digest was wrong is told to drop it.
func TestWrongCommitIsDropped(t *testing.T) {
	var dropped atomic.Int64
	handler := inMemory()
	reg := serve(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch req.Method {
		case http.MethodPut:
			answer(400, `{"errors":[{"code":"DIGEST_INVALID"}]}`)(w, req)
			return
		case http.MethodDelete:
			dropped.Add(1)
		}
		handler.ServeHTTP(w, req)
	}), once)
	u, err := reg.StartUpload(t.Context(), "some/repo")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Commit(t.Context(), blobDigest); !errors.Is(err, oci.ErrDigestInvalid) {
		t.Errorf("Commit: %v", err)
	}
	if err := u.Cancel(t.Context()); !errors.Is(err, oci.ErrBlobUploadUnknown) || dropped.Load() != 1 {
		t.Errorf("afterwards: %v, dropped %d times", err, dropped.Load())
	}
}

// A registry behind a proxy that ends TLS says http: of itself.
func TestUploadKeepsTLS(t *testing.T) {
	handler := inMemory()
	var plain atomic.Bool
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		handler.ServeHTTP(&plainLocation{w, "http://" + req.Host, &plain}, req)
	}))
	t.Cleanup(server.Close)
	transport := server.Client().Transport.(*http.Transport)
	reg := connect(t, server, remote.Options{Transport: transport, PlainHTTP: remote.PlainHTTPNever})
	_, err := reg.PushBlob(t.Context(), "some/repo", oci.Descriptor{Digest: blobDigest, Size: int64(len(blob))}, bytes.NewReader(blob))
	if err != nil || !plain.Load() {
		t.Errorf("pushed with %v; a location was changed: %v", err, plain.Load())
	}
}

type plainLocation struct {
	http.ResponseWriter
	origin string
	used   *atomic.Bool
}

func (w *plainLocation) WriteHeader(status int) {
	if location := w.Header().Get("Location"); strings.HasPrefix(location, "/") {
		w.Header().Set("Location", w.origin+location)
		w.used.Store(true)
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *plainLocation) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func TestMountRefused(t *testing.T) {
	handler := inMemory()
	var uploads atomic.Int64
	reg := serve(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if strings.Contains(req.URL.RawQuery, "mount=") {
			req.URL.RawQuery = "" // so it begins an upload
		}
		switch req.Method {
		case http.MethodPost:
			uploads.Add(1)
		case http.MethodDelete:
			uploads.Add(-1)
		}
		handler.ServeHTTP(w, req)
	}), once)
	desc := oci.Descriptor{Digest: blobDigest, Size: int64(len(blob))}
	if _, err := reg.PushBlob(t.Context(), "from", desc, bytes.NewReader(blob)); err != nil {
		t.Fatal(err)
	}
	uploads.Store(0)
	_, err := reg.MountBlob(t.Context(), "from", "some/repo", blobDigest)
	checkMessage(t, "mount", err, reg, "push the blob instead")
	if !errors.Is(err, oci.ErrUnsupported) || uploads.Load() != 0 {
		t.Errorf("error %v, %d uploads left", err, uploads.Load())
	}
}

// The index in a tag is repaired when it names a manifest that is gone.
func TestTagIndexRepaired(t *testing.T) {
	handler := inMemory()
	reg := serve(t, old(handler), once)
	direct := serve(t, handler, once)
	subject := oci.Descriptor{MediaType: oci.MediaTypeIndex, Digest: oci.DigestOf([]byte("subject")), Size: 7}
	pushReferrer := func(artifactType string) oci.Digest {
		t.Helper()
		content := []byte(`{"schemaVersion":2,"artifactType":"` + artifactType + `","manifests":[],"subject":{"mediaType":"` + subject.MediaType + `","digest":"` + subject.Digest.String() + `","size":7}}`)
		digest := oci.DigestOf(content)
		if _, err := reg.PushManifest(t.Context(), "some/repo", digest.String(), oci.MediaTypeIndex, content); err != nil {
			t.Fatal(err)
		}
		return digest
	}
	first := pushReferrer("a/1")
	second := pushReferrer("a/2")
	if err := direct.DeleteManifest(t.Context(), "some/repo", first); err != nil { // by a client that cares nothing for tags
		t.Fatal(err)
	}
	third := pushReferrer("a/3")
	got := map[oci.Digest]string{}
	for desc, err := range reg.Referrers(t.Context(), "some/repo", subject.Digest, "") {
		if err != nil {
			t.Fatal(err)
		}
		got[desc.Digest] = desc.ArtifactType
	}
	if len(got) != 2 || got[second] != "a/2" || got[third] != "a/3" {
		t.Errorf("referrers: %v, want %s and %s", got, second, third)
	}
}
