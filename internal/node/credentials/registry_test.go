package credentials_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
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

	"github.com/go-jose/go-jose/v4"

	"sluice/internal/auth"
	"sluice/internal/node/credentials"
	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/internal/storage"
	"sluice/oci"
	"sluice/oci/ocimem"
)

const index = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`

// server is a registry with accounts: repositories team/app and other/app.
type server struct {
	*httptest.Server
	*auth.Authority
	host  string
	ahead atomic.Int64 // of its clock, in nanoseconds
	cloud *cloud
}

// later lets time pass at the registry: tokens run out.
func (s *server) later(d time.Duration) { s.ahead.Add(int64(d)) }

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{cloud: newCloud(t)}
	s.cloud.now = func() time.Time { return time.Now().Add(time.Duration(s.ahead.Load())) }
	content := ocimem.New()
	for _, repo := range []string{"team/app", "other/app"} {
		if _, err := content.PushManifest(t.Context(), repo, "v1", oci.MediaTypeIndex, []byte(index)); err != nil {
			t.Fatal(err)
		}
	}
	var attempts atomic.Int64
	var err error
	s.Authority, err = auth.Open(t.Context(), &storage.Memory{}, auth.Options{
		HashCost: 4, Now: s.cloud.now, AccessLifetime: 5 * time.Minute,
		Exchange: []auth.Issuer{{URL: s.cloud.URL, Audience: "https://management.azure.com/", Rules: []auth.Rule{{Claims: map[string]string{"sub": "machine"}, ScopeMap: "reader"}}}},
		ClientAddress: func(*http.Request) string { // wrong passwords of one address are refused for a while
			n := attempts.Add(1)
			return fmt.Sprintf("10.%d.%d.%d", n>>16&255, n>>8&255, n&255)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.CreateScopeMap(t.Context(), auth.ScopeMap{Name: "reader", Actions: []string{"repositories/*/content/read"}}); err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/oauth2/", s.Authority)
	mux.Handle("/", registry.NewHandler(content, registry.Options{Authorizer: s.Authority}))
	s.Server = httptest.NewServer(mux)
	t.Cleanup(s.Close)
	s.host = strings.TrimPrefix(s.URL, "http://")
	return s
}

// account makes one that may read everything, and returns its password.
func (s *server) account(t *testing.T, name string) string {
	t.Helper()
	if _, err := s.CreateToken(t.Context(), auth.Token{Name: name, ScopeMap: "reader", Status: auth.Enabled}); err != nil {
		t.Fatal(err)
	}
	return s.change(t, name)
}

// change gives an account another password; the old one is worth nothing.
func (s *server) change(t *testing.T, name string) string {
	t.Helper()
	password, err := s.GeneratePassword(t.Context(), name, 1, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	return password
}

// read reads from a repository, as mounts do, with a client of its own.
func (s *server) read(t *testing.T, repo string, c *credentials.Chain) error {
	t.Helper()
	return readWith(t, s.client(t, repo, c), repo)
}

func (s *server) client(t *testing.T, repo string, c *credentials.Chain) *remote.Registry {
	t.Helper()
	r, err := remote.New(s.host, remote.Options{Credentials: c.For(s.host, repo)})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func readWith(t *testing.T, r *remote.Registry, repo string) error {
	_, err := r.GetManifest(t.Context(), repo, "v1")
	return err
}

// source returns whose credential is used for a repository.
func (s *server) source(t *testing.T, repo string, c *credentials.Chain) string {
	t.Helper()
	return s.status(t, repo, c).Source
}

func (s *server) status(t *testing.T, repo string, c *credentials.Chain) credentials.Status {
	t.Helper()
	for _, st := range c.Status() {
		if st.Host == s.host && st.Repository == repo {
			return st
		}
	}
	t.Fatalf("no status of %s: %+v", repo, c.Status())
	return credentials.Status{}
}

// cloud is Azure's metadata service of a machine with an identity, and the
// issuer of its tokens.
type cloud struct {
	*httptest.Server
	key jose.JSONWebKey
	now func() time.Time

	mu    sync.Mutex
	asked []*http.Request // for the machine's token
	says  string          // instead of a token, if not empty
	who   string          // the machine's name
}

func newCloud(t *testing.T) *cloud {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &cloud{key: jose.JSONWebKey{Key: private, KeyID: "k", Algorithm: "ES256", Use: "sig"}, now: time.Now, who: "machine"}
	c.Server = httptest.NewServer(c)
	t.Cleanup(c.Close)
	return c
}

func (c *cloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		reply(w, map[string]any{"issuer": c.URL, "jwks_uri": c.URL + "/keys", "id_token_signing_alg_values_supported": []string{"ES256"}})
	case "/keys":
		reply(w, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{c.key.Public()}})
	case "/metadata/identity/oauth2/token":
		c.asked = append(c.asked, r)
		if c.says != "" || r.Header.Get("Metadata") != "true" {
			w.WriteHeader(http.StatusBadRequest)
			reply(w, map[string]string{"error": "invalid_request", "error_description": c.says})
			return
		}
		reply(w, map[string]string{"access_token": c.token(r.URL.Query().Get("resource")), "token_type": "Bearer"})
	case "/tenant/oauth2/v2.0/token": // of the directory, for service principals
		c.asked = append(c.asked, r)
		if r.PostFormValue("grant_type") != "client_credentials" || r.PostFormValue("client_id") != "principal" || r.PostFormValue("client_secret") != "s3cret" {
			w.WriteHeader(http.StatusUnauthorized)
			reply(w, map[string]string{"error": "invalid_client", "error_description": "AADSTS7000215: Invalid client secret provided."})
			return
		}
		reply(w, map[string]string{"access_token": c.token(strings.TrimSuffix(r.PostFormValue("scope"), ".default")), "token_type": "Bearer"})
	default:
		http.NotFound(w, r)
	}
}

func (c *cloud) token(audience string) string {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: c.key}, nil)
	if err != nil {
		panic(err)
	}
	now := c.now()
	claims, _ := json.Marshal(map[string]any{"iss": c.URL, "sub": c.who, "aud": audience, "tid": "tenant", "iat": now.Unix(), "exp": now.Add(24 * time.Hour).Unix()})
	signed, err := signer.Sign(claims)
	if err != nil {
		panic(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		panic(err)
	}
	return text
}

func (c *cloud) requests() []*http.Request {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked
}

func reply(w http.ResponseWriter, doc any) { _ = json.NewEncoder(w).Encode(doc) }

// program writes a shell script.
func program(t *testing.T, name, script string) {
	t.Helper()
	write(t, name, "#!/bin/sh\n"+script)
	if err := os.Chmod(name, 0o755); err != nil {
		t.Fatal(err)
	}
}

// write writes a file as people change configuration: whole, at once.
func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name+".new", []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
}

// lines counts a file's lines.
func lines(t *testing.T, name string) int {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return bytes.Count(b, []byte("\n"))
}

// logged is a log that can be read.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func newLog() (*slog.Logger, *logged) {
	l := new(logged)
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug})), l
}

// running runs what the chain does in the background until the test ends.
func running(t *testing.T, c *credentials.Chain) *credentials.Chain {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { c.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return c
}
