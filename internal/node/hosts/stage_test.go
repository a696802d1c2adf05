package hosts_test

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/node/hosts"
	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/oci"
	"sluice/oci/ocimem"
)

const repo = "team/app"

// content is what all servers have that have something.
var content = bytes.Repeat([]byte("0123456789abcdef"), 1000)

// server is a registry that remembers what it was asked.
type server struct {
	*httptest.Server
	mem      *ocimem.Registry
	blob     oci.Descriptor
	manifest oci.Manifest

	mu    sync.Mutex
	asked []string // "GET /v2/… ?ns=…"
	seen  []*http.Request
	conns int
	front func(http.ResponseWriter, *http.Request) bool // answers in its place; nil: nothing
}

// newServer returns a registry that isn't listening yet.
func newServer(t *testing.T) *server {
	s := &server{mem: ocimem.New()}
	handler := registry.NewHandler(s.mem, registry.Options{})
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		s.mu.Lock()
		s.asked = append(s.asked, req.Method+" "+req.URL.RequestURI())
		s.seen = append(s.seen, req)
		front := s.front
		s.mu.Unlock()
		if front == nil || !front(w, req) {
			handler.ServeHTTP(w, req)
		}
	}))
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			s.mu.Lock()
			s.conns++
			s.mu.Unlock()
		}
	}
	t.Cleanup(s.Close)
	return s
}

// serve starts a registry without TLS.
func serve(t *testing.T) *server {
	s := newServer(t)
	s.Start()
	return s
}

// fill pushes an image with a referrer.
func (s *server) fill(t *testing.T) *server {
	t.Helper()
	ctx := t.Context()
	must := func(d oci.Descriptor, err error) oci.Descriptor {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	s.blob = must(s.mem.PushBlob(ctx, repo, describe(oci.MediaTypeOctetStream, content), bytes.NewReader(content)))
	config := must(s.mem.PushBlob(ctx, repo, describe(oci.MediaTypeImageConfig, []byte("{}")), strings.NewReader("{}")))
	image := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":2},"layers":[{"mediaType":%q,"digest":%q,"size":%d}]}`,
		oci.MediaTypeImageManifest, oci.MediaTypeImageConfig, config.Digest, oci.MediaTypeOctetStream, s.blob.Digest, s.blob.Size)
	desc := must(s.mem.PushManifest(ctx, repo, "v1", oci.MediaTypeImageManifest, []byte(image)))
	s.manifest = oci.Manifest{Descriptor: desc, Content: []byte(image)}
	referrer := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":"application/x","config":{"mediaType":%q,"digest":%q,"size":2},"layers":[],"subject":{"mediaType":%q,"digest":%q,"size":%d}}`,
		oci.MediaTypeImageManifest, oci.MediaTypeImageConfig, config.Digest, desc.MediaType, desc.Digest, desc.Size)
	referring := []byte(referrer)
	must(s.mem.PushManifest(ctx, repo, oci.DigestOf(referring).String(), oci.MediaTypeImageManifest, referring))
	return s
}

func describe(mediaType string, content []byte) oci.Descriptor {
	return oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
}

// answerWith makes the registry answer all requests with a status.
func (s *server) answerWith(status int, header ...string) *server {
	s.setFront(func(w http.ResponseWriter, _ *http.Request) bool {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		return true
	})
	return s
}

func (s *server) setFront(front func(http.ResponseWriter, *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.front = front
}

// requests returns what was asked so far, and forgets it.
func (s *server) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked, s.seen = nil, nil
	return asked
}

func (s *server) connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conns
}

// addr is host and port.
func (s *server) addr() string { return s.Listener.Addr().String() }

// dir makes a directory of hosts: names below it, and contents.
func dir(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		write(t, filepath.Join(root, name), text)
	}
	return root
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// mirrors is a hosts.toml of mirrors before a server.
func mirrors(server string, mirrors ...string) string {
	text := fmt.Sprintf("server = %q\n", server)
	for _, m := range mirrors {
		text += fmt.Sprintf("[host.%q]\n", m)
	}
	return text
}

// open opens hosts with one registry, example.test, that is defined by text.
func open(t *testing.T, text string) *hosts.Hosts {
	t.Helper()
	return openDirs(t, dir(t, map[string]string{"example.test/hosts.toml": text}))
}

func openDirs(t *testing.T, dirs ...string) *hosts.Hosts {
	t.Helper()
	h := hosts.Open(hosts.Options{
		Dirs: dirs, Credentials: func(_, _ string) remote.CredentialFunc { return remote.Anonymous },
		Log: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	t.Cleanup(h.Close)
	return h
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// example returns the reader of the repository at example.test.
func example(t *testing.T, h *hosts.Hosts) *hosts.Registry {
	t.Helper()
	r, err := h.Registry("example.test", repo)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// checkRange reads a range of the content.
func checkRange(t *testing.T, r oci.Reader, off, n int64) {
	t.Helper()
	body, err := r.GetBlobRange(t.Context(), repo, oci.DigestOf(content), off, n)
	if err != nil {
		t.Error(err)
		return
	}
	defer body.Close()
	got, err := io.ReadAll(body)
	if err != nil || !bytes.Equal(got, content[off:off+n]) {
		t.Errorf("%d bytes at %d: %d bytes, %v", n, off, len(got), err)
	}
}

// eventually waits until something is so.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if is() {
			return
		}
	}
	t.Fatalf("not within 30 s: %s", what)
}
