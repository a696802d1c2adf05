package auth_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/auth"
	"sluice/internal/storage"
	"sluice/oci"
)

func decodePart(t *testing.T, token string, part int, into any) {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("%q is not a JWT", token)
	}
	data, err := base64.RawURLEncoding.DecodeString(parts[part])
	if err == nil {
		err = json.Unmarshal(data, into)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Every kind of caller × every action × its own, another's, a wildcard's and a
// public repository, and the catalog. What is said to be allowed is all that is.
func TestWhoMayDoWhat(t *testing.T) {
	entra := newIssuer(t)
	c := newClock()
	b := open(t, new(storage.Memory), c, func(o *auth.Options) { o.Exchange = entra.config() })

	b.scopeMap("reader", "repositories/own/content/read")
	b.scopeMap("pusher", "repositories/own/content/read", "repositories/own/content/write")
	b.scopeMap("blind", "repositories/own/content/write")
	b.scopeMap("deleter", "repositories/own/content/delete")
	b.scopeMap("describer", "repositories/own/metadata/read", "repositories/own/metadata/write")
	b.scopeMap("team", "repositories/team/*/content/read", "repositories/team/*/content/write", "repositories/team/a/content/delete")
	b.scopeMap("everything", "repositories/*/content/read", "repositories/*/content/write", "repositories/*/content/delete", "repositories/*/metadata/read", "repositories/*/metadata/write")

	const all = "pull push delete metadata_read metadata_write *"
	const open = "pull metadata_read"
	repos := []string{"own", "other", "team", "team/a", "team/a/b", "teams/a", "public/a", "catalog"}
	callers := []struct {
		name     string
		basic    credentials
		expected map[string]string // repository → actions
	}{
		{"anonymous", nothing, map[string]string{"public/a": open}},
		{"admin", basic("admin", adminPw), map[string]string{"own": all, "other": all, "team": all, "team/a": all, "team/a/b": all, "teams/a": all, "public/a": all, "catalog": "*"}},
		{"reader", basic("t-reader", b.token("t-reader", "reader")), map[string]string{"own": "pull", "public/a": open}},
		{"pusher", basic("t-pusher", b.token("t-pusher", "pusher")), map[string]string{"own": "pull push", "public/a": open}},
		{"blind", basic("t-blind", b.token("t-blind", "blind")), map[string]string{"own": "push", "public/a": open}},
		{"deleter", basic("t-deleter", b.token("t-deleter", "deleter")), map[string]string{"own": "delete", "public/a": open}},
		{"describer", basic("t-describer", b.token("t-describer", "describer")), map[string]string{"own": "metadata_read metadata_write", "public/a": open}},
		{"team", basic("t-team", b.token("t-team", "team")), map[string]string{"team/a": "pull push delete", "team/a/b": "pull push", "public/a": open}},
		{"everything", basic("t-everything", b.token("t-everything", "everything")), map[string]string{"own": all, "other": all, "team": all, "team/a": all, "team/a/b": all, "teams/a": all, "public/a": all}},
		{"_repositories_admin", basic("t-admin", b.token("t-admin", auth.MapAdmin)), map[string]string{"own": all, "other": all, "team": all, "team/a": all, "team/a/b": all, "teams/a": all, "public/a": all}},
		{"_repositories_pull", basic("t-pull", b.token("t-pull", auth.MapPull)), map[string]string{"own": "pull", "other": "pull", "team": "pull", "team/a": "pull", "team/a/b": "pull", "teams/a": "pull", "public/a": open}},
		{"_repositories_push", basic("t-push", b.token("t-push", auth.MapPush)), map[string]string{"own": "pull push", "other": "pull push", "team": "pull push", "team/a": "pull push", "team/a/b": "pull push", "teams/a": "pull push", "public/a": open + " push"}},
		{"federated", basic(nullGUID, b.exchanged(entra.token(c, "system:serviceaccount:ns:reader"))), map[string]string{"own": "pull", "public/a": open}},
		{"federated admin", basic(nullGUID, b.exchanged(entra.token(c, "system:serviceaccount:kube-system:root"))), map[string]string{"own": all, "other": all, "team": all, "team/a": all, "team/a/b": all, "teams/a": all, "public/a": all, "catalog": "*"}},
	}
	actions := strings.Fields(all)
	for _, caller := range callers {
		for _, repo := range repos {
			for _, action := range actions {
				need := auth.ToRepository(repo, action)
				if repo == "catalog" {
					need = auth.Catalog()
				}
				want := slices.Contains(strings.Fields(caller.expected[repo]), action) || repo == "catalog" && caller.expected[repo] != ""
				who, err := b.who(caller.basic)
				if err != nil {
					t.Fatalf("%s: %v", caller.name, err)
				}
				if got := who.Allows(t.Context(), need); got != want {
					t.Errorf("%s, directly: %s is %v", caller.name, need, got)
				}
				// The same through a token for everything, and for this.
				for _, scope := range []string{strings.Replace(need.String(), ":"+action, ":pull,push,delete,metadata_read,metadata_write,*", 1), need.String()} {
					answer := b.get(caller.basic, scope)
					if answer.status != http.StatusOK && caller.name != "anonymous" {
						t.Fatalf("%s: token for %s: %d %s", caller.name, scope, answer.status, answer.body)
					}
					if answer.status != http.StatusOK {
						if want {
							t.Errorf("%s: no token for %s: %s", caller.name, scope, answer.body)
						}
						continue
					}
					who, err := b.who(bearerToken(answer.AccessToken))
					if err != nil {
						t.Fatalf("%s: bearer for %s: %v", caller.name, scope, err)
					}
					if got := who.Allows(t.Context(), need); got != want {
						t.Errorf("%s, by a token for %s: %s is %v", caller.name, scope, need, got)
					}
					// A token for one thing isn't one for another.
					if other := auth.ToRepository("not/asked", auth.ActionPull); who.Allows(t.Context(), other) {
						t.Errorf("%s: a token for %s allows %s", caller.name, scope, other)
					}
				}
			}
		}
	}
}

func TestSeveralActionsAreAllNeeded(t *testing.T) {
	b := open(t, new(storage.Memory), newClock(), nil)
	b.scopeMap("reader", "repositories/own/content/read")
	who, err := b.who(basic("ci", b.token("ci", "reader")))
	if err != nil {
		t.Fatal(err)
	}
	for _, need := range []auth.Access{
		auth.ToRepository("own", "pull", "push"), auth.ToRepository("own"), auth.ToRepository("own", "pull", "fly"), auth.ToRepository("", "pull"),
		{Type: "thing", Name: "own", Actions: []string{"pull"}}, {}, auth.ToRepository("public/x", "pull", "push"),
	} {
		if who.Allows(t.Context(), need) {
			t.Errorf("%v is allowed", need)
		}
	}
	if (auth.Caller{}).Allows(t.Context(), auth.ToRepository("own", "pull")) {
		t.Error("nobody may pull")
	}
}

func TestIntersection(t *testing.T) {
	b := open(t, new(storage.Memory), newClock(), nil)
	b.scopeMap("reader", "repositories/own/content/read", "repositories/own/metadata/read")
	ci := basic("ci", b.token("ci", "reader"))
	admin := basic("admin", adminPw)
	for _, test := range []struct {
		with  credentials
		asked []string
		want  string
	}{
		{ci, []string{"repository:own:pull,push"}, "repository:own:pull"},
		{ci, []string{"repository:own:*"}, "repository:own:pull,metadata_read"},
		{ci, []string{"repository:own:deleted_read,deleted_restore"}, "repository:own:deleted_read"},
		{ci, []string{"repository:own:push", "repository:own:pull"}, "repository:own:pull"},
		{ci, []string{"repository:own:pull repository:public/x:pull,push", "repository:else:pull"}, "repository:own:pull repository:public/x:pull"},
		{ci, []string{"registry:catalog:*"}, ""},
		{ci, []string{"thing:own:pull", "repository:own:fly"}, ""},
		{ci, []string{"repository(plugin):own:pull"}, "repository:own:pull"},
		{ci, nil, ""},
		{admin, []string{"repository:own:*"}, "repository:own:*"},
		{admin, []string{"repository:own:pull,push", "registry:catalog:*"}, "repository:own:pull,push registry:catalog:*"},
		{nothing, []string{"repository:public/x:pull,push"}, "repository:public/x:pull"},
		{nothing, []string{"repository:public/x:metadata_read", "repository:own:pull"}, "repository:public/x:metadata_read"},
		{nothing, nil, ""},
	} {
		a := b.get(test.with, test.asked...)
		if a.status != http.StatusOK || a.Scope != test.want {
			t.Errorf("%q gives %q, not %q (%d %s)", test.asked, a.Scope, test.want, a.status, a.Error)
		}
	}
	if a := b.get(nothing, "repository:own:pull"); a.status != http.StatusUnauthorized {
		t.Errorf("anonymous, nothing public: %d", a.status)
	}
}

// The claims are Azure's.
func TestClaims(t *testing.T) {
	entra, c := newIssuer(t), newClock()
	b := open(t, new(storage.Memory), c, func(o *auth.Options) { o.Exchange = entra.config() })
	b.scopeMap("reader", "repositories/own/content/read")
	now := float64(c.Now().Unix())

	refresh := claimsOf(t, b.exchanged(entra.token(c, "system:serviceaccount:ns:reader")))
	if id, _ := refresh["jti"].(string); len(id) != 36 {
		t.Errorf("jti %v", refresh["jti"])
	}
	delete(refresh, "jti")
	delete(refresh, "sluice")
	want := map[string]any{
		"sub": "system:serviceaccount:ns:reader", "nbf": now, "iat": now, "exp": now + 3*3600,
		"iss": "Azure Container Registry", "aud": host, "version": "1.0", "grant_type": "refresh_token", "tenant": "some-tenant",
		"permissions": map[string]any{"actions": []any{"read"}, "notActions": []any{}}, "roles": []any{},
	}
	if diff := cmp.Diff(want, refresh); diff != "" {
		t.Errorf("refresh token: %s", diff)
	}

	token := b.access(basic("ci", b.token("ci", "reader")), "repository:own:pull,push")
	access := claimsOf(t, token)
	delete(access, "jti")
	delete(access, "sluice")
	want = map[string]any{
		"sub": "ci", "nbf": now, "iat": now, "exp": now + 75*60,
		"iss": "Azure Container Registry", "aud": host, "version": "1.0", "grant_type": "password", "roles": []any{},
		"access": []any{map[string]any{"type": "repository", "name": "own", "actions": []any{"pull"}}},
	}
	if diff := cmp.Diff(want, access); diff != "" {
		t.Errorf("access token: %s", diff)
	}
	var header map[string]string
	decodePart(t, token, 0, &header)
	if header["typ"] != "JWT" || header["alg"] != "ES256" || header["kid"] == "" {
		t.Errorf("header %v", header)
	}
}

func TestExpiry(t *testing.T) {
	entra, c := newIssuer(t), newClock()
	b := open(t, new(storage.Memory), c, func(o *auth.Options) { o.Exchange = entra.config() })
	b.scopeMap("reader", "repositories/own/content/read")
	refresh := b.exchanged(entra.token(c, "system:serviceaccount:ns:reader"))
	access := b.access(basic("admin", adminPw), "repository:own:pull")

	c.Advance(75*time.Minute - time.Second)
	if _, err := b.who(bearerToken(access)); err != nil {
		t.Errorf("a second before it expires: %v", err)
	}
	c.Advance(time.Second)
	if _, err := b.who(bearerToken(access)); !errors.Is(err, oci.ErrUnauthorized) {
		t.Errorf("expired access token: %v", err)
	}
	c.Advance(3*time.Hour - 75*time.Minute - time.Second)
	form := url.Values{"grant_type": {"refresh_token"}, "service": {host}, "scope": {"repository:own:pull"}, "refresh_token": {refresh}}
	if a := b.post("/oauth2/token", form); a.status != http.StatusOK || a.Scope != "repository:own:pull" {
		t.Errorf("refresh token before it expires: %d %s", a.status, a.body)
	}
	c.Advance(time.Second)
	if a := b.post("/oauth2/token", form); a.status != http.StatusUnauthorized || a.AccessToken != "" {
		t.Errorf("expired refresh token: %d %s", a.status, a.body)
	}
	if _, err := b.who(basic(nullGUID, refresh)); !errors.Is(err, oci.ErrUnauthorized) {
		t.Errorf("expired refresh token on /v2: %v", err)
	}
}

// An access token isn't a refresh token, nor the reverse.
func TestTokensAreWhatTheyAre(t *testing.T) {
	entra, c := newIssuer(t), newClock()
	b := open(t, new(storage.Memory), c, func(o *auth.Options) { o.Exchange = entra.config() })
	refresh := b.exchanged(entra.token(c, "system:serviceaccount:kube-system:root"))
	access := b.access(basic("admin", adminPw), "repository:own:pull")
	if _, err := b.who(bearerToken(refresh)); !errors.Is(err, oci.ErrUnauthorized) {
		t.Errorf("refresh token as a bearer token: %v", err)
	}
	if _, err := b.who(basic(nullGUID, access)); !errors.Is(err, oci.ErrUnauthorized) {
		t.Errorf("access token as a refresh token: %v", err)
	}
	r := request("GET", "/v2/", nil, bearerToken(access))
	r.Host = "other.example.com"
	if _, err := b.Authenticate(r); !errors.Is(err, oci.ErrUnauthorized) {
		t.Errorf("a token for another service: %v", err)
	}
}

func TestChanges(t *testing.T) {
	b := open(t, new(storage.Memory), newClock(), nil)
	ctx := t.Context()
	b.scopeMap("reader", "repositories/own/content/read")
	ci := basic("ci", b.token("ci", "reader"))
	bearer := bearerToken(b.access(ci, "repository:own:pull,push"))
	pull, push := auth.ToRepository("own", "pull"), auth.ToRepository("own", "push")
	expect := func(what string, with credentials, signedIn, mayPull, mayPush bool) {
		t.Helper()
		who, err := b.who(with)
		if err != nil && !errors.Is(err, oci.ErrUnauthorized) {
			t.Fatal(err)
		}
		if (err == nil) != signedIn || who.Allows(ctx, pull) != mayPull || who.Allows(ctx, push) != mayPush {
			t.Errorf("%s: %v, pull %v, push %v", what, err, who.Allows(ctx, pull), who.Allows(ctx, push))
		}
	}
	update := func(change func(*auth.Token)) {
		t.Helper()
		if _, err := b.UpdateToken(ctx, "ci", func(tok *auth.Token) error { change(tok); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	expect("at first", ci, true, true, false)
	expect("at first, bearer", bearer, true, true, false)

	if _, err := b.UpdateScopeMap(ctx, "reader", func(m *auth.ScopeMap) error {
		m.Actions = []string{"repositories/own/content/write"}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	expect("other actions", ci, true, false, true)
	expect("other actions, bearer", bearer, true, false, false) // it was for pulling

	update(func(tok *auth.Token) { tok.ScopeMap = auth.MapPush })
	expect("another map", ci, true, true, true)
	expect("another map, bearer", bearer, true, true, false)

	update(func(tok *auth.Token) { tok.Status = auth.Disabled })
	expect("disabled", ci, false, false, false)
	expect("disabled, bearer", bearer, false, false, false)
	if a := b.get(ci, "repository:own:pull"); a.status != http.StatusUnauthorized {
		t.Errorf("disabled, new token: %d", a.status)
	}
	update(func(tok *auth.Token) { tok.Status = auth.Enabled })
	expect("enabled", ci, true, true, true)

	second, err := b.GeneratePassword(ctx, "ci", 2, b.clock.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	expect("second password", basic("ci", second), true, true, true)
	if a := b.get(basic("ci", second), "repository:own:pull"); a.ExpiresIn != 3600 {
		t.Errorf("a token of a password that expires in an hour lasts %d s", a.ExpiresIn)
	}
	update(func(tok *auth.Token) { tok.Passwords[0] = auth.Password{} })
	expect("first password deleted", ci, false, false, false)
	b.clock.Advance(time.Hour)
	expect("second password expired", basic("ci", second), false, false, false)

	third := b.mustGenerate("ci", 1)
	bearer = bearerToken(b.access(basic("ci", third), "repository:own:pull"))
	expect("new first password", bearer, true, true, false)
	if err := b.DeleteToken(ctx, "ci"); err != nil {
		t.Fatal(err)
	}
	expect("deleted", basic("ci", third), false, false, false)
	expect("deleted, bearer", bearer, false, false, false)
	b.clock.Advance(time.Second)
	b.token("ci", auth.MapPush)
	expect("another of the same name, bearer", bearer, false, false, false)
	expect("another of the same name", basic("ci", third), false, false, false)
}

func (b *bed) mustGenerate(name string, number int) string {
	b.t.Helper()
	secret, err := b.GeneratePassword(b.t.Context(), name, number, time.Time{})
	if err != nil {
		b.t.Fatal(err)
	}
	return secret
}

func TestAnotherReplicaSeesChangesSoon(t *testing.T) {
	store, c := new(storage.Memory), newClock()
	a, b := open(t, store, c, nil), open(t, store, c, nil)
	ci := basic("ci", a.token("ci", auth.MapPull))
	bearer := bearerToken(a.access(ci, "repository:own:pull"))
	for _, with := range []credentials{ci, bearer} {
		if _, err := b.who(with); err != nil {
			t.Fatalf("the other replica: %v", err)
		}
	}
	if _, err := a.UpdateToken(t.Context(), "ci", func(tok *auth.Token) error { tok.Status = auth.Disabled; return nil }); err != nil {
		t.Fatal(err)
	}
	c.Advance(5 * time.Second)
	for _, with := range []credentials{ci, bearer} {
		if _, err := b.who(with); !errors.Is(err, oci.ErrUnauthorized) {
			t.Errorf("disabled five seconds ago by another replica: %v", err)
		}
	}
}

func TestChallenge(t *testing.T) {
	pull := auth.ToRepository("x", "pull")
	for _, test := range []struct {
		name    string
		options auth.Options
		request func(*http.Request)
		need    []auth.Access
		want    string
	}{
		{"plain", auth.Options{}, nothing, []auth.Access{pull}, `Bearer realm="http://r.example.com:5000/oauth2/token",service="r.example.com:5000",scope="repository:x:pull"`},
		{"ping", auth.Options{}, nothing, nil, `Bearer realm="http://r.example.com:5000/oauth2/token",service="r.example.com:5000"`},
		{"two", auth.Options{Service: "r"}, nothing, []auth.Access{auth.ToRepository("x", "pull", "push"), pull}, `Bearer realm="http://r.example.com:5000/oauth2/token",service="r",scope="repository:x:pull,push repository:x:pull"`},
		{"external", auth.Options{ExternalURL: "https://e.example.com/"}, nothing, []auth.Access{auth.Catalog()}, `Bearer realm="https://e.example.com/oauth2/token",service="e.example.com",scope="registry:catalog:*"`},
		{"untrusted proxy", auth.Options{}, func(r *http.Request) { r.Header.Set("X-Forwarded-Proto", "https") }, nil, `Bearer realm="http://r.example.com:5000/oauth2/token",service="r.example.com:5000"`},
		{"trusted proxy", auth.Options{TrustForwarded: true}, func(r *http.Request) { r.Header.Set("X-Forwarded-Proto", "https") }, nil, `Bearer realm="https://r.example.com:5000/oauth2/token",service="r.example.com:5000"`},
		{"hostile host", auth.Options{}, func(r *http.Request) { r.Host = `a",realm="http://evil` }, nil, `Bearer realm="http://localhost/oauth2/token",service="localhost"`},
		{"bad token", auth.Options{}, bearerToken("x.y.z"), []auth.Access{pull}, `Bearer realm="http://r.example.com:5000/oauth2/token",service="r.example.com:5000",scope="repository:x:pull",error="invalid_token"`},
	} {
		b := open(t, new(storage.Memory), newClock(), func(o *auth.Options) {
			o.Service, o.ExternalURL, o.TrustForwarded = test.options.Service, test.options.ExternalURL, test.options.TrustForwarded
		})
		if got := b.Challenge(request("GET", "/v2/x/manifests/y", nil, test.request), test.need...); got != test.want {
			t.Errorf("%s: %s", test.name, got)
		}
	}
	b := open(t, new(storage.Memory), newClock(), nil)
	token := b.access(basic("admin", adminPw), "repository:y:pull")
	if got := b.Challenge(request("GET", "/v2/", nil, bearerToken(token)), pull); !strings.HasSuffix(got, `,error="insufficient_scope"`) {
		t.Errorf("good token, not for this: %s", got)
	}
}

func TestAdmin(t *testing.T) {
	ctx, store, c := t.Context(), new(storage.Memory), newClock()
	var shown []string
	generated := func(o *auth.Options) {
		o.Admin = auth.Admin{Enabled: true, Name: "root", Show: func(pw string) error { shown = append(shown, pw); return nil }}
	}
	if _, err := auth.Open(ctx, store, auth.Options{Admin: auth.Admin{Enabled: true}, HashCost: 4}); err == nil {
		t.Error("an admin user without a password, and nobody to show one to")
	}
	open(t, store, c, generated)
	b := open(t, store, c, generated) // which doesn't make another
	if len(shown) != 1 || len(shown[0]) < 32 {
		t.Fatalf("generated %d passwords", len(shown))
	}
	if who, err := b.who(basic("root", shown[0])); err != nil || who.Kind != auth.KindAdmin || who.Name != "root" {
		t.Errorf("the generated password: %+v, %v", who, err)
	}
	second, err := b.GenerateAdminPassword(ctx, 2, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	// A configured password replaces the first one only.
	b = open(t, store, c, nil)
	for pw, ok := range map[string]bool{adminPw: true, second: true, shown[0]: false, "": false} {
		if _, err := b.who(basic("admin", pw)); (err == nil) != ok {
			t.Errorf("after configuring one: %v", err)
		}
	}
	if _, err := b.GenerateAdminPassword(ctx, 1, time.Time{}); !errors.Is(err, auth.ErrInvalid) {
		t.Errorf("generating the configured password: %v", err)
	}
	bearer := bearerToken(b.access(basic("admin", adminPw), "repository:x:*"))
	b = open(t, store, c, func(o *auth.Options) { o.Admin.Enabled = false })
	for _, with := range []credentials{basic("admin", adminPw), bearer} {
		if _, err := b.who(with); !errors.Is(err, oci.ErrUnauthorized) {
			t.Errorf("the admin user while it is off: %v", err)
		}
	}
}
