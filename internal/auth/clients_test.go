package auth_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	orasauth "oras.land/oras-go/v2/registry/remote/auth"

	"sluice/internal/auth"
	"sluice/internal/storage"
)

// A client of others finds its way from the challenge to the resource.
func TestClientsOfOthers(t *testing.T) {
	entra, c := newIssuer(t), newClock()
	b := open(t, new(storage.Memory), c, func(o *auth.Options) { o.Exchange = entra.config() })
	b.scopeMap("reader", "repositories/own/content/read")
	ci := b.token("ci", "reader")

	mux := http.NewServeMux()
	mux.Handle("/oauth2/", b.Authority)
	mux.HandleFunc("/v2/{repo}/tags/list", func(w http.ResponseWriter, r *http.Request) {
		need := auth.ToRepository(r.PathValue("repo"), auth.ActionPull)
		if who, err := b.Authenticate(r); err != nil || !who.Allows(r.Context(), need) {
			w.Header().Set("WWW-Authenticate", b.Challenge(r, need))
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	server := httptest.NewServer(mux)
	defer server.Close()
	registry := strings.TrimPrefix(server.URL, "http://")
	r := request("POST", "/oauth2/exchange", url.Values{"grant_type": {"access_token"}, "access_token": {entra.token(c, "system:serviceaccount:ns:reader")}}, nothing)
	r.Host = registry // the name that this client knows it by
	refresh := b.serve(r)

	for name, test := range map[string]struct {
		credential orasauth.Credential
		oauth2     bool
		own        int
	}{
		"password, GET":           {orasauth.Credential{Username: "ci", Password: ci}, false, 200},
		"password, POST":          {orasauth.Credential{Username: "ci", Password: ci}, true, 200},
		"refresh token":           {orasauth.Credential{RefreshToken: refresh.Refresh}, false, 200},
		"refresh token, as basic": {orasauth.Credential{Username: nullGUID, Password: refresh.Refresh}, false, 200},
		"refresh token, as oauth": {orasauth.Credential{Username: nullGUID, Password: refresh.Refresh}, true, 200}, // containerd's way
		"wrong password, GET":     {orasauth.Credential{Username: "ci", Password: "x"}, false, 0},
		"wrong password, POST":    {orasauth.Credential{Username: "ci", Password: "x"}, true, 0},
		"nobody":                  {orasauth.Credential{}, false, 0},
	} {
		client := &orasauth.Client{
			Client: server.Client(), ForceAttemptOAuth2: test.oauth2,
			Credential: func(context.Context, string) (orasauth.Credential, error) { return test.credential, nil },
		}
		get := func(repo string) int {
			ctx := orasauth.WithScopesForHost(t.Context(), registry, orasauth.ScopeRepository(repo, orasauth.ActionPull, orasauth.ActionPush))
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL+"/v2/"+repo+"/tags/list", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.Do(req)
			if err != nil {
				return 0 // no token
			}
			defer resp.Body.Close()
			return resp.StatusCode
		}
		if got := get("own"); got != test.own {
			t.Errorf("%s: %d", name, got)
		}
		if got := get("other"); got == 200 {
			t.Errorf("%s: may read another's", name)
		}
	}
}
