package auth_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"sluice/internal/auth"
	"sluice/internal/storage"
	"sluice/oci"
)

// issuer is an OpenID provider with keys that rotate.
type issuer struct {
	t      *testing.T
	server *httptest.Server

	mu      sync.Mutex
	keys    []jose.JSONWebKey // published; the last signs
	made    int
	fetches int // of the keys
	down    bool
}

func newIssuer(t *testing.T) *issuer {
	i := &issuer{t: t}
	i.rotate(1)
	i.server = httptest.NewServer(http.HandlerFunc(i.serve))
	t.Cleanup(i.server.Close)
	return i
}

// rotate makes a new key and keeps so many.
func (i *issuer) rotate(keep int) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		i.t.Fatal(err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.made++
	i.keys = append(i.keys, jose.JSONWebKey{Key: private, KeyID: fmt.Sprintf("key-%d", i.made), Algorithm: "ES256", Use: "sig"})
	i.keys = i.keys[max(0, len(i.keys)-keep):]
}

func (i *issuer) serve(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	defer i.mu.Unlock()
	var doc any
	switch {
	case i.down:
		http.Error(w, "down", http.StatusInternalServerError)
		return
	case r.URL.Path == "/.well-known/openid-configuration":
		doc = map[string]any{"issuer": i.server.URL, "jwks_uri": i.server.URL + "/keys", "id_token_signing_alg_values_supported": []string{"ES256"}}
	case r.URL.Path == "/keys":
		i.fetches++
		set := jose.JSONWebKeySet{}
		for _, k := range i.keys {
			set.Keys = append(set.Keys, k.Public())
		}
		doc = set
	default:
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(doc)
}

// sign signs any claims with the newest key, or one of another ID.
func (i *issuer) sign(claims map[string]any, kid string) string {
	i.t.Helper()
	i.mu.Lock()
	key := i.keys[len(i.keys)-1]
	i.mu.Unlock()
	if kid != "" {
		key.KeyID = kid
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, nil)
	if err != nil {
		i.t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		i.t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		i.t.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		i.t.Fatal(err)
	}
	return token
}

func (i *issuer) claims(c *clock, sub string) map[string]any {
	now := c.Now().Unix()
	return map[string]any{"iss": i.server.URL, "aud": []string{"else", "sluice"}, "sub": sub, "tid": "some-tenant", "iat": now, "nbf": now, "exp": now + 600}
}

func (i *issuer) token(c *clock, sub string) string { return i.sign(i.claims(c, sub), "") }

func (i *issuer) config() []auth.Issuer {
	return []auth.Issuer{{URL: i.server.URL, Audience: "sluice", Rules: []auth.Rule{
		{Claims: map[string]string{"sub": "system:serviceaccount:ns:reader"}, ScopeMap: "reader"},
		{Claims: map[string]string{"sub": "system:serviceaccount:kube-system:*"}, ScopeMap: auth.MapAdmin},
		{Claims: map[string]string{"roles": "Registry.Push", "oid": "*"}, ScopeMap: auth.MapPush},
	}}}
}

func (b *bed) exchange(token string) answer {
	b.t.Helper()
	return b.post("/oauth2/exchange", url.Values{"grant_type": {"access_token"}, "service": {host}, "tenant": {"asked-tenant"}, "access_token": {token}})
}

// exchanged is exchange for a token that must be good.
func (b *bed) exchanged(token string) string {
	b.t.Helper()
	a := b.exchange(token)
	if a.status != http.StatusOK || a.Refresh == "" || a.AccessToken != "" {
		b.t.Fatalf("exchange: %d %s", a.status, a.body)
	}
	return a.Refresh
}

func TestExchange(t *testing.T) {
	i, other, c := newIssuer(t), newIssuer(t), newClock()
	b := open(t, new(storage.Memory), c, func(o *auth.Options) { o.Exchange = i.config() })
	with := func(change func(map[string]any)) string {
		claims := i.claims(c, "system:serviceaccount:kube-system:x")
		change(claims)
		return i.sign(claims, "")
	}
	now := c.Now().Unix()
	tests := map[string]struct {
		token string
		ok    bool
	}{
		"good":               {with(func(map[string]any) {}), true},
		"one audience":       {with(func(m map[string]any) { m["aud"] = "sluice" }), true},
		"role in a list":     {with(func(m map[string]any) { m["sub"], m["oid"], m["roles"] = "x", "1", []string{"A", "Registry.Push"} }), true},
		"role without oid":   {with(func(m map[string]any) { m["sub"], m["roles"] = "x", []string{"Registry.Push"} }), false},
		"exactly the prefix": {with(func(m map[string]any) { m["sub"] = "system:serviceaccount:kube-system" }), false},
		"no rule":            {with(func(m map[string]any) { m["sub"] = "system:serviceaccount:ns:other" }), false},
		"longer than a rule": {with(func(m map[string]any) { m["sub"] = "system:serviceaccount:ns:reader2" }), false},
		"sub is a list":      {with(func(m map[string]any) { m["sub"] = []string{"system:serviceaccount:ns:reader", "x"} }), false},
		"other audience":     {with(func(m map[string]any) { m["aud"] = "else" }), false},
		"no audience":        {with(func(m map[string]any) { delete(m, "aud") }), false},
		"expired":            {with(func(m map[string]any) { m["exp"] = now - 1 }), false},
		"never expires":      {with(func(m map[string]any) { delete(m, "exp") }), false},
		"not yet":            {with(func(m map[string]any) { m["nbf"] = now + 3600 }), false},
		"other issuer":       {with(func(m map[string]any) { m["iss"] = other.server.URL }), false},
		"not our issuer":     {other.token(c, "system:serviceaccount:kube-system:x"), false},
		"other's signature":  {other.sign(i.claims(c, "system:serviceaccount:kube-system:x"), ""), false},
		"unknown key":        {i.sign(i.claims(c, "system:serviceaccount:kube-system:x"), "nokey"), false},
		"garbage":            {"garbage", false},
		"no claims":          {i.sign(nil, ""), false},
	}
	for name, test := range tests {
		a := b.exchange(test.token)
		if ok := a.status == http.StatusOK && a.Refresh != ""; ok != test.ok {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
		if !test.ok && (a.status != http.StatusUnauthorized || a.Error != "invalid_grant" || strings.Contains(a.body, "issuer")) {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
	for _, form := range []url.Values{
		{}, {"grant_type": {"password"}}, {"grant_type": {"refresh_token"}, "refresh_token": {"x"}},
		{"grant_type": {"access_token"}, "service": {"else"}, "access_token": {i.token(c, "system:serviceaccount:ns:reader")}},
		{"grant_type": {"access_token"}, "access_token": {strings.Repeat("x", 33<<10)}},
		{"grant_type": {"access_token"}, "access_token": {strings.Repeat("x", 200<<10)}},
	} {
		if a := b.post("/oauth2/exchange", form); a.status != http.StatusBadRequest || a.Error == "" {
			t.Errorf("exchange: %d %.200s", a.status, a.body)
		}
	}
	form := url.Values{"grant_type": {"access_token_refresh_token"}, "access_token": {i.token(c, "system:serviceaccount:kube-system:x")}, "refresh_token": {"x"}}
	if a := b.post("/oauth2/exchange", form); a.status != http.StatusOK {
		t.Errorf("the deprecated way: %d %s", a.status, a.body)
	}
}

// exchangedSoon is exchanged for a key that was just replaced: the library tells
// its callers of the keys it fetched before it remembers them and is ready to
// fetch again.
func (b *bed) exchangedSoon(token func() string) {
	b.t.Helper()
	for range 100 {
		if b.exchange(token()).status == http.StatusOK {
			return
		}
		time.Sleep(50 * time.Millisecond)
		b.clock.Advance(10 * time.Second) // the longest wait of an address
	}
	b.exchanged(token())
}

func TestIssuerRotatesKeys(t *testing.T) {
	i, c := newIssuer(t), newClock()
	b := open(t, new(storage.Memory), c, func(o *auth.Options) { o.Exchange = i.config() })
	const sub = "system:serviceaccount:kube-system:x"
	b.exchangedSoon(func() string { return i.token(c, sub) })
	claims := i.claims(c, sub)
	claims["exp"] = c.Now().Add(5 * time.Hour).Unix()
	old := i.sign(claims, "")
	i.rotate(2)
	b.exchangedSoon(func() string { return i.token(c, sub) }) // a key it hasn't seen
	b.exchanged(old)                                          // still published
	next := i.sign(claims, "")
	i.rotate(1)
	b.exchangedSoon(func() string { return i.token(c, sub) })
	withdrawn := b.exchange(old)
	for deadline := time.Now().Add(time.Minute); withdrawn.status == http.StatusOK && time.Now().Before(deadline); withdrawn = b.exchange(old) {
		time.Sleep(time.Millisecond)
	}
	if withdrawn.status != http.StatusUnauthorized {
		t.Errorf("a key that is withdrawn: %d", withdrawn.status)
	}
	if a := b.exchange(next); a.status != http.StatusUnauthorized {
		t.Errorf("the next one, withdrawn too: %d", a.status)
	}
	// One is missed also if no new one comes.
	last := i.sign(claims, "")
	b.exchangedSoon(func() string { return last })
	i.rotate(1)
	c.Advance(time.Hour)
	if a := b.exchange(last); a.status != http.StatusUnauthorized {
		t.Errorf("withdrawn an hour ago: %d", a.status)
	}

	// Whoever makes key IDs up doesn't make us ask the issuer without end…
	i.mu.Lock()
	i.fetches = 0
	i.mu.Unlock()
	for n := range 60 {
		b.exchange(i.sign(i.claims(c, sub), fmt.Sprintf("made-up-%d", n)))
	}
	i.mu.Lock()
	if i.fetches > 15 {
		t.Errorf("60 unknown keys made %d requests", i.fetches)
	}
	i.mu.Unlock()
	// … nor does that stop a new one for long.
	i.rotate(1)
	c.Advance(20 * time.Second)
	b.exchangedSoon(func() string { return i.token(c, sub) })
}

func TestIssuerDown(t *testing.T) {
	i, c := newIssuer(t), newClock()
	i.down = true
	b := open(t, new(storage.Memory), c, func(o *auth.Options) { o.Exchange = i.config() })
	const sub = "system:serviceaccount:kube-system:x"
	for range 80 { // which are nobody's fault, and no wrong passwords
		if a := b.exchange(i.token(c, sub)); a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
			t.Fatalf("issuer down: %d %s", a.status, a.body)
		}
	}
	i.mu.Lock()
	i.down = false
	i.mu.Unlock()
	c.Advance(5 * time.Second)
	b.exchanged(i.token(c, sub))
	i.mu.Lock()
	i.down = true
	i.mu.Unlock()
	c.Advance(2 * time.Hour)
	b.exchanged(i.token(c, sub)) // by the keys known
}

func TestNameClaim(t *testing.T) {
	i, c := newIssuer(t), newClock()
	b := open(t, new(storage.Memory), c, func(o *auth.Options) {
		o.Exchange = i.config()
		o.Exchange[0].NameClaim = "oid"
	})
	for _, test := range []struct {
		oid  any
		name string
	}{{"an-app", "an-app"}, {[]string{"one", "two"}, ""}, {"", ""}, {7, ""}, {nil, ""}, {strings.Repeat("x", 1000), ""}} {
		claims := i.claims(c, "system:serviceaccount:kube-system:x")
		claims["oid"] = test.oid
		a := b.exchange(i.sign(claims, ""))
		who, _ := b.who(basic(nullGUID, a.Refresh))
		if ok := a.status == http.StatusOK; ok != (test.name != "") || ok && (who.Name != test.name || who.Kind != auth.KindFederated) {
			t.Errorf("oid %v: %d %s, %+v", test.oid, a.status, a.body, who)
		}
	}
}

// A rule that is taken out of the configuration takes the tokens with it.
func TestFederationEnds(t *testing.T) {
	i, c, store := newIssuer(t), newClock(), new(storage.Memory)
	b := open(t, store, c, func(o *auth.Options) { o.Exchange = i.config() })
	refresh := b.exchanged(i.token(c, "system:serviceaccount:kube-system:x"))
	access := b.access(basic(nullGUID, refresh), "repository:x:pull")
	b = open(t, store, c, func(o *auth.Options) {
		o.Exchange = i.config()
		o.Exchange[0].Rules = o.Exchange[0].Rules[:1]
	})
	for _, with := range []credentials{basic(nullGUID, refresh), bearerToken(access)} {
		if _, err := b.who(with); !errors.Is(err, oci.ErrUnauthorized) {
			t.Errorf("a rule that is gone: %v", err)
		}
	}
}

func TestIssuerConfiguration(t *testing.T) {
	rules := []auth.Rule{{Claims: map[string]string{"sub": "x"}, ScopeMap: "m"}}
	for name, i := range map[string]auth.Issuer{
		"plain http":      {URL: "http://issuer.example.com", Audience: "a", Rules: rules},
		"no audience":     {URL: "https://issuer.example.com", Rules: rules},
		"no rules":        {URL: "https://issuer.example.com", Audience: "a"},
		"rule for all":    {URL: "https://issuer.example.com", Audience: "a", Rules: []auth.Rule{{ScopeMap: "m"}}},
		"rule of nothing": {URL: "https://issuer.example.com", Audience: "a", Rules: []auth.Rule{{Claims: map[string]string{"sub": "x"}}}},
		"inner wildcard":  {URL: "https://issuer.example.com", Audience: "a", Rules: []auth.Rule{{Claims: map[string]string{"sub": "x*y"}, ScopeMap: "m"}}},
	} {
		if _, err := auth.Open(t.Context(), new(storage.Memory), auth.Options{Exchange: []auth.Issuer{i}, HashCost: 4}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
