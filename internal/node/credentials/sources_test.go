package credentials_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/node/credentials"
	"sluice/internal/remote"
	"sluice/oci"
)

// auths is a docker configuration with one entry.
func auths(key, user, password string) string {
	return fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, key, base64.StdEncoding.EncodeToString([]byte(user+":"+password)))
}

// plugin writes a kubelet plugin and its configuration, and returns them as a
// source. The plugin answers with the file DIR/answer, and notes each question
// in DIR/asked.
func plugin(t *testing.T, dir, host, cache string) *credentials.Plugins {
	t.Helper()
	program(t, filepath.Join(dir, "bin", "some-provider"), fmt.Sprintf("cat >>%[1]s/asked; echo \" $1 $TENANT\" >>%[1]s/asked; exec cat %[1]s/answer\n", dir))
	write(t, filepath.Join(dir, "providers.yaml"), fmt.Sprintf(`
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: some-provider
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: ["*.example.com", %q]
  defaultCacheDuration: %q
  args: [get]
  env:
  - {name: TENANT, value: "47"}
- name: needs-a-pod
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: ["*"]
  defaultCacheDuration: 1m
  tokenAttributes: {requireServiceAccount: true}
`, host, cache))
	p, err := credentials.NewPlugins(credentials.PluginOptions{Config: filepath.Join(dir, "providers.yaml"), BinDir: filepath.Join(dir, "bin")})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// says makes the plugin answer with a credential.
func says(t *testing.T, dir, key, match, user, password string) {
	t.Helper()
	write(t, filepath.Join(dir, "answer"), fmt.Sprintf(`{"apiVersion": "credentialprovider.kubelet.k8s.io/v1", "kind": "CredentialProviderResponse",
		"cacheKeyType": %q, "auth": {%q: {"username": %q, "password": %q}}}`, key, match, user, password))
}

func TestPlugins(t *testing.T) {
	s, dir := newServer(t), t.TempDir()
	source := plugin(t, dir, s.host, "10m")
	says(t, dir, "Registry", s.host, "robot", s.account(t, "robot"))
	c := running(t, credentials.New(nil, source))
	var wg sync.WaitGroup
	for _, repo := range []string{"team/app", "other/app"} {
		for range 20 {
			wg.Go(func() {
				if err := s.read(t, repo, c); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	if n := lines(t, filepath.Join(dir, "asked")); n != 1 {
		t.Errorf("the plugin ran %d times for one registry", n)
	}
	asked, _ := os.ReadFile(filepath.Join(dir, "asked"))
	if text := string(asked); !strings.Contains(text, `"kind":"CredentialProviderRequest"`) || !strings.Contains(text, `"image":"`+s.host+"/") || !strings.HasSuffix(text, " get 47\n") {
		t.Errorf("the plugin was asked with %s", text)
	}
	st := s.status(t, "team/app", c)
	if left := time.Until(st.Until); st.Source != source.Name() || left < 9*time.Minute || left > 10*time.Minute {
		t.Errorf("status %+v", st)
	}
	// Nobody is asked about other registries.
	if cred, err := c.For("", "app")(t.Context(), "example.com"); err != nil || cred != (remote.Credential{}) {
		t.Errorf("for a registry that doesn't match: %v", err)
	}
}

// A password that was changed is got anew while the mount lives.
func TestPluginsRevoked(t *testing.T) {
	s, dir := newServer(t), t.TempDir()
	c := running(t, credentials.New(nil, plugin(t, dir, s.host, "0s"))) // not kept, so that the newest counts
	says(t, dir, "Image", s.host+"/team", "robot", s.account(t, "robot"))
	client := s.client(t, "team/app", c)
	if err := readWith(t, client, "team/app"); err != nil {
		t.Fatal(err)
	}
	newer := s.change(t, "robot")
	s.later(time.Hour) // the token that was got with it is over, too
	err := readWith(t, client, "team/app")
	if !errors.Is(err, oci.ErrUnauthorized) || !strings.Contains(err.Error(), "credential providers: refused: ") {
		t.Errorf("with what was revoked: %v", err)
	}
	if st := s.status(t, "team/app", c); st.Source != "" || len(st.Passed) != 1 || !strings.Contains(st.Passed[0].Reason, "HTTP 401") || st.Error == "" {
		t.Errorf("status %+v", st)
	}
	says(t, dir, "Image", s.host+"/team", "robot", newer)
	if err := readWith(t, client, "team/app"); err != nil {
		t.Errorf("with the newer one: %v", err)
	}
}

func TestPluginAnswers(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct{ script, want string }{
		"fails":     {"echo broken >&2; exit 3", "broken"},
		"no json":   {"echo s3cret", "isn't a CredentialProviderResponse"},
		"other api": {`echo '{"kind":"CredentialProviderResponse","apiVersion":"x/v9"}'`, "x/v9"},
		"no key":    {`echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1"}'`, "cacheKeyType"},
		"duration":  {`echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Image","cacheDuration":"soon"}'`, "soon"},
		"flood":     {"cat /dev/zero", "more than 1048576 bytes"},
		"nothing":   {`echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Image"}'`, "none"},
	} {
		t.Run(name, func(t *testing.T) {
			source := plugin(t, filepath.Join(dir, name), "a.io", "1m")
			program(t, filepath.Join(dir, name, "bin", "some-provider"), c.script+"\n")
			_, _, err := source.Credential(t.Context(), credentials.Request{Host: "a.io", Repository: "app"})
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%v, want %q in it", err, c.want)
			}
		})
	}
}

func TestPluginConfigurations(t *testing.T) {
	dir := t.TempDir()
	provider := func(name, match, duration, api string) string {
		return fmt.Sprintf("kind: CredentialProviderConfig\nproviders:\n- {name: %q, matchImages: [%s], defaultCacheDuration: %q, apiVersion: %q}\n", name, match, duration, api)
	}
	const v1 = "credentialprovider.kubelet.k8s.io/v1"
	good := provider("p", "a.io", "1m", v1)
	for name, content := range map[string]string{
		"kind":     "kind: Secret",
		"yaml":     "kind: [",
		"path":     provider("../p", "a.io", "1m", v1),
		"match":    provider("p", "", "1m", v1),
		"duration": provider("p", "a.io", "1", v1),
		"api":      provider("p", "a.io", "1m", "v1"),
		"twice":    good + "- {name: p, matchImages: [b.io], defaultCacheDuration: 1m, apiVersion: " + v1 + "}\n",
		"missing":  "",
	} {
		file := filepath.Join(dir, name+".yaml")
		if content != "" {
			write(t, file, content)
		}
		p, err := credentials.NewPlugins(credentials.PluginOptions{Config: file, BinDir: dir})
		if err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v", name, err)
		}
		if _, _, told := p.Credential(t.Context(), credentials.Request{Host: "a.io", Repository: "x"}); !errors.Is(told, err) {
			t.Errorf("%s: those who ask are told %v", name, told)
		}
	}
	write(t, filepath.Join(dir, "d", "1.yaml"), good)
	write(t, filepath.Join(dir, "d", "2.json"), `{"kind": "CredentialProviderConfig", "providers": [{"name": "q", "matchImages": ["b.io"], "defaultCacheDuration": "1m", "apiVersion": "`+v1+`"}]}`)
	if _, err := credentials.NewPlugins(credentials.PluginOptions{Config: filepath.Join(dir, "d"), BinDir: dir}); err != nil {
		t.Errorf("a directory: %v", err)
	}
}

func TestDocker(t *testing.T) {
	s, dir := newServer(t), t.TempDir()
	password := s.account(t, "robot")
	t.Setenv("PATH", filepath.Join(dir, "bin")+":"+os.Getenv("PATH"))
	program(t, filepath.Join(dir, "bin", "docker-credential-vault"), fmt.Sprintf(
		"read -r host; echo \"$host $1\" >>%[1]s/asked; test -e %[1]s/answer || { echo 'credentials not found in native keychain'; exit 1; }; exec cat %[1]s/answer\n", dir))
	config, answer := filepath.Join(dir, "config.json"), filepath.Join(dir, "answer")
	source := credentials.NewDocker(dir)
	check := func(what string, want error) {
		t.Helper()
		c := credentials.New(nil, source)
		if err := s.read(t, "team/app", c); !errors.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
		if want == nil && s.source(t, "team/app", c) != source.Name() {
			t.Errorf("%s: %+v", what, c.Status())
		}
	}
	check("no file yet", oci.ErrUnauthorized)
	write(t, config, auths(s.host, "robot", password))
	check("an entry", nil)
	write(t, config, auths("https://"+s.host+"/v1/team", "robot", password))
	check("an entry for some repositories", nil)
	write(t, config, auths(s.host+"/other", "robot", password))
	check("an entry for others", oci.ErrUnauthorized)
	write(t, config, `{"credsStore": "vault"}`)
	check("a helper without it", oci.ErrUnauthorized)
	write(t, answer, fmt.Sprintf(`{"Username": "robot", "Secret": %q}`, password))
	check("a helper", nil)
	write(t, config, strings.Replace(auths(s.host, "robot", "old"), "{", fmt.Sprintf(`{"credHelpers": {%q: "vault"},`, s.host), 1))
	check("an entry that is refused, before a helper", nil)
	identity := s.refreshToken(t)
	write(t, answer, fmt.Sprintf(`{"Username": "<token>", "Secret": %q}`, identity))
	check("a helper with an identity token", nil)
	write(t, config, fmt.Sprintf(`{"auths": {%q: {"identitytoken": %q}}}`, s.host, identity))
	check("an identity token", nil)
	write(t, config, `{"auths": s3cret`)
	c := credentials.New(nil, source)
	if err := s.read(t, "team/app", c); err == nil || !strings.Contains(err.Error(), "isn't JSON") || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("a damaged file: %v", err)
	}
	asked, _ := os.ReadFile(filepath.Join(dir, "asked"))
	if !strings.HasPrefix(string(asked), s.host+" get\n") {
		t.Errorf("the helper was asked with %q", asked)
	}
}

// refreshToken is what the registry gives for the machine's identity.
func (s *server) refreshToken(t *testing.T) string {
	t.Helper()
	a := credentials.NewAzure(credentials.AzureOptions{Hosts: []string{s.host}, IMDS: s.cloud.URL})
	c, _, err := a.Credential(t.Context(), credentials.Request{Host: s.host, Repository: "team/app"})
	if err != nil {
		t.Fatal(err)
	}
	return c.RefreshToken
}

func TestPullSecrets(t *testing.T) {
	s, dir := newServer(t), t.TempDir()
	password := s.account(t, "robot")
	c := credentials.New(nil, credentials.NewPullSecrets(filepath.Join(dir, "not there"), filepath.Join(dir, "secrets")))
	if err := s.read(t, "team/app", c); !errors.Is(err, oci.ErrUnauthorized) {
		t.Errorf("without any: %v", err)
	}
	// As kubelet mounts a secret: a link to a directory that is replaced.
	secret := filepath.Join(dir, "secrets", "team")
	mounted := func(version, content string) {
		write(t, filepath.Join(secret, version, ".dockerconfigjson"), content)
		_ = os.Remove(filepath.Join(secret, "..data"))
		if err := os.Symlink(version, filepath.Join(secret, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	mounted("..1", auths(s.host, "robot", "wrong"))
	if err := os.Symlink("..data/.dockerconfigjson", filepath.Join(secret, ".dockerconfigjson")); err != nil {
		t.Fatal(err)
	}
	if err := s.read(t, "team/app", c); !errors.Is(err, oci.ErrUnauthorized) || !strings.Contains(err.Error(), "pull secrets: refused") {
		t.Errorf("a wrong one: %v", err)
	}
	mounted("..2", auths(s.host, "robot", password))
	if err := s.read(t, "team/app", c); err != nil {
		t.Errorf("after it was changed: %v", err)
	}
	// A second secret counts when the first is refused.
	mounted("..3", auths(s.host, "robot", "wrong"))
	write(t, filepath.Join(dir, "secrets", "z", ".dockercfg"), strings.TrimSuffix(strings.TrimPrefix(auths(s.host, "robot", password), `{"auths": `), "}"))
	if err := s.read(t, "team/app", c); err != nil {
		t.Errorf("with a second one: %v", err)
	}
}

func TestAzure(t *testing.T) {
	s := newServer(t)
	c := running(t, credentials.New(nil, credentials.NewAzure(credentials.AzureOptions{Hosts: []string{s.host}, IMDS: s.cloud.URL, ClientID: "me"})))
	client := s.client(t, "team/app", c)
	if err := readWith(t, client, "team/app"); err != nil {
		t.Fatal(err)
	}
	st := s.status(t, "team/app", c)
	if left := time.Until(st.Until); st.Source != "Azure managed identity" || left < 2*time.Hour || left > 4*time.Hour {
		t.Errorf("status %+v", st)
	}
	s.later(10 * time.Minute) // access tokens are over, the refresh token isn't
	if err := readWith(t, client, "team/app"); err != nil {
		t.Error(err)
	}
	asked := s.cloud.requests()
	if len(asked) != 1 {
		t.Fatalf("the metadata service was asked %d times", len(asked))
	}
	if q := asked[0].URL.Query(); q.Get("client_id") != "me" || q.Get("resource") != "https://management.azure.com/" || q.Get("api-version") == "" {
		t.Errorf("asked with %v", q)
	}
}

func TestAzureRefused(t *testing.T) {
	s := newServer(t)
	options := credentials.AzureOptions{Hosts: []string{s.host}, IMDS: s.cloud.URL}
	for name, c := range map[string]struct{ says, who, want string }{
		"no identity":    {"Identity not found", "machine", "the machine's identity: HTTP 400: invalid_request Identity not found"},
		"not known here": {"", "stranger", "exchange at " + s.host + ": HTTP 401"},
	} {
		s.cloud.says, s.cloud.who = c.says, c.who
		chain := credentials.New(nil, credentials.NewAzure(options))
		err := s.read(t, "team/app", chain)
		if !errors.Is(err, oci.ErrUnauthorized) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A registry that nobody named never sees the machine's token.
	n := len(s.cloud.requests())
	if err := s.read(t, "team/app", credentials.New(nil, credentials.NewAzure(credentials.AzureOptions{IMDS: s.cloud.URL}))); !errors.Is(err, oci.ErrUnauthorized) {
		t.Error(err)
	}
	if len(s.cloud.requests()) != n {
		t.Error("the machine's token was asked for")
	}
}
