package auth_test

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"sluice/internal/auth"
	"sluice/internal/storage"
	"sluice/oci"
)

func TestTokenServer(t *testing.T) {
	b := open(t, new(storage.Memory), newClock(), nil)
	b.scopeMap("reader", "repositories/own/content/read")
	ci := b.token("ci", "reader")
	good := url.Values{"grant_type": {"password"}, "service": {host}, "username": {"ci"}, "password": {ci}, "scope": {"repository:own:pull,push"}, "client_id": {"x"}}
	with := func(pairs ...string) url.Values {
		v := url.Values{}
		for k, values := range good {
			v[k] = values
		}
		for i := 0; i < len(pairs); i += 2 {
			v[pairs[i]] = []string{pairs[i+1]}
		}
		return v
	}
	for _, test := range []struct {
		name   string
		form   url.Values
		status int
		code   string
	}{
		{"good", good, 200, ""},
		{"no service", with("service", ""), 200, ""},
		{"other service", with("service", "x"), 400, "invalid_request"},
		{"bad scope", with("scope", "repository:UPPER:pull"), 400, "invalid_scope"},
		{"bad grant", with("grant_type", "client_credentials"), 400, "unsupported_grant_type"},
		{"wrong password", with("password", "x"), 401, "invalid_grant"},
		{"empty password", with("password", ""), 401, "invalid_grant"},
		{"long password", with("password", strings.Repeat("x", 1000)), 401, "invalid_grant"},
		{"unknown user", with("username", "nobody"), 401, "invalid_grant"},
		{"hostile user", with("username", "../../etc/passwd\x00\n"), 401, "invalid_grant"},
		{"refresh token", with("grant_type", "refresh_token", "refresh_token", "x"), 401, "invalid_grant"},
		{"nothing", url.Values{}, 400, "unsupported_grant_type"},
	} {
		a := b.post("/oauth2/token", test.form)
		if a.status != test.status || a.Error != test.code || (a.AccessToken != "") != (test.status == 200) {
			t.Errorf("%s: %d %s", test.name, a.status, a.body)
		}
		if test.status != 200 && (a.Description == "" || len(a.Errors) != 1 || a.Errors[0].Code == "" || a.Errors[0].Message == "") {
			t.Errorf("%s: %s: not both forms of an error", test.name, a.body)
		}
		if a.header.Get("Cache-Control") != "no-store" || a.header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %v", test.name, a.header)
		}
	}
	// What is wrong with credentials isn't told.
	if a, c := b.post("/oauth2/token", with("password", "x")), b.post("/oauth2/token", with("username", "nobody")); a.body != c.body {
		t.Errorf("a wrong password is told from an unknown user: %s %s", a.body, c.body)
	}
	// A POST's secrets must be in its body.
	if a := b.serve(request("POST", "/oauth2/token?"+good.Encode(), url.Values{}, nothing)); a.status != 400 {
		t.Errorf("secrets in the query: %d", a.status)
	}
	for target, status := range map[string]int{
		"PUT /oauth2/token": 405, "DELETE /oauth2/exchange": 405, "GET /oauth2/exchange": 405, "POST /oauth2/keys": 405, "GET /oauth2/": 404,
		"GET /oauth2/token?scope=%zz": 400, "GET /oauth2/token?scope=x": 400, "GET /oauth2/keys": 200,
	} {
		method, path, _ := strings.Cut(target, " ")
		if a := b.serve(request(method, path, nil, nothing)); a.status != status || status == 405 && a.header.Get("Allow") == "" {
			t.Errorf("%s: %d %s", target, a.status, a.body)
		}
	}
	for name, header := range map[string]string{"bearer": "Bearer x", "digest": "Digest x", "broken": "Basic !", "bare": "Basic"} {
		a := b.get(func(r *http.Request) { r.Header.Set("Authorization", header) })
		if a.status != 401 || a.header.Get("WWW-Authenticate") == "" {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
	many := make([]string, 65)
	for i := range many {
		many[i] = "repository:r" + strings.Repeat("x", i) + ":pull"
	}
	if a := b.get(basic("admin", adminPw), many...); a.status != 400 {
		t.Errorf("65 scopes: %d", a.status)
	}
	// The largest token that can be had is one that is taken.
	for i := range 64 {
		many[i] = "repository:" + strings.Repeat("x", 200+i%2) + "/" + strings.Repeat("y", i%50+1) + ":pull,push,delete,metadata_read,metadata_write"
	}
	if _, err := b.who(bearerToken(b.access(basic("admin", adminPw), many[:64]...))); err != nil {
		t.Errorf("a token of 64 scopes: %v", err)
	}
}

func published(t *testing.T, b *bed) jose.JSONWebKeySet {
	t.Helper()
	w := httptest.NewRecorder()
	b.ServeHTTP(w, request("GET", "/oauth2/keys", nil, nothing))
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(w.Body.Bytes(), &set); err != nil || w.Code != 200 {
		t.Fatalf("keys: %d %v", w.Code, err)
	}
	for _, k := range set.Keys {
		if !k.IsPublic() || strings.Contains(w.Body.String(), `"d":`) {
			t.Fatalf("a private key is published: %s", w.Body)
		}
	}
	return set
}

// Anybody can verify our tokens with what is published.
func TestPublishedKeys(t *testing.T) {
	b := open(t, new(storage.Memory), newClock(), nil)
	token := b.access(basic("admin", adminPw), "repository:x:pull")
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jws.Verify(published(t, b)); err != nil {
		t.Error(err)
	}
}

func TestKeyRotation(t *testing.T) {
	store, c := new(storage.Memory), newClock()
	a, b := open(t, store, c, nil), open(t, store, c, nil)
	admin := basic("admin", adminPw)
	kid := func(token string) string {
		var h struct{ Kid string }
		decodePart(t, token, 0, &h)
		return h.Kid
	}
	valid := func(what string, token string, want bool) {
		t.Helper()
		for _, x := range []*bed{a, b} {
			if _, err := x.who(bearerToken(token)); (err == nil) != want {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	first := a.access(admin)
	if other := b.access(admin); kid(other) != kid(first) {
		t.Error("two replicas sign with different keys")
	}
	valid("first", first, true)

	c.Advance(30*24*time.Hour - time.Minute)
	before := b.access(admin)
	c.Advance(time.Minute)
	after := a.access(admin)
	if kid(before) != kid(first) || kid(after) == kid(first) {
		t.Error("a key signs for other than 30 days")
	}
	valid("signed by the old key", before, true)
	valid("signed by the new key, which the other replica hasn't seen", after, true)
	if n := len(published(t, a).Keys); n != 2 {
		t.Errorf("%d keys are published", n)
	}

	// The old one's private part goes first, then all of it.
	c.Advance(16 * time.Minute)
	maintain(t, a)
	valid("old key, public", before, true)
	if n := countPrivate(t, store); n != 1 {
		t.Errorf("%d private keys in the storage", n)
	}
	c.Advance(3 * time.Hour)
	maintain(t, a)
	maintain(t, b)
	if n := len(published(t, b).Keys); n != 1 {
		t.Errorf("%d keys are published when all old tokens have expired", n)
	}
	// Two at once do no harm.
	c.Advance(31 * 24 * time.Hour)
	done := make(chan string)
	for _, x := range []*bed{a, b, a, b} {
		go func() { done <- x.get(admin).AccessToken }()
	}
	for range 4 {
		valid("signed while two replicas rotate", <-done, true)
	}
	c.Advance(2 * time.Minute)
	if kid(a.access(admin)) != kid(b.access(admin)) {
		t.Error("two replicas don't agree on the newest key")
	}

	// A key that is taken out of the storage is distrusted.
	stolen := a.access(admin)
	if err := store.Delete(t.Context(), "registry/keys/"+kid(stolen)); err != nil {
		t.Fatal(err)
	}
	c.Advance(2 * time.Minute)
	valid("withdrawn key", stolen, false)
	valid("the next one", a.access(admin), true)
}

// maintain is one turn of Run.
func maintain(t *testing.T, b *bed) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { b.Run(ctx) })
		synctest.Wait() // until it waits for the next
		cancel()
		running.Wait()
	})
}

func countPrivate(t *testing.T, store storage.Store) int {
	t.Helper()
	n := 0
	for key, err := range store.List(t.Context(), "registry/keys/", "") {
		if err != nil {
			t.Fatal(err)
		}
		data, err := storage.ReadAll(t.Context(), store, key, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(data), `"d":`) {
			n++
		}
	}
	return n
}

// What lies in the storage isn't trusted either.
func TestDamagedKeys(t *testing.T) {
	ctx, store := t.Context(), new(storage.Memory)
	b := open(t, store, newClock(), nil)
	good := b.access(basic("admin", adminPw))
	var kid struct{ Kid string }
	decodePart(t, good, 0, &kid)
	data, err := storage.ReadAll(ctx, store, "registry/keys/"+kid.Kid, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"a": "garbage", "b": "{}", "c": string(data), strings.Repeat("0", 32): string(data), "d": `{"created":"2030-01-01T00:00:00Z","key":{"kty":"oct","k":"AAAA","kid":"d","alg":"HS256"}}`,
	} {
		if err := store.Put(ctx, "registry/keys/"+name, []byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	again := open(t, store, b.clock, nil)
	if _, err := again.who(bearerToken(good)); err != nil {
		t.Error(err)
	}
	if n := len(published(t, again).Keys); n != 1 {
		t.Errorf("%d keys", n)
	}
}

// counted is a Store that counts how often it is listed.
type counted struct {
	storage.Store
	lists atomic.Int32
}

func (c *counted) List(ctx context.Context, prefix, after string) iter.Seq2[string, error] {
	c.lists.Add(1)
	return c.Store.List(ctx, prefix, after)
}

// Whoever makes up key IDs doesn't have the storage read for each.
func TestUnknownKeysAreLookedForSeldom(t *testing.T) {
	store := &counted{Store: new(storage.Memory)}
	b := open(t, store, newClock(), nil)
	before := store.lists.Load()
	for i := range 500 {
		token := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"alg":"ES256","kid":"%032x"}`, i)) + ".e30.AAAA"
		if _, err := b.who(bearerToken(token)); !errors.Is(err, oci.ErrUnauthorized) {
			t.Fatal(err)
		}
	}
	if n := store.lists.Load() - before; n < 1 || n > 20 {
		t.Errorf("500 unknown keys: the storage was listed %d times", n)
	}
}

func TestForgedTokens(t *testing.T) {
	store, c := new(storage.Memory), newClock()
	b := open(t, store, c, nil)
	good := b.access(basic("admin", adminPw), "repository:x:*")
	parts := strings.Split(good, ".")
	set := published(t, b)
	encode := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	public, err := json.Marshal(set.Keys[0])
	if err != nil {
		t.Fatal(err)
	}
	hs256 := encode(`{"alg":"HS256","typ":"JWT","kid":"`+set.Keys[0].KeyID+`"}`) + "." + parts[1]
	mac := hmac.New(sha256.New, public)
	mac.Write([]byte(hs256))

	stranger := open(t, new(storage.Memory), c, nil) // an Authority with keys of its own
	flipped := []byte(good)
	flipped[len(parts[0])+10] ^= 1
	for name, token := range map[string]string{
		"alg none":           encode(`{"alg":"none","kid":"`+set.Keys[0].KeyID+`"}`) + "." + parts[1] + ".",
		"alg none, signed":   encode(`{"alg":"none","kid":"`+set.Keys[0].KeyID+`"}`) + "." + parts[1] + "." + parts[2],
		"HMAC by public key": hs256 + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil)),
		"no signature":       parts[0] + "." + parts[1] + ".",
		"no kid":             encode(`{"alg":"ES256"}`) + "." + parts[1] + "." + parts[2],
		"wrong kid":          encode(`{"alg":"ES256","kid":"`+strings.Repeat("0", 32)+`"}`) + "." + parts[1] + "." + parts[2],
		"path as kid":        encode(`{"alg":"ES256","kid":"../tokens/ci"}`) + "." + parts[1] + "." + parts[2],
		"own key in header":  encode(`{"alg":"ES256","kid":"`+set.Keys[0].KeyID+`","jwk":`+string(public)+`}`) + "." + parts[1] + "." + parts[2],
		"other claims":       parts[0] + "." + encode(`{"sub":"admin"}`) + "." + parts[2],
		"flipped bit":        string(flipped),
		"stranger's":         stranger.access(basic("admin", adminPw), "repository:x:*"),
		"oversized":          good + strings.Repeat("A", 40<<10),
		"empty":              "",
		"two":                good + "." + good,
	} {
		if _, err := b.who(bearerToken(token)); !errors.Is(err, oci.ErrUnauthorized) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := b.who(basic(nullGUID, token)); !errors.Is(err, oci.ErrUnauthorized) {
			t.Errorf("%s, as a refresh token: %v", name, err)
		}
	}
	if _, err := b.who(bearerToken(good)); err != nil {
		t.Error(err)
	}
	renamed := open(t, store, c, func(o *auth.Options) { o.Issuer = "else" })
	if _, err := renamed.who(bearerToken(good)); !errors.Is(err, oci.ErrUnauthorized) {
		t.Errorf("another issuer's, of the same keys: %v", err)
	}
}

func FuzzBearer(f *testing.F) {
	f.Add("a.b.c")
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add(strings.Repeat("A", 100) + "..")
	a, err := auth.Open(f.Context(), new(storage.Memory), auth.Options{HashCost: 4})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, token string) {
		if _, err := a.Authenticate(request("GET", "/v2/", nil, bearerToken(token))); !errors.Is(err, oci.ErrUnauthorized) {
			t.Errorf("%q: %v", token, err)
		}
	})
}

func FuzzForm(f *testing.F) {
	f.Add("/oauth2/token", "grant_type=password&username=a&password=b&scope=repository:a:pull")
	f.Add("/oauth2/token", "grant_type=refresh_token&refresh_token=a.b.c")
	f.Add("/oauth2/exchange", "grant_type=access_token&access_token=a.b.c&tenant=x&service=r")
	f.Add("/oauth2/keys", "%zz=;&&")
	a, err := auth.Open(f.Context(), new(storage.Memory), auth.Options{HashCost: 4})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, path, body string) {
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body))
		r.URL.Path = path
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		w := httptest.NewRecorder()
		a.ServeHTTP(w, r)
		var doc struct {
			Error       string
			AccessToken string `json:"access_token"`
		}
		if w.Code < 400 || w.Code >= 500 || json.Unmarshal(w.Body.Bytes(), &doc) != nil || doc.Error == "" || doc.AccessToken != "" {
			t.Errorf("POST %q %q: %d %s", path, body, w.Code, w.Body)
		}
	})
}
