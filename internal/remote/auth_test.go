package remote_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/remote"
	"sluice/oci"
)

const secret = "pa:ss/W0RD?&"

func user(context.Context, string) (remote.Credential, error) {
	return remote.Credential{Username: "user", Password: secret}, nil
}

// basic wants Basic authentication in front of handler.
func basic(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if name, password, ok := req.BasicAuth(); !ok || name != "user" || password != secret {
			answer(401, "", "WWW-Authenticate", `Basic realm="test"`)(w, req)
			return
		}
		handler.ServeHTTP(w, req)
	})
}

// tokens is a registry that wants Bearer tokens, and its token server. A token
// is good for the scopes that it spells and for a few requests only.
type tokens struct {
	http.Handler
	url string

	mu     sync.Mutex
	issued map[string]int // uses left
	count  int
}

func (s *tokens) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == "/token" {
		name, password, _ := req.BasicAuth()
		if name != "user" || password != secret {
			answer(401, `{"errors":[{"code":"UNAUTHORIZED","message":"wrong password"}]}`)(w, req)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.count++
		token := fmt.Sprintf("TOKEN-%d %s", s.count, strings.Join(req.URL.Query()["scope"], " "))
		s.issued["Bearer "+token] = 5
		json.NewEncoder(w).Encode(map[string]string{"token": token})
		return
	}
	action := "pull"
	switch req.Method {
	case http.MethodDelete:
		action = "delete"
	case http.MethodPost, http.MethodPut, http.MethodPatch:
		action = "push"
	}
	if strings.Contains(req.URL.Path, "/blobs/uploads/") {
		action = "push"
	}
	token := req.Header.Get("Authorization")
	s.mu.Lock()
	ok := s.issued[token] > 0 && (strings.Contains(token, action) || strings.Contains(token, "registry:catalog:*"))
	if ok {
		s.issued[token]--
	}
	s.mu.Unlock()
	if !ok {
		answer(401, "", "WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="test"`, s.url))(w, req)
		return
	}
	s.Handler.ServeHTTP(w, req)
}

func newTokens(t *testing.T, handler http.Handler) (*tokens, *httptest.Server) {
	s := &tokens{Handler: handler, issued: map[string]int{}}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	s.url = server.URL
	return s, server
}

// useAll pushes, reads, lists and deletes.
func useAll(ctx context.Context, reg *remote.Registry) error {
	for range 4 { // tokens run out meanwhile
		_, err := reg.PushBlob(ctx, "some/repo", oci.Descriptor{Digest: blobDigest, Size: int64(len(blob))}, bytes.NewReader(blob))
		if err != nil {
			return err
		}
		r, err := reg.GetBlob(ctx, "some/repo", blobDigest)
		if err != nil {
			return err
		}
		got, err := io.ReadAll(r)
		r.Close()
		if err != nil {
			return err
		}
		if !bytes.Equal(got, blob) {
			return fmt.Errorf("read %q", got)
		}
		if _, err := reg.PushManifest(ctx, "some/repo", "tag", oci.MediaTypeIndex, []byte(emptyIndex)); err != nil {
			return err
		}
		u, err := reg.StartUpload(ctx, "some/repo")
		if err != nil {
			return err
		}
		for range 5 {
			if err := u.Append(ctx, u.Size(), bytes.NewReader(blob)); err != nil {
				return err
			}
		}
		if _, err := u.Commit(ctx, oci.DigestOf(bytes.Repeat(blob, 5))); err != nil {
			return err
		}
		if err := listError(reg.Repositories(ctx, "")); err != nil {
			return err
		}
		if err := reg.DeleteTag(ctx, "some/repo", "tag"); err != nil {
			return err
		}
	}
	return nil
}

func TestBasic(t *testing.T) {
	reg := serve(t, basic(inMemory()), remote.Options{Credentials: user})
	if err := useAll(t.Context(), reg); err != nil {
		t.Error(err)
	}
}

func TestBearer(t *testing.T) {
	s, server := newTokens(t, inMemory())
	reg := connect(t, server, remote.Options{Credentials: user})
	if err := useAll(t.Context(), reg); err != nil {
		t.Error(err)
	}
	if s.count < 10 || s.count > 40 {
		t.Errorf("%d tokens were fetched: want them kept, and renewed when they have run out", s.count)
	}
}

func TestBusyTokenServer(t *testing.T) {
	s, server := newTokens(t, inMemory())
	var asked atomic.Int32
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token" && asked.Add(1) < 3:
			w.WriteHeader(http.StatusTooManyRequests)
		default:
			server.Config.Handler.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(front.Close)
	s.url = front.URL
	reg := connect(t, front, remote.Options{Credentials: user})
	if _, err := reg.ResolveManifest(t.Context(), "some/repo", "tag"); !errors.Is(err, oci.ErrNameUnknown) && !errors.Is(err, oci.ErrManifestUnknown) || asked.Load() != 3 {
		t.Errorf("a read: %v after %d attempts, want that it isn't there after 3", err, asked.Load())
	}
}

func TestUnauthorized(t *testing.T) {
	wrong := func(context.Context, string) (remote.Credential, error) {
		return remote.Credential{Username: "user", Password: "wr0ng-S3CRET"}, nil
	}
	broken := func(context.Context, string) (remote.Credential, error) {
		return remote.Credential{}, errors.New("the helper is broken")
	}
	_, bearer := newTokens(t, inMemory())
	basicServer := httptest.NewServer(basic(inMemory()))
	t.Cleanup(basicServer.Close)
	always := httptest.NewServer(answer(401, "", "WWW-Authenticate", `Bearer realm="`+bearer.URL+`/token",scope="repository:some/repo:pull"`))
	t.Cleanup(always.Close)
	elsewhere := httptest.NewServer(answer(401, "", "WWW-Authenticate", `Bearer realm="http://169.254.169.254/token"`))
	t.Cleanup(elsewhere.Close)
	for name, test := range map[string]struct {
		server      *httptest.Server
		credentials remote.CredentialFunc
		want        string
		code        error
	}{
		"basic, none":      {basicServer, remote.Anonymous, "user name", oci.ErrUnauthorized},
		"basic, wrong":     {basicServer, wrong, "401", oci.ErrUnauthorized},
		"basic, broken":    {basicServer, broken, "the helper is broken", nil},
		"bearer, none":     {bearer, remote.Anonymous, "no token", oci.ErrUnauthorized},
		"bearer, wrong":    {bearer, wrong, "wrong password", oci.ErrUnauthorized},
		"bearer, broken":   {bearer, broken, "the helper is broken", nil},
		"bearer, never":    {always, user, "401", oci.ErrUnauthorized},
		"realm of a cloud": {elsewhere, user, "blocked", nil},
	} {
		var log bytes.Buffer
		reg := connect(t, test.server, remote.Options{
			Credentials: test.credentials,
			Log:         slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		})
		_, err := reg.GetManifest(t.Context(), "some/repo", "tag")
		checkMessage(t, name, err, reg, test.want)
		if test.code != nil && !errors.Is(err, test.code) {
			t.Errorf("%s: error %v is not %v", name, err, test.code)
		}
		for _, s := range []string{"S3CRET", secret, "TOKEN"} {
			if strings.Contains(fmt.Sprint(err)+log.String(), s) {
				t.Errorf("%s: the secret %q is shown in %q or the log %q", name, s, err, log.String())
			}
		}
	}
}

// Redirects to an object store work, and don't take credentials along.
func TestRedirectDropsCredentials(t *testing.T) {
	var seen sync.Map
	store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if a := req.Header.Get("Authorization"); a != "" {
			seen.Store("Authorization", a)
		}
		if req.URL.Query().Get("sig") != "SIGNATURE" {
			answer(403, "")(w, req)
			return
		}
		if req.URL.Path == "/broken" {
			panic(http.ErrAbortHandler)
		}
		http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(blob))
	}))
	t.Cleanup(store.Close)
	target := "/good"
	reg := serve(t, basic(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		http.Redirect(w, req, store.URL+target+"?sig=SIGNATURE", http.StatusTemporaryRedirect)
	})), remote.Options{Credentials: user, Retries: -1})
	r, err := reg.GetBlobRange(t.Context(), "some/repo", blobDigest, 20, 30)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	r.Close()
	if err != nil || !bytes.Equal(got, blob[20:50]) {
		t.Errorf("got %q, %v", got, err)
	}
	if a, ok := seen.Load("Authorization"); ok {
		t.Errorf("the store was sent the credentials %q", a)
	}
	target = "/broken"
	_, err = reg.GetBlob(t.Context(), "other/repo", blobDigest)
	if err == nil || !strings.Contains(err.Error(), "other/repo at "+reg.Host()) {
		t.Errorf("broken store: %v", err)
	}
	if strings.Contains(fmt.Sprint(err), "SIGNATURE") {
		t.Errorf("the signature is shown in %v", err)
	}
}

func TestDockerCredentials(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	if c, err := remote.DockerCredentials(t.Context(), "reg.example.com"); err != nil || c != (remote.Credential{}) {
		t.Errorf("without a configuration: %v, %v", c, err)
	}
	config := `{"auths":{"reg.example.com:5000":{"auth":"dXNlcjpwYXNz"},"https://index.docker.io/v1/":{"auth":"aHViOnB3"},"tok.example.com":{"identitytoken":"T"}}}`
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]remote.Credential{
		"reg.example.com:5000": {Username: "user", Password: "pass"},
		"docker.io":            {Username: "hub", Password: "pw"},
		"tok.example.com":      {RefreshToken: "T"},
		"reg.example.com":      {},
	} {
		if got, err := remote.DockerCredentials(t.Context(), host); err != nil || got != want {
			t.Errorf("%s: user %q, %v", host, got.Username, err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := remote.DockerCredentials(t.Context(), "docker.io"); err == nil {
		t.Error("a broken configuration is not reported")
	}
	t.Setenv("DOCKER_CONFIG", "")
	t.Setenv("HOME", "")
	if c, err := remote.DockerCredentials(t.Context(), "docker.io"); err != nil || c != (remote.Credential{}) {
		t.Errorf("without a home: %v, %v", c, err)
	}
}
