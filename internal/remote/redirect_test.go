package remote_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/remote"
	"sluice/oci"
)

// objectStore serves blob to whoever has the signature, and remembers what else
// they brought.
type objectStore struct {
	*httptest.Server

	mu       sync.Mutex
	good     string   // the signature that opens it
	brought  []string // values of Authorization and X-Private
	requests int
}

func newObjectStore(t *testing.T) *objectStore {
	s := &objectStore{good: "good"}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		s.mu.Lock()
		s.requests++
		if a := req.Header.Get("Authorization") + req.Header.Get("X-Private"); a != "" {
			s.brought = append(s.brought, a)
		}
		good := s.good
		s.mu.Unlock()
		if req.URL.Query().Get("sig") != good {
			// It would like to be told a password.
			answer(401, "<Error/>", "WWW-Authenticate", `Basic realm="objects"`)(w, req)
			return
		}
		http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(blob))
	}))
	t.Cleanup(s.Close)
	return s
}

// A registry that sends its clients to an object store for blobs: whole ones and
// ranges come from there, and credentials don't go there.
func TestRedirectsToAnObjectStore(t *testing.T) {
	for name, guard := range map[string]func(http.Handler) http.Handler{
		"anonymous": func(h http.Handler) http.Handler { return h },
		"basic":     basic,
		"bearer": func(h http.Handler) http.Handler {
			s := &tokens{Handler: h, issued: map[string]int{}}
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				s.mu.Lock()
				s.url = "http://" + req.Host
				s.mu.Unlock()
				s.ServeHTTP(w, req)
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			objects := newObjectStore(t)
			signature := "good"
			reg := serve(t, guard(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if req.Method != http.MethodGet || !strings.Contains(req.URL.Path, "/blobs/") {
					answer(200, "", "Content-Length", fmt.Sprint(len(blob)))(w, req)
					return
				}
				answer(307, "", "Location", objects.URL+"/container/key?sig="+signature, "Docker-Content-Digest", blobDigest.String())(w, req)
			})), remote.Options{Credentials: user, Retries: -1})
			for range 2 { // the second time with what was kept of the first
				r, err := reg.GetBlob(t.Context(), "some/repo", blobDigest)
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(r)
				r.Close()
				if err != nil || !bytes.Equal(got, blob) {
					t.Errorf("%q, %v", got, err)
				}
				r, err = reg.GetBlobRange(t.Context(), "some/repo", blobDigest, 10, 20)
				if err != nil {
					t.Fatal(err)
				}
				got, err = io.ReadAll(r)
				r.Close()
				if err != nil || !bytes.Equal(got, blob[10:30]) || r.Descriptor().Size != int64(len(blob)) {
					t.Errorf("a range: %q of %d, %v", got, r.Descriptor().Size, err)
				}
			}
			signature = "expired"
			objects.mu.Lock()
			objects.good = "new"
			objects.mu.Unlock()
			_, err := reg.GetBlob(t.Context(), "some/repo", blobDigest)
			if err == nil || strings.Contains(err.Error(), "expired") {
				t.Errorf("an URL that has run out: %v", err)
			}
			if len(objects.brought) > 0 || objects.requests != 7 { // the last of them: the known place, and two that are fresh
				t.Errorf("the object store got %q in %d requests", objects.brought, objects.requests)
			}
		})
	}
}

// What a registry sent us to is used again, until it doesn't work any more; then
// the registry is asked anew, and readers see nothing of it.
func TestPlacesOfBlobsAreKept(t *testing.T) {
	objects := newObjectStore(t)
	var asked atomic.Int64
	var stale atomic.Int64 // redirects that have run out when they come
	var forbid atomic.Bool
	reg := serve(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		asked.Add(1)
		objects.mu.Lock()
		signature := objects.good
		objects.mu.Unlock()
		if stale.Add(-1) >= 0 {
			signature = "old"
		}
		if forbid.Load() {
			w.Header().Set("Cache-Control", "No-Store")
		}
		answer(307, "", "Location", objects.URL+"/key?sig="+signature)(w, req)
	}), remote.Options{Retries: -1, Header: http.Header{"x-private": {"s3cret"}}})
	read := func(what string, wantAsked, wantStored int64) {
		t.Helper()
		asked.Store(0)
		objects.mu.Lock()
		before := int64(objects.requests)
		objects.mu.Unlock()
		for range 5 {
			r, err := reg.GetBlobRange(t.Context(), "some/repo", blobDigest, 10, 20)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			got, err := io.ReadAll(r)
			r.Close()
			if err != nil || !bytes.Equal(got, blob[10:30]) {
				t.Errorf("%s: %q, %v", what, got, err)
			}
		}
		objects.mu.Lock()
		defer objects.mu.Unlock()
		if n := int64(objects.requests) - before; asked.Load() != wantAsked || n != wantStored {
			t.Errorf("%s: %d requests to the registry and %d to the store, want %d and %d", what, asked.Load(), n, wantAsked, wantStored)
		}
		if len(objects.brought) > 0 {
			t.Errorf("%s: the store got %q", what, objects.brought)
		}
	}
	read("five ranges", 1, 5)
	objects.mu.Lock()
	objects.good = "newer"
	objects.mu.Unlock()
	read("the URL has run out", 1, 6)
	objects.mu.Lock()
	objects.good = "newest"
	objects.mu.Unlock()
	stale.Store(1)
	read("so has the next one", 2, 7)
	forbid.Store(true)
	objects.mu.Lock()
	objects.good = "secret"
	objects.mu.Unlock()
	read("not to be kept", 5, 6)
}

// An endpoint with a path, a namespace and headers: what containerd calls a
// mirror with override_path.
func TestEndpoint(t *testing.T) {
	var mu sync.Mutex
	var seen []string
	s := &tokens{Handler: http.StripPrefix("/proxy", inMemory()), issued: map[string]int{}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		mu.Lock()
		seen = append(seen, req.URL.RequestURI()+" "+req.Header.Get("X-Team"))
		mu.Unlock()
		s.ServeHTTP(w, req)
	}))
	t.Cleanup(server.Close)
	s.url = server.URL
	base, err := url.Parse(server.URL + "/proxy/v2/hub")
	if err != nil {
		t.Fatal(err)
	}
	reg := connect(t, server, remote.Options{Credentials: user, Endpoint: base, Namespace: "docker.io", Header: http.Header{"x-team": {"blue"}}})
	_, err = reg.GetManifest(t.Context(), "some/repo", "tag")
	if !errors.Is(err, oci.ErrManifestUnknown) && !errors.Is(err, oci.ErrNameUnknown) {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	want := []string{
		"/proxy/v2/hub/some/repo/manifests/tag?ns=docker.io blue",
		"/token?scope=repository%3Ahub%2Fsome%2Frepo%3Apull&service=test blue",
		"/proxy/v2/hub/some/repo/manifests/tag?ns=docker.io blue",
	}
	if !slices.Equal(seen, want) {
		t.Errorf("requests\n%q, want\n%q", seen, want)
	}
}
