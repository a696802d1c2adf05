package credentials

import (
	"strings"
	"testing"
	"time"

	"sluice/internal/remote"
)

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		pattern, image string
		want           bool
	}{
		// those of Kubernetes' documentation
		{"*.azurecr.io", "a.azurecr.io/app", true},
		{"*.k8s.io", "k8s.io/app", false},
		{"*.k8s.io", "a.b.k8s.io/app", false},
		{"*.*.k8s.io", "a.b.k8s.io/app", true},
		{"app.k8s*.io", "app.k8s-1.io/app", true},
		{"k8s.*.io", "k8s.a.io/app", true},
		{"123456789.dkr.ecr.us-east-1.amazonaws.com", "123456789.dkr.ecr.us-east-1.amazonaws.com/app", true},
		{"*.registry.io:8080/path", "a.registry.io:8080/path/app", true},
		{"*.registry.io:8080/path", "a.registry.io:8080/other", false},
		{"*.registry.io:8080/path", "a.registry.io/path/app", false},
		{"registry.io", "registry.io:8080/app", false},
		{"registry.io/foo/bar", "registry.io/foo/bar/app", true},
		{"*", "localhost/app", true},
		{"*", "a.io/app", false},
		// docker's ways to write
		{"https://index.docker.io/v1/", "docker.io/library/debian", true},
		{"docker.io", "docker.io/library/debian", true},
		{"registry-1.docker.io", "docker.io/library/debian", true},
		{"https://registry.io/v2/", "registry.io/app", true},
		{"http://registry.io", "registry.io/app", true},
		{"REGISTRY.io", "registry.io/app", true},
		{"[::1]:5000", "[::1]:5000/app", true},
		// nonsense
		{"", "registry.io/app", false},
		{"[", "registry.io/app", false},
		{"*.io/[", "registry.io/app", false},
	} {
		host, repository, _ := strings.Cut(c.image, "/")
		if got := matches(c.pattern, Request{Host: host, Repository: repository}); got != c.want {
			t.Errorf("%q for %s: %v", c.pattern, c.image, got)
		}
	}
}

func TestAuthsFind(t *testing.T) {
	const content = `{"auths": {
		"registry.io": {"auth": "YWxsOjE="},
		"https://registry.io/team": {"username": "team", "password": "2"},
		"registry.io/team/app": {"identitytoken": "3"},
		"registry.io/other": {"auth": "%%%"},
		"registry.io/bare": {"auth": "bm8gY29sb24="},
		"registry.io/none": {}
	}}`
	a, err := parseAuths([]byte(content))
	if err != nil {
		t.Fatal(err)
	}
	all, team := remote.Credential{Username: "all", Password: "1"}, remote.Credential{Username: "team", Password: "2"}
	app := remote.Credential{RefreshToken: "3"}
	for _, c := range []struct {
		repository string
		refused    []remote.Credential
		want       remote.Credential
	}{
		{"x", nil, all},
		{"team/x", nil, team},
		{"team/app", nil, app},
		{"team/app", []remote.Credential{app}, team},
		{"team/app", []remote.Credential{app, team}, all},
		{"team/app", []remote.Credential{app, team, all}, all}, // a refused one, so that it can be told
		{"other/x", nil, all},                                  // what is broken hides nothing
		{"bare/x", nil, all},
		{"none/x", nil, all},
	} {
		if got, err := a.find(Request{Host: "registry.io", Repository: c.repository, Refused: c.refused}); got != c.want || err != nil {
			t.Errorf("%s: %+v, %v", c.repository, got, err)
		}
	}
	if _, err := a.find(Request{Host: "elsewhere.io", Repository: "x"}); err != ErrNone {
		t.Errorf("elsewhere: %v", err)
	}
	a, err = parseAuths([]byte(`{"old.io": {"auth": "YWxsOjE="}}`)) // kubernetes.io/dockercfg
	if got, ferr := a.find(Request{Host: "old.io", Repository: "x"}); err != nil || ferr != nil || got != all {
		t.Errorf("the older form: %+v, %v, %v", got, err, ferr)
	}
}

func FuzzParseAuths(f *testing.F) {
	f.Add([]byte(`{"auths":{"a.io":{"auth":"YTpi"}}}`), "a.io", "app")
	f.Add([]byte(`{"a.io/v1/x":{"username":"a","password":"b"}}`), "a.io", "x")
	f.Add([]byte(`{"auths":{"[::1]:5000":{"auth":"AA=="}}}`), "[::1]:5000", "x")
	f.Fuzz(func(t *testing.T, content []byte, host, repository string) {
		a, err := parseAuths(content)
		if err != nil {
			return
		}
		c, err := a.find(Request{Host: host, Repository: repository})
		if err == nil && c == (remote.Credential{}) {
			t.Error("neither a credential nor an error")
		}
	})
}

func FuzzPluginAnswer(f *testing.F) {
	f.Add([]byte(`{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","kind":"CredentialProviderResponse","cacheKeyType":"Image","cacheDuration":"1h","auth":{"*.a.io":{"username":"a","password":"b"}}}`))
	f.Add([]byte(`{"kind":"CredentialProviderResponse","cacheKeyType":"Global","auth":null}`))
	p := &plugin{providerConfig: providerConfig{APIVersion: pluginAPI + "v1"}}
	f.Fuzz(func(t *testing.T, answer []byte) {
		g, err := p.parse(answer, Request{Host: "x.a.io", Repository: "app"})
		if err == nil && g.key == "" {
			t.Error("it has no key")
		}
	})
}

func FuzzProviders(f *testing.F) {
	f.Add([]byte("kind: CredentialProviderConfig\nproviders:\n- name: a\n  matchImages: ['*.a.io']\n  defaultCacheDuration: 10m\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n"))
	f.Add([]byte("a: &a [*a, *a]"))
	f.Fuzz(func(t *testing.T, content []byte) {
		all, err := parseProviders(content)
		if err != nil {
			return
		}
		for _, c := range all {
			_, _ = newPlugin(c, PluginOptions{BinDir: "/bin"}) // it doesn't panic
		}
	})
}

func FuzzPassedFile(f *testing.F) {
	f.Add([]byte(`[{"host":"a.io","repository":"x","credential":{"Username":"a"},"proven":true}]`))
	f.Fuzz(func(t *testing.T, content []byte) {
		p := NewPassed("", nil)
		var err error
		if p.kept, err = parsePassed(content, time.Now()); err != nil {
			return
		}
		p.Listed(nil)
	})
}

func FuzzToken(f *testing.F) {
	f.Add("a.eyJleHAiOjF9.b")
	f.Fuzz(func(t *testing.T, token string) {
		if claimsOf(token).Expiry != 0 && !strings.Contains(token, ".") {
			t.Error("claims of nothing")
		}
	})
}
