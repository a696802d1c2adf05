package registry_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"sluice/internal/auth"
	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/internal/storage"
	"sluice/oci"
	"sluice/oci/ocimem"
)

// guarded is a server that asks who calls: repositories team/app, other/app and
// public/app, of which everybody may read the last.
type guarded struct {
	*httptest.Server
	authority *auth.Authority
	registry  oci.Registry
	log       *logBuffer
	issuer    *issuer
	metrics   *registry.Metrics
	ahead     atomic.Int64 // of the authority's clock
	visits    atomic.Int64 // if not 0, each request comes from an address of its own
}

const adminPassword = "correct horse"

func newGuarded(t *testing.T, limits registry.Limits) *guarded {
	t.Helper()
	g := &guarded{registry: ocimem.New(), issuer: newIssuer(t), metrics: registry.NewMetrics()}
	var err error
	g.authority, err = auth.Open(t.Context(), &storage.Memory{}, auth.Options{
		Service: "test", HashCost: 4, Admin: auth.Admin{Enabled: true, Password: adminPassword},
		Exchange: []auth.Issuer{{
			URL: g.issuer.URL, Audience: "registry", Rules: []auth.Rule{{Claims: map[string]string{"sub": "robot"}, ScopeMap: "full"}},
		}},
		ClientAddress: func(*http.Request) string {
			if g.visits.Load() == 0 {
				return "192.0.2.1"
			}
			n := g.visits.Add(1)
			return fmt.Sprintf("10.%d.%d.%d", n>>16&0xff, n>>8&0xff, n&0xff)
		},
		AnonymousPull: func(_ context.Context, repo string) bool { return repo == "public/app" },
		Now:           func() time.Time { return time.Now().Add(time.Duration(g.ahead.Load())) },
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, repo := range []string{"team/app", "other/app", "public/app"} {
		pushed(t, g.registry, repo, []byte(content+repo))
		if _, err := g.registry.PushManifest(t.Context(), repo, "v1", oci.MediaTypeIndex, []byte(emptyIndex)); err != nil {
			t.Fatal(err)
		}
	}
	log, lines := newLog()
	g.log = lines
	mux := http.NewServeMux()
	mux.Handle("/oauth2/", g.authority)
	mux.Handle("/", registry.NewHandler(g.registry, registry.Options{Authorizer: g.authority}))
	g.Server = httptest.NewServer(registry.Wrap(mux, registry.FrontOptions{Log: log, Authorizer: g.authority, Limits: limits, Metrics: g.metrics}))
	t.Cleanup(g.Close)
	return g
}

// account makes a token with rights such as "repositories/team/app/content/read"
// and returns its password.
func (g *guarded) account(t *testing.T, name string, rights ...string) string {
	t.Helper()
	if _, err := g.authority.CreateScopeMap(t.Context(), auth.ScopeMap{Name: name, Actions: rights}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.authority.CreateToken(t.Context(), auth.Token{Name: name, ScopeMap: name, Status: auth.Enabled}); err != nil {
		t.Fatal(err)
	}
	password, err := g.authority.GeneratePassword(t.Context(), name, 1, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	return password
}

// token asks the token server, with Basic credentials if there is a user, for
// an access token.
func (g *guarded) token(t *testing.T, user, password, scope string) string {
	t.Helper()
	query := url.Values{"service": {"test"}, "scope": {scope}}
	_, body := get(t, g.Client(), "GET", g.URL+"/oauth2/token?"+query.Encode(), visitor{user: user, password: password}.header()...)
	return tokenIn(t, body)
}

// refresh exchanges a token of the issuer for a refresh token.
func (g *guarded) refresh(t *testing.T) string {
	t.Helper()
	resp, err := http.PostForm(g.URL+"/oauth2/exchange", url.Values{
		"grant_type": {"access_token"}, "service": {"test"}, "access_token": {g.issuer.token(t, time.Now().Add(time.Duration(g.ahead.Load())))},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return tokenIn(t, string(body))
}

func tokenIn(t *testing.T, body string) string {
	t.Helper()
	var doc struct {
		Access  string `json:"access_token"`
		Refresh string `json:"refresh_token"`
	}
	if err := json.Unmarshal([]byte(body), &doc); err != nil || doc.Access+doc.Refresh == "" {
		t.Fatalf("no token: %s (%v)", body, err)
	}
	return doc.Access + doc.Refresh
}

// issuer is an OpenID provider of one subject, robot.
type issuer struct {
	*httptest.Server
	key *ecdsa.PrivateKey
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{key: key}
	i.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path == "/keys" {
			json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "1", Algorithm: "ES256", Use: "sig"}}})
			return
		}
		json.NewEncoder(w).Encode(map[string]any{
			"issuer": i.URL, "jwks_uri": i.URL + "/keys", "authorization_endpoint": i.URL + "/a", "token_endpoint": i.URL + "/t",
			"id_token_signing_alg_values_supported": []string{"ES256"},
		})
	}))
	t.Cleanup(i.Close)
	return i
}

func (i *issuer) token(t *testing.T, now time.Time) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: i.key, KeyID: "1"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	claims, err := json.Marshal(map[string]any{
		"iss": i.URL, "aud": "registry", "sub": "robot", "iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
	})
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(claims)
	if err != nil {
		t.Fatal(err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// visitor is a kind of caller, and what is expected of them.
type visitor struct {
	user, password string
	bearer         string
	bad            bool                // the credentials are not good
	rights         map[string][]string // actions by repository
	catalog        bool
}

func (v visitor) header() []string {
	switch {
	case v.bearer != "":
		return []string{"Authorization", "Bearer " + v.bearer}
	case v.user != "":
		r := http.Request{Header: http.Header{}}
		r.SetBasicAuth(v.user, v.password)
		return []string{"Authorization", r.Header.Get("Authorization")}
	}
	return nil
}

// may is what the table's answer should be.
func (v visitor) may(repo, action string) bool {
	switch {
	case v.bad:
		return false
	case action == "":
		return v.bearer != "" || v.user != ""
	case action == "catalog":
		return v.catalog
	case action == "pull" && repo == "public/app":
		return true
	}
	return slices.Contains(v.rights[repo], action)
}

// refusal is the status of what a visitor may not do.
func (v visitor) refusal() int {
	if !v.bad && v.bearer == "" && v.user != "" {
		return http.StatusForbidden
	}
	return http.StatusUnauthorized
}

func visitors(t *testing.T, g *guarded) map[string]visitor {
	const app = "repositories/team/app/"
	only := func(actions ...string) map[string][]string { return map[string][]string{"team/app": actions} }
	all := []string{"pull", "push", "delete"}
	everything := map[string][]string{"team/app": all, "other/app": all, "public/app": all, "team/none": all}
	full := g.account(t, "full", app+"content/read", app+"content/write", app+"content/delete", app+"metadata/read", app+"metadata/write")
	disabled := g.account(t, "disabled", app+"content/read")
	g.account(t, "expired", app+"content/read")
	expired, err := g.authority.GeneratePassword(t.Context(), "expired", 2, time.Now().Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	expiredToken := g.token(t, "full", full, "repository:team/app:pull")
	g.ahead.Store(int64(2 * time.Hour))
	if _, err := g.authority.UpdateToken(t.Context(), "disabled", func(t *auth.Token) error { t.Status = auth.Disabled; return nil }); err != nil {
		t.Fatal(err)
	}
	bearer := func(scope string) string { return g.token(t, "full", full, scope) }
	refresh := g.refresh(t)
	nobody := g.token(t, "", "", "repository:public/app:pull")
	adminToken := g.token(t, "admin", adminPassword, "registry:catalog:*")
	return map[string]visitor{
		"anonymous":      {},
		"reader":         {user: "reader", password: g.account(t, "reader", app+"content/read"), rights: only("pull")},
		"writer":         {user: "writer", password: g.account(t, "writer", app+"content/write"), rights: only("push")},
		"deleter":        {user: "deleter", password: g.account(t, "deleter", app+"content/delete"), rights: only("delete")},
		"metadata":       {user: "metadata", password: g.account(t, "metadata", app+"metadata/read", app+"metadata/write"), rights: only()},
		"elsewhere":      {user: "elsewhere", password: g.account(t, "elsewhere", "repositories/other/*/content/read"), rights: map[string][]string{"other/app": {"pull"}}},
		"full":           {user: "full", password: full, rights: only(all...)},
		"admin":          {user: "admin", password: adminPassword, rights: everything, catalog: true},
		"wrong password": {user: "full", password: full + "x", bad: true},
		"no such user":   {user: "nobody", password: full, bad: true},
		"disabled":       {user: "disabled", password: disabled, bad: true},
		"expired":        {user: "expired", password: expired, bad: true},
		"refresh token":  {user: "00000000-0000-0000-0000-000000000000", password: refresh, rights: only(all...)},
		"bad refresh":    {user: "00000000-0000-0000-0000-000000000000", password: refresh[:len(refresh)-8] + "AAAAAAAA", bad: true},

		"bearer pull":        {bearer: bearer("repository:team/app:pull"), rights: only("pull")},
		"bearer push":        {bearer: bearer("repository:team/app:push"), rights: only("push")},
		"bearer delete":      {bearer: bearer("repository:team/app:delete"), rights: only("delete")},
		"bearer pull,push":   {bearer: bearer("repository:team/app:pull,push"), rights: only("pull", "push")},
		"bearer *":           {bearer: bearer("repository:team/app:*"), rights: only(all...)},
		"bearer metadata":    {bearer: bearer("repository:team/app:metadata_read,metadata_write"), rights: only()},
		"bearer elsewhere":   {bearer: bearer("repository:other/app:pull,push,delete"), rights: only()},
		"bearer for nothing": {bearer: bearer(""), rights: only()},
		"bearer of nobody":   {bearer: nobody},
		"bearer catalog":     {bearer: adminToken, catalog: true},
		"bearer not allowed": {bearer: bearer("registry:catalog:*")},
		"bearer expired":     {bearer: expiredToken, bad: true},
		"bearer refresh":     {bearer: refresh, bad: true},
		"bearer forged":      {bearer: expiredToken[:len(expiredToken)-8] + "AAAAAAAA", bad: true},
		"bearer nonsense":    {bearer: "nonsense", bad: true},
	}
}

// deeds are all that one can ask of a repository, with what they need; {repo}
// and {blob} are filled in.
func deeds() map[string]string {
	return map[string]string{
		"GET /v2/":                                           "",
		"HEAD /v2/":                                          "",
		"GET /v2/_catalog":                                   "catalog",
		"GET /v2/{repo}/blobs/{blob}":                        "pull",
		"HEAD /v2/{repo}/blobs/{blob}":                       "pull",
		"DELETE /v2/{repo}/blobs/" + emptyDigest:             "delete",
		"GET /v2/{repo}/manifests/v1":                        "pull",
		"HEAD /v2/{repo}/manifests/v1":                       "pull",
		"PUT /v2/{repo}/manifests/v1":                        "push",
		"DELETE /v2/{repo}/manifests/none":                   "delete",
		"DELETE /v2/{repo}/manifests/" + emptyDigest:         "delete",
		"GET /v2/{repo}/tags/list":                           "pull",
		"GET /v2/{repo}/referrers/{blob}":                    "pull",
		"POST /v2/{repo}/blobs/uploads/":                     "push",
		"POST /v2/{repo}/blobs/uploads/?mount={blob}":        "push",
		"POST /v2/{repo}/blobs/uploads/?digest={blob}":       "push",
		"GET /v2/{repo}/blobs/uploads/none":                  "push",
		"PATCH /v2/{repo}/blobs/uploads/none":                "push",
		"PUT /v2/{repo}/blobs/uploads/none?digest={blob}":    "push",
		"DELETE /v2/{repo}/blobs/uploads/none":               "push",
		"POST /v2/{repo}/blobs/uploads/?mount={blob}&from=x": "push",
	}
}

// Every kind of caller, everything there is to ask for, in a repository of
// theirs, in another, in one that is open to all, in one that isn't there.
func TestEveryCallerEveryRequest(t *testing.T) {
	g := newGuarded(t, registry.Limits{})
	g.visits.Store(1) // so that wrong passwords aren't too many
	all := visitors(t, g)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		v := all[name]
		for deed, action := range deeds() {
			for _, repo := range []string{"team/app", "other/app", "public/app", "team/none"} {
				digest := oci.DigestOf([]byte(content + repo)).String()
				method, path, _ := strings.Cut(strings.NewReplacer("{repo}", repo, "{blob}", digest).Replace(deed), " ")
				resp, body := get(t, g.Client(), method, g.URL+path, v.header()...)
				challenge := resp.Header.Get("Www-Authenticate")
				where := fmt.Sprintf("%s: %s %s: %s %s", name, method, path, resp.Status, challenge)
				if v.may(repo, action) {
					if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden || challenge != "" {
						t.Errorf("%s, and may do that: %s", where, body)
					}
					continue
				}
				if resp.StatusCode != v.refusal() {
					t.Errorf("%s, want %d", where, v.refusal())
				}
				checkRefusal(t, where, v, repo, action, method, resp, body)
			}
		}
	}
	if text := g.log.String(); strings.Contains(text, adminPassword) || strings.Contains(text, all["bearer *"].bearer) {
		t.Error("the log has credentials")
	}
}

func checkRefusal(t *testing.T, where string, v visitor, repo, action, method string, resp *http.Response, body string) {
	t.Helper()
	challenge, code := resp.Header.Get("Www-Authenticate"), "UNAUTHORIZED"
	want := ""
	switch {
	case resp.StatusCode == http.StatusForbidden:
		code = "DENIED"
		if challenge != "" {
			t.Errorf("%s: a challenge would have clients try again for ever", where)
		}
	case action == "catalog":
		want = `,scope="registry:catalog:*"`
	case action == "push":
		want = `,scope="repository:` + repo + `:pull,push`
	case action != "":
		want = `,scope="repository:` + repo + `:` + action + `"`
	}
	if resp.StatusCode == http.StatusUnauthorized {
		if !strings.HasPrefix(challenge, `Bearer realm="http://127.0.0.1:`) || !strings.Contains(challenge, `/oauth2/token",service="test"`) || !strings.Contains(challenge, want) {
			t.Errorf("%s, want one with %s", where, want)
		}
		if v.bearer != "" && !strings.Contains(challenge, map[bool]string{true: `error="invalid_token"`, false: `error="insufficient_scope"`}[v.bad]) {
			t.Errorf("%s: it doesn't say what is wrong with the token", where)
		}
	}
	if method != "HEAD" && errorCode([]byte(body)) != code {
		t.Errorf("%s: %s, want %s", where, body, code)
	}
}

// Who may not see a repository can't find out whether it exists.
func TestExistenceIsNotTold(t *testing.T) {
	g := newGuarded(t, registry.Limits{})
	g.visits.Store(1)
	for name, v := range visitors(t, g) {
		for deed, action := range deeds() {
			if action == "" || action == "catalog" || v.may("team/app", action) || v.may("team/none", action) {
				continue
			}
			answers := []string{}
			for _, repo := range []string{"team/app", "team/none"} {
				digest := oci.DigestOf([]byte(content + "team/app")).String()
				method, path, _ := strings.Cut(strings.NewReplacer("{repo}", repo, "{blob}", digest).Replace(deed), " ")
				resp, body := get(t, g.Client(), method, g.URL+path, v.header()...)
				for _, h := range []string{"X-Request-Id", "X-Ms-Correlation-Request-Id", "Date", "Content-Length"} {
					resp.Header.Del(h)
				}
				answers = append(answers, strings.ReplaceAll(fmt.Sprint(resp.StatusCode, resp.Header, body), repo, "REPO"))
			}
			if answers[0] != answers[1] {
				t.Errorf("%s, %s:\n%s\n%s", name, deed, answers[0], answers[1])
			}
		}
	}
}

// A mount needs pull on where the blob is; otherwise it is as if it weren't there.
func TestMountNeedsBoth(t *testing.T) {
	g := newGuarded(t, registry.Limits{})
	const write = "repositories/team/app/content/write"
	narrow := visitor{user: "narrow", password: g.account(t, "narrow", write)}
	wide := visitor{user: "wide", password: g.account(t, "wide", write, "repositories/other/app/content/read")}
	digest := func(repo string) string { return oci.DigestOf([]byte(content + repo)).String() }
	for _, c := range []struct {
		v     visitor
		query string
		want  int
	}{
		{narrow, "mount=" + digest("other/app") + "&from=other/app", 202},
		{narrow, "mount=" + digest("other/app"), 202},
		{narrow, "mount=" + digest("other/none") + "&from=other/none", 202},
		{wide, "mount=" + digest("other/app") + "&from=team/none", 202},
		{wide, "mount=" + digest("other/app") + "&from=other/app", 201},
		{narrow, "mount=" + digest("public/app"), 201},
	} {
		resp, body := get(t, g.Client(), "POST", g.URL+"/v2/team/app/blobs/uploads/?"+c.query, c.v.header()...)
		if resp.StatusCode != c.want {
			t.Errorf("%s, %s: %s, want %d; %s", c.v.user, c.query, resp.Status, c.want, body)
		}
	}
	if err := g.registry.DeleteBlob(t.Context(), "team/app", oci.Digest(digest("other/app"))); err != nil {
		t.Fatal(err)
	}
	if resp, _ := get(t, g.Client(), "POST", g.URL+"/v2/team/app/blobs/uploads/?mount="+digest("other/app"), wide.header()...); resp.StatusCode != http.StatusCreated {
		t.Errorf("from anywhere that may be read: %s", resp.Status)
	}
}

// Our own client gets along with all of it, also where blobs are elsewhere.
func TestClientSignsIn(t *testing.T) {
	g := newGuarded(t, registry.Limits{})
	password := g.account(t, "robot", "repositories/team/*/content/read", "repositories/team/*/content/write", "repositories/team/*/content/delete")
	transport := remote.NewTransport()
	t.Cleanup(transport.CloseIdleConnections)
	client, err := remote.New(strings.TrimPrefix(g.URL, "http://"), remote.Options{
		Transport: transport, Retries: -1,
		Credentials: func(context.Context, string) (remote.Credential, error) {
			return remote.Credential{Username: "robot", Password: password}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	digest := pushed(t, client, "team/new", []byte("new"))
	if _, err := client.PushManifest(t.Context(), "team/new", "v1", oci.MediaTypeIndex, []byte(emptyIndex)); err != nil {
		t.Error(err)
	}
	if _, err := client.GetManifest(t.Context(), "team/new", "v1"); err != nil {
		t.Error(err)
	}
	if err := client.DeleteBlob(t.Context(), "team/new", digest); err != nil {
		t.Error(err)
	}
	if _, err := client.GetManifest(t.Context(), "other/app", "v1"); err == nil {
		t.Error("it could read another's repository")
	}
	for _, l := range g.log.requests(t) {
		if l["repository"] == "team/new" && l["status"].(float64) < 400 && l["identity"] != "robot" {
			t.Errorf("the log doesn't know who: %v", l)
		}
	}
}

// Limits are of accounts, whose requests come from anywhere, and of addresses
// where there is no account.
func TestLimitsAreOfIdentities(t *testing.T) {
	g := newGuarded(t, registry.Limits{Reads: 2}) // so few that none comes back while the test runs
	a := visitor{user: "a", password: g.account(t, "a", "repositories/team/app/content/read")}
	b := visitor{user: "b", password: g.account(t, "b", "repositories/team/app/content/read")}
	count := func(v visitor) (refused int) {
		for range 4 {
			if resp, _ := get(t, g.Client(), "GET", g.URL+"/v2/team/app/tags/list", v.header()...); resp.StatusCode == http.StatusTooManyRequests {
				refused++
			}
		}
		return refused
	}
	if x, y, z := count(a), count(b), count(visitor{}); x != 2 || y != 2 || z != 2 {
		t.Errorf("of 4 requests each, %d, %d and %d were refused, want 2", x, y, z)
	}
}

func TestTooManyWrongPasswords(t *testing.T) {
	g := newGuarded(t, registry.Limits{})
	v := visitor{user: "admin", password: "wrong"}
	for range 200 {
		resp, body := get(t, g.Client(), "GET", g.URL+"/v2/", v.header()...)
		if resp.StatusCode == http.StatusUnauthorized {
			continue
		}
		if resp.StatusCode != http.StatusTooManyRequests || resp.Header.Get("Retry-After") == "" || errorCode([]byte(body)) != "TOOMANYREQUESTS" {
			t.Errorf("%s, Retry-After %q: %s", resp.Status, resp.Header.Get("Retry-After"), body)
		}
		return
	}
	t.Error("200 wrong passwords, and no limit")
}

// Failures count, at the token server too.
func TestFailuresAreCounted(t *testing.T) {
	g := newGuarded(t, registry.Limits{})
	wrong := visitor{user: "admin", password: "wrong"}.header()
	get(t, g.Client(), "GET", g.URL+"/v2/", wrong...)
	get(t, g.Client(), "GET", g.URL+"/oauth2/token?service=test", wrong...)
	get(t, g.Client(), "GET", g.URL+"/v2/") // is no failure
	w := httptest.NewRecorder()
	g.metrics.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, want := range []string{"sluice_auth_failures_total 2\n", `sluice_http_requests_total{kind="oauth2",status="4xx"} 1`} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("metrics have no %s", want)
		}
	}
}

// A handler that is served without a front asks nobody who they are, and gives
// nothing to nobody.
func TestHandlerWithoutFront(t *testing.T) {
	g := newGuarded(t, registry.Limits{})
	server := httptest.NewServer(registry.NewHandler(g.registry, registry.Options{Authorizer: g.authority}))
	t.Cleanup(server.Close)
	if resp, _ := get(t, server.Client(), "GET", server.URL+"/v2/team/app/tags/list"); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("anonymous: %s", resp.Status)
	}
	admin := visitor{user: "admin", password: adminPassword}
	if resp, _ := get(t, server.Client(), "GET", server.URL+"/v2/team/app/tags/list", admin.header()...); resp.StatusCode != http.StatusOK {
		t.Errorf("admin: %s", resp.Status)
	}
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodGet, "/", &bytes.Buffer{})
	if err := registry.Authorize(r, g.authority); err == nil {
		t.Error("a request that went through no front is allowed")
	}
	registry.WriteError(w, r, registry.Authorize(r, g.authority, auth.Catalog()))
	if w.Code != http.StatusUnauthorized || w.Header().Get("Www-Authenticate") == "" {
		t.Errorf("%d, %v", w.Code, w.Header())
	}
}
