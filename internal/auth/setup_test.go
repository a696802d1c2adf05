package auth_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/auth"
	"sluice/internal/storage"
)

const (
	host     = "r.example.com:5000"
	nullGUID = "00000000-0000-0000-0000-000000000000"
	adminPw  = "correct horse battery staple"
)

// clock is a time that only the test moves.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// logTo sends an Authority's log to the test, and fails it if a secret is in.
type logTo struct {
	t       *testing.T
	mu      sync.Mutex
	secrets []string
}

func (l *logTo) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.secrets {
		if strings.Contains(string(p), s) {
			l.t.Errorf("a secret is in the log: %s", p)
		}
	}
	return len(p), nil
}

func (l *logTo) hide(secret string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.secrets = append(l.secrets, secret)
	return secret
}

// bed is an Authority under test.
type bed struct {
	*auth.Authority
	t     *testing.T
	clock *clock
	log   *logTo
}

// open opens an Authority with an admin user, cheap hashes, and public/… open
// to all.
func open(t *testing.T, store storage.Store, c *clock, change func(*auth.Options)) *bed {
	t.Helper()
	log := &logTo{t: t, secrets: []string{adminPw}}
	opts := auth.Options{
		Admin:         auth.Admin{Enabled: true, Password: adminPw},
		AnonymousPull: func(_ context.Context, repo string) bool { return strings.HasPrefix(repo, "public/") },
		HashCost:      4, Now: c.Now, Log: slog.New(slog.NewTextHandler(log, nil)),
	}
	if change != nil {
		change(&opts)
	}
	a, err := auth.Open(t.Context(), store, opts)
	if err != nil {
		t.Fatal(err)
	}
	return &bed{Authority: a, t: t, clock: c, log: log}
}

// token makes an account and its first password.
func (b *bed) token(name, scopeMap string) string {
	b.t.Helper()
	if _, err := b.CreateToken(b.t.Context(), auth.Token{Name: name, ScopeMap: scopeMap}); err != nil {
		b.t.Fatal(err)
	}
	secret, err := b.GeneratePassword(b.t.Context(), name, 1, time.Time{})
	if err != nil {
		b.t.Fatal(err)
	}
	return b.log.hide(secret)
}

func (b *bed) scopeMap(name string, actions ...string) {
	b.t.Helper()
	if _, err := b.CreateScopeMap(b.t.Context(), auth.ScopeMap{Name: name, Actions: actions}); err != nil {
		b.t.Fatal(err)
	}
}

// credentials puts credentials into a request.
type credentials func(*http.Request)

func basic(user, password string) credentials {
	return func(r *http.Request) { r.SetBasicAuth(user, password) }
}

func bearerToken(token string) credentials {
	return func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) }
}

func nothing(*http.Request) {}

func request(method, target string, form url.Values, with credentials) *http.Request {
	var r *http.Request
	if form == nil {
		r = httptest.NewRequest(method, target, nil)
	} else {
		r = httptest.NewRequest(method, target, strings.NewReader(form.Encode()))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	r.Host, r.RemoteAddr = host, "192.0.2.1:1234"
	with(r)
	return r
}

// answer is what the token server says.
type answer struct {
	status      int
	header      http.Header
	body        string
	AccessToken string `json:"access_token"`
	Token       string `json:"token"`
	Refresh     string `json:"refresh_token"`
	ExpiresIn   int    `json:"expires_in"`
	Scope       string `json:"scope"`
	Error       string `json:"error"`
	Description string `json:"error_description"`
	Errors      []struct{ Code, Message string }
}

func (b *bed) serve(r *http.Request) answer {
	b.t.Helper()
	w := httptest.NewRecorder()
	b.ServeHTTP(w, r)
	a := answer{status: w.Code, header: w.Header(), body: w.Body.String()}
	if err := json.Unmarshal(w.Body.Bytes(), &a); err != nil {
		b.t.Fatalf("%s %s answered %q: %v", r.Method, r.URL.Path, w.Body, err)
	}
	b.log.hide(a.AccessToken + a.Refresh + "…") // a whole one would be logged with more around it
	return a
}

// get asks for a token as docker does.
func (b *bed) get(with credentials, scopes ...string) answer {
	b.t.Helper()
	q := url.Values{"service": {host}, "scope": scopes}
	return b.serve(request("GET", "/oauth2/token?"+q.Encode(), nil, with))
}

// access is get for one who must succeed.
func (b *bed) access(with credentials, scopes ...string) string {
	b.t.Helper()
	a := b.get(with, scopes...)
	if a.status != http.StatusOK || a.AccessToken == "" || a.Token != a.AccessToken {
		b.t.Fatalf("token for %v: %d %s", scopes, a.status, a.body)
	}
	return a.AccessToken
}

func (b *bed) post(path string, form url.Values) answer {
	b.t.Helper()
	return b.serve(request("POST", path, form, nothing))
}

// who authenticates a request to the registry itself.
func (b *bed) who(with credentials) (auth.Caller, error) {
	return b.Authenticate(request("GET", "/v2/", nil, with))
}

// claimsOf decodes a token's claims without looking at its signature.
func claimsOf(t *testing.T, token string) map[string]any {
	t.Helper()
	var c map[string]any
	decodePart(t, token, 1, &c)
	return c
}
