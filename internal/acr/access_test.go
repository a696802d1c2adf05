package acr_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/acr"
	"sluice/internal/stored"
)

// Every endpoint by every kind of caller: who may not is told so, by 401 with a
// challenge or 403, whether what they ask for exists or not.
func TestAccess(t *testing.T) {
	b := newBench(t, stored.Options{SoftDelete: time.Hour})
	const none = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	push(t, b.reg, "team/open", "open", "v1")
	if _, err := b.admin().UpdateRepository(t.Context(), "team/open", acr.AttributeChanges{AnonymousPullEnabled: on()}); err != nil {
		t.Fatal(err)
	}
	callers := map[string]string{"": "", "admin": adminPassword}
	for _, right := range []string{"content/read", "content/write", "content/delete", "metadata/read", "metadata/write"} {
		name := strings.ReplaceAll(right, "/", "-")
		callers[name] = b.token(name, "repositories/team/*/"+right)
	}
	callers["elsewhere"] = b.token("elsewhere", "repositories/other/*/metadata/read", "repositories/other/*/content/delete")

	const repo = "/acr/v1/team/app"
	cases := []struct {
		method, path, body string
		may                []string // besides the admin user
	}{
		{"GET", "/acr/v1/_catalog", "", nil},
		{"GET", repo, "", []string{"metadata-read"}},
		{"HEAD", repo, "", []string{"metadata-read"}},
		{"PATCH", repo, `{"writeEnabled":true}`, []string{"metadata-write"}},
		{"DELETE", repo, "", []string{"content-delete"}},
		{"GET", repo + "/_tags", "", []string{"metadata-read"}},
		{"GET", repo + "/_tags/v1", "", []string{"metadata-read"}},
		{"PATCH", repo + "/_tags/v1", `{}`, []string{"metadata-write"}},
		{"DELETE", repo + "/_tags/v1", "", []string{"content-delete"}},
		{"GET", repo + "/_manifests", "", []string{"metadata-read"}},
		{"GET", repo + "/_manifests/" + none, "", []string{"metadata-read"}},
		{"PATCH", repo + "/_manifests/" + none, `{}`, []string{"metadata-write"}},
		{"DELETE", repo + "/_manifests/" + none, "", []string{"content-delete"}},
		{"GET", repo + "/_usage", "", []string{"metadata-read"}},
		{"GET", "/acr/v1/_deleted/_catalog", "", nil},
		{"GET", "/acr/v1/_deleted/team/app/_manifests", "", []string{"metadata-read"}},
		{"GET", "/acr/v1/_deleted/team/app/_tags", "", []string{"metadata-read"}},
		{"POST", "/acr/v1/_deleted/team/app/_manifests/" + none, `{"tag":"v1"}`, []string{"content-write"}},
		{"GET", "/acr/v1/_usage", "", nil},
		{"POST", "/acr/v1/_gc", "", nil},
		{"POST", "/acr/v1/_import", `{"source":"127.0.0.1:1/a:b"}`, nil},
		{"GET", "/acr/v1/_operations/none", "", nil},
		{"DELETE", "/acr/v1/_operations/none", "", nil},
		{"POST", "/acr/v1/_operations/none:cancel", "", nil},
		{"GET", "/acr/v1/_tokens", "", nil},
		{"POST", "/acr/v1/_tokens", `{"name":"none","scopeMap":"none"}`, nil},
		{"GET", "/acr/v1/_tokens/none", "", nil},
		{"PATCH", "/acr/v1/_tokens/none", `{}`, nil},
		{"DELETE", "/acr/v1/_tokens/none", "", nil},
		{"POST", "/acr/v1/_tokens/none/passwords", `{"name":"password1"}`, nil},
		{"DELETE", "/acr/v1/_tokens/none/passwords/password1", "", nil},
		{"GET", "/acr/v1/_scopeMaps", "", nil},
		{"POST", "/acr/v1/_scopeMaps", `{"name":"none"}`, nil},
		{"GET", "/acr/v1/_scopeMaps/none", "", nil},
		{"PATCH", "/acr/v1/_scopeMaps/none", `{}`, nil},
		{"DELETE", "/acr/v1/_scopeMaps/none", "", nil},
	}
	for _, c := range cases {
		for name, password := range callers {
			resp, body := b.send(name, password, c.method, c.path, c.body)
			want := 0 // whatever it is for those who may
			if name != "admin" && !slices.Contains(c.may, name) {
				want = http.StatusForbidden
				if name == "" {
					want = http.StatusUnauthorized
				}
			}
			challenge := resp.Header.Get("WWW-Authenticate")
			refused := resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden
			switch {
			case want == 0 && refused, want != 0 && resp.StatusCode != want:
				t.Errorf("%s %s by %q: %s, %s", c.method, c.path, name, resp.Status, body)
			case want == http.StatusUnauthorized && !strings.HasPrefix(challenge, `Bearer realm="http://`+b.host+`/oauth2/token"`):
				t.Errorf("%s %s by nobody: the challenge is %q", c.method, c.path, challenge)
			case resp.StatusCode >= 500, resp.StatusCode == http.StatusMethodNotAllowed:
				t.Errorf("%s %s by %q: %s, %s", c.method, c.path, name, resp.Status, body)
			}
		}
	}
	for _, c := range []struct {
		method string
		path   string
		status int
	}{
		{"GET", "/acr/v1/team/open", 200}, {"GET", "/acr/v1/team/open/_tags", 200}, {"GET", "/acr/v1/team/open/_tags/v1", 200},
		{"PATCH", "/acr/v1/team/open", 401}, {"DELETE", "/acr/v1/team/open", 401},
	} {
		if resp, body := b.send("", "", c.method, c.path, ""); resp.StatusCode != c.status {
			t.Errorf("%s %s by nobody, where all may pull: %s, %s", c.method, c.path, resp.Status, body)
		}
	}
	if resp, _ := b.send("admin", "wrong", "GET", repo, ""); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("with a wrong password: %s", resp.Status)
	}
}
