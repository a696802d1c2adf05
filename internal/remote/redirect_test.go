package remote_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/remote"
)

// objectStore serves blob to whoever has the signature, and remembers what else
// they brought.
type objectStore struct {
	*httptest.Server

	mu       sync.Mutex
	brought  []string // values of Authorization
	requests int
}

func newObjectStore(t *testing.T) *objectStore {
	s := &objectStore{}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		s.mu.Lock()
		s.requests++
		if a := req.Header.Get("Authorization"); a != "" {
			s.brought = append(s.brought, a)
		}
		s.mu.Unlock()
		if req.URL.Query().Get("sig") != "good" {
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
			_, err := reg.GetBlob(t.Context(), "some/repo", blobDigest)
			if err == nil || strings.Contains(err.Error(), "expired") {
				t.Errorf("an URL that has run out: %v", err)
			}
			if len(objects.brought) > 0 || objects.requests < 5 {
				t.Errorf("the object store got %q in %d requests", objects.brought, objects.requests)
			}
		})
	}
}
