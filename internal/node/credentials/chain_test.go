package credentials_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/auth"
	"sluice/internal/node/credentials"
	"sluice/internal/remote"
	"sluice/oci"
)

// node has all sources, each with a password of its own.
type node struct {
	*credentials.Chain
	passed *credentials.Passed
	log    *logged
	dir    string
	all    []credentials.Source
}

func newNode(t *testing.T, s *server) *node {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("PATH", filepath.Join(dir, "bin")+":"+os.Getenv("PATH"))
	n := &node{passed: credentials.NewPassed("", nil), dir: dir}
	n.all = []credentials.Source{
		n.passed,
		plugin(t, filepath.Join(dir, "plugin"), s.host, "0s"),
		credentials.NewDocker(filepath.Join(dir, "docker")),
		credentials.NewPullSecrets(filepath.Join(dir, "secrets")),
		credentials.NewAzure(credentials.AzureOptions{Hosts: []string{s.host}, IMDS: s.cloud.URL}),
	}
	log, lines := newLog()
	n.log = lines
	n.Chain = running(t, credentials.New(log, n.all...))
	return n
}

// set gives each source a password.
func (n *node) set(t *testing.T, s *server, passed, plugin, docker, secret string) {
	t.Helper()
	n.passed.Pull(s.host+"/team/app:v1", remote.Credential{Username: "cri", Password: passed})(nil)
	says(t, filepath.Join(n.dir, "plugin"), "Image", s.host, "plugin", plugin)
	write(t, filepath.Join(n.dir, "docker", "config.json"), auths(s.host, "docker", docker))
	write(t, filepath.Join(n.dir, "secrets", "x", ".dockerconfigjson"), auths(s.host, "secret", secret))
}

// The sources are asked in their order; one that is refused makes way for the
// next, also while a mount lives.
func TestOrder(t *testing.T) {
	s := newServer(t)
	n := newNode(t, s)
	names := []string{"cri", "plugin", "docker", "secret"}
	var passwords []string
	for _, name := range names {
		passwords = append(passwords, s.account(t, name))
	}
	n.set(t, s, passwords[0], passwords[1], passwords[2], passwords[3])
	client := s.client(t, "team/app", n.Chain)
	for i, source := range n.all {
		if err := readWith(t, client, "team/app"); err != nil {
			t.Fatalf("%s: %v", source.Name(), err)
		}
		st := s.status(t, "team/app", n.Chain)
		if st.Source != source.Name() || len(st.Passed) != i {
			t.Fatalf("%s: status %+v", source.Name(), st)
		}
		if i < len(names) {
			s.change(t, names[i]) // revokes it
			s.later(time.Hour)    // and ends the token that was got with it
		}
	}
	// When it is another repository's turn, nothing of that is known.
	if err := s.read(t, "other/app", n.Chain); err != nil {
		t.Error(err)
	}
	// A pull with a new password counts at once.
	n.passed.Pull(s.host+"/team/app:v1", remote.Credential{Username: "cri", Password: s.change(t, "cri")})
	s.later(time.Hour)
	if err := readWith(t, client, "team/app"); err != nil || s.source(t, "team/app", n.Chain) != "CRI" {
		t.Errorf("%v, %+v", err, n.Status())
	}
}

// Whatever is wrong with whom, the reason names each and shows no secret.
func TestReasons(t *testing.T) {
	s := newServer(t)
	n := newNode(t, s)
	s.cloud.says = "no identity"
	n.set(t, s, "pl4nted-1", "pl4nted-2", "pl4nted-3", "pl4nted-4")
	err := s.read(t, "team/app", n.Chain)
	if !errors.Is(err, oci.ErrUnauthorized) {
		t.Fatal(err)
	}
	st := s.status(t, "team/app", n.Chain)
	if st.Source != "" || !strings.Contains(st.Error, "without credentials: no token: HTTP 401") {
		t.Errorf("status %+v", st)
	}
	for i, source := range n.all {
		if !strings.Contains(err.Error(), source.Name()+": ") {
			t.Errorf("%s isn't in %v", source.Name(), err)
		}
		if i >= len(st.Passed) || st.Passed[i].Source != source.Name() || st.Passed[i].Reason == "" {
			t.Errorf("%s isn't in the status: %+v", source.Name(), st.Passed)
		}
	}
	if log := n.log.String(); !strings.Contains(log, "a registry refuses this node") || strings.Count(log, "level=WARN") > 8 {
		t.Errorf("the log has\n%s", log)
	}
	before := n.log.String()
	_ = s.read(t, "team/app", n.Chain)
	if after := n.log.String(); after != before {
		t.Errorf("the log repeats itself: %s", strings.TrimPrefix(after, before))
	}
}

// A host that stands for an image's registry, as hosts.toml may say, is given what
// kubelet has for the image, and what docker has for the host.
func TestMirror(t *testing.T) {
	s := newServer(t)
	const registry = "registry.example.com"
	for _, c := range []struct{ source, user, name string }{
		{"CRI", "cri", registry},
		{"credential providers", "plugin", registry},
		{"pull secrets", "secret", registry},
		{"docker's configuration", "docker", s.host},
	} {
		dir, password := t.TempDir(), s.account(t, c.user)
		for what, name := range map[string]string{"of the host": s.host, "of the registry": registry} {
			dir, passed := filepath.Join(dir, strings.ReplaceAll(what, " ", "-")), credentials.NewPassed("", nil)
			says(t, dir, "Image", "nobody.io", "u", "p")
			chain := credentials.New(nil, passed, plugin(t, dir, registry, "0s"), credentials.NewPullSecrets(filepath.Join(dir, "secret")), credentials.NewDocker(dir))
			map[string]func(){
				"cri":    func() { passed.Pull(name+"/team/app", remote.Credential{Username: c.user, Password: password})(nil) },
				"plugin": func() { says(t, dir, "Image", name, c.user, password) },
				"secret": func() { write(t, filepath.Join(dir, "secret"), auths(name, c.user, password)) },
				"docker": func() { write(t, filepath.Join(dir, "config.json"), auths(name, c.user, password)) },
			}[c.user]()
			client, err := remote.New(s.host, remote.Options{Credentials: chain.For(registry, "team/app")})
			if err != nil {
				t.Fatal(err)
			}
			if err := readWith(t, client, "team/app"); (err == nil) != (name == c.name) {
				t.Errorf("%s, by the name %s: %v", c.source, what, err)
			}
		}
	}
}

// A registry that refuses by mistake doesn't lock its only credential out.
func TestRefusedByMistake(t *testing.T) {
	s, dir := newServer(t), t.TempDir()
	secret := filepath.Join(dir, ".dockerconfigjson")
	write(t, secret, auths(s.host, "robot", s.account(t, "robot")))
	c := credentials.New(nil, credentials.NewPullSecrets(secret))
	set := func(status auth.Status) {
		if _, err := s.UpdateToken(t.Context(), "robot", func(a *auth.Token) error { a.Status = status; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	set(auth.Disabled)
	client := s.client(t, "team/app", c)
	if err := readWith(t, client, "team/app"); !errors.Is(err, oci.ErrUnauthorized) {
		t.Fatalf("while it is disabled: %v", err)
	}
	set(auth.Enabled)
	if err := readWith(t, client, "team/app"); err != nil || s.source(t, "team/app", c) != "pull secrets" {
		t.Errorf("after that: %v, %+v", err, c.Status())
	}
}

// A registry that says 403 to a password that is over means the same: the newer
// one is used, also where a client sends the password itself, as to ECR.
func TestForbidden(t *testing.T) {
	var right atomic.Value
	right.Store("first")
	reg := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, password, ok := r.BasicAuth()
		switch {
		case !ok:
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
		case password != right.Load():
			w.WriteHeader(http.StatusForbidden)
		default:
			w.Header().Set("Content-Type", oci.MediaTypeIndex)
			_, _ = io.WriteString(w, index)
		}
	}))
	t.Cleanup(reg.Close)
	s, secret := &server{host: strings.TrimPrefix(reg.URL, "http://")}, filepath.Join(t.TempDir(), ".dockerconfigjson")
	c := credentials.New(nil, credentials.NewPullSecrets(secret))
	client := s.client(t, "team/app", c)
	for _, password := range []string{"first", "second", "third"} {
		write(t, secret, auths(s.host, "AWS", password))
		right.Store(password)
		if err := readWith(t, client, "team/app"); err != nil {
			t.Errorf("with the %s password: %v", password, err)
		}
	}
	right.Store("fourth")
	if err := readWith(t, client, "team/app"); !errors.Is(err, oci.ErrUnauthorized) || !strings.Contains(err.Error(), "pull secrets: refused: HTTP 403") {
		t.Errorf("with the third when there's a fourth: %v", err)
	}
}

// No secret is ever shown, wherever it comes from and whatever becomes of it.
func TestNoSecretIsShown(t *testing.T) {
	s := newServer(t)
	var secrets, shown []string
	plant := func(n int) string {
		p := fmt.Sprintf("pl4nted-%d", n)
		secrets = append(secrets, p)
		return p
	}
	show := func(n *node, err error) {
		status, jerr := json.Marshal(n.Status())
		if jerr != nil {
			t.Fatal(jerr)
		}
		shown = append(shown, fmt.Sprint(err), string(status), fmt.Sprintf("%v %+v %#v", n.Status(), n.Status(), n.Chain.Status()), n.log.String())
	}
	// refused
	n := newNode(t, s)
	s.cloud.says = "no identity"
	n.set(t, s, plant(1), plant(2), plant(3), plant(4))
	show(n, s.read(t, "team/app", n.Chain))
	// damaged
	write(t, filepath.Join(n.dir, "plugin", "answer"), `{"kind": "CredentialProviderResponse", "auth": {"x": {"password": "`+plant(5)+`"}}, "cacheKeyType": 7`)
	write(t, filepath.Join(n.dir, "docker", "config.json"), `{"auths": {"`+s.host+`": {"auth": "`+plant(6)+`"}}, "credsStore": "leaky"}`)
	write(t, filepath.Join(n.dir, "secrets", "x", ".dockerconfigjson"), `{"auths": {"`+s.host+`": {"auth": "`+plant(7)+`"}}`)
	program(t, filepath.Join(n.dir, "bin", "docker-credential-leaky"), "echo '{\"Secret\": "+plant(8)+"'\n")
	show(n, s.read(t, "team/app", n.Chain))
	program(t, filepath.Join(n.dir, "plugin", "bin", "some-provider"), "cat "+n.dir+"/plugin/answer; exit 1\n")
	show(n, s.read(t, "other/app", n.Chain))
	// right
	s.cloud.says = ""
	right := s.account(t, "cri")
	secrets = append(secrets, right)
	n = newNode(t, s)
	n.set(t, s, right, plant(9), plant(10), plant(11))
	show(n, s.read(t, "team/app", n.Chain))
	cred, err := n.For("", "team/app")(t.Context(), s.host)
	if err != nil || cred.Password != right {
		t.Fatal("the right one isn't used")
	}
	shown = append(shown, fmt.Sprintf("%v %+v %#v %s", cred, cred, cred, cred), fmt.Sprintf("%+v", credentials.Request{Refused: []remote.Credential{cred}}))
	show(n, s.read(t, "other/app", n.Chain)) // by the machine's identity
	secrets = append(secrets, "eyJ")         // tokens begin like that
	for _, text := range shown {
		for _, secret := range secrets {
			if strings.Contains(text, secret) {
				t.Errorf("%q is shown: %s", secret, text)
			}
		}
	}
}

// volatile is a directory on a file system in memory.
func volatile(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "credentials-")
	if err != nil {
		t.Skip("there's no tmpfs at /dev/shm: ", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestPassedOutlivesTheDaemon(t *testing.T) {
	s := newServer(t)
	right := remote.Credential{Username: "robot", Password: s.account(t, "robot")}
	file := filepath.Join(volatile(t), "credentials.json")
	p := credentials.NewPassed(file, nil)
	p.Pull(s.host+"/team/app:v1", right)(nil)
	p.Pull(s.host+"/other/app:v1", right) // never ended: the daemon is killed
	if fi, err := os.Stat(file); err != nil || fi.Mode() != 0o600 {
		t.Fatalf("%v, %v", fi, err)
	}
	next := credentials.New(nil, credentials.NewPassed(file, nil))
	if err := s.read(t, "team/app", next); err != nil {
		t.Errorf("the next daemon: %v", err)
	}
	if err := s.read(t, "other/app", next); !errors.Is(err, oci.ErrUnauthorized) {
		t.Errorf("what wasn't proven: %v", err)
	}
	// A file that others can read, or that is damaged, is nothing to trust; and
	// no reason not to start.
	for what, spoil := range map[string]func() error{
		"readable":  func() error { return os.Chmod(file, 0o644) },
		"damaged":   func() error { return errors.Join(os.Truncate(file, 20), os.Chmod(file, 0o600)) },
		"directory": func() error { return errors.Join(os.Remove(file), os.Mkdir(file, 0o700)) },
		"link":      func() error { return errors.Join(os.Remove(file), os.Symlink("/dev/zero", file)) },
	} {
		_ = os.RemoveAll(file)
		credentials.NewPassed(file, nil).Pull(s.host+"/team/app:v1", right)(nil)
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		log, lines := newLog()
		_, _, err := credentials.NewPassed(file, log).Credential(t.Context(), credentials.Request{Host: s.host, Repository: "team/app"})
		if !errors.Is(err, credentials.ErrNone) || !strings.Contains(lines.String(), "is lost") || strings.Contains(lines.String(), right.Password) {
			t.Errorf("%s: %v, log %s", what, err, lines)
		}
	}
}

// On a disk nothing is stored.
func TestPassedStaysInMemory(t *testing.T) {
	dir := t.TempDir()
	log, lines := newLog()
	p := credentials.NewPassed(filepath.Join(dir, "credentials.json"), log)
	p.Pull("a.io/app:v1", remote.Credential{Username: "u", Password: "p"})(nil)
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		if strings.Contains(lines.String(), "file system in memory") {
			t.Errorf("%v, %v", left, err)
		} else {
			t.Skip("temporary files are in memory here")
		}
	}
}

func TestPassed(t *testing.T) {
	p := credentials.NewPassed("", nil)
	req := credentials.Request{Host: "a.io", Repository: "app"}
	get := func(refused ...remote.Credential) string {
		req.Refused = refused
		c, _, err := p.Credential(t.Context(), req)
		if err != nil {
			return err.Error()
		}
		return c.Username
	}
	user := func(name string) remote.Credential { return remote.Credential{Username: name, Password: "x"} }
	p.Pull("not a reference!", user("a"))(nil)
	p.Pull("a.io/app:v1", remote.Credential{})(nil)
	p.Pull("a.io/app:v1", remote.Credential{Username: strings.Repeat("x", 1<<20)})(nil)
	if got := get(); got != "none" {
		t.Errorf("nonsense gives %s", got)
	}
	end := p.Pull("a.io/app:v1", user("a"))
	if got := get(); got != "a" {
		t.Errorf("during the pull: %s", got)
	}
	end(errors.New("refused"))
	if got := get(); got != "none" {
		t.Errorf("after a pull that failed: %s", got)
	}
	p.Pull("a.io/app@sha256:"+strings.Repeat("0", 64), user("a"))(nil)
	p.Pull("a.io/app:v2", user("a"))(errors.New("no such tag"))
	for i := range 10 {
		p.Pull("a.io/app:v2", user(fmt.Sprint("wrong", i)))(errors.New("refused"))
	}
	if got := get(); got != "a" {
		t.Errorf("after other pulls failed: %s", got)
	}
	p.Pull("a.io/app:v1", user("b"))(nil)
	if got := get(); got != "b" {
		t.Errorf("after a second one: %s", got)
	}
	if got := get(user("b")); got != "a" {
		t.Errorf("when that is refused: %s", got)
	}
	for i := range 10 {
		p.Pull("a.io/app:v1", user(fmt.Sprint(i)))(nil)
	}
	var refused []remote.Credential
	for !slices.Contains(refused, user(get(refused...))) {
		refused = append(refused, user(get(refused...)))
	}
	if len(refused) != 4 {
		t.Errorf("of one repository %v are kept", len(refused))
	}
	p.Listed([]string{"b.io/app:v1"}) // a list that was made before the pull ended
	if got := get(); got != "9" {
		t.Errorf("after a list: %s", got)
	}
}

// Whatever brings other credentials for a repository changes the chain's version
// for it, and nothing else does.
func TestVersion(t *testing.T) {
	dir := t.TempDir()
	p := credentials.NewPassed("", nil)
	c := credentials.New(nil, p, credentials.NewDocker(filepath.Join(dir, "docker")), credentials.NewPullSecrets(filepath.Join(dir, "secrets")))
	user := func(name string) remote.Credential { return remote.Credential{Username: name, Password: "secret"} }
	version := c.Version("a.io", "app")
	changes := func(what string, want bool) {
		t.Helper()
		now := c.Version("a.io", "app")
		if (now != version) != want {
			t.Errorf("%s: from %q to %q", what, version, now)
		}
		if strings.Contains(now, "secret\"") {
			t.Errorf("%s: the version tells a password: %q", what, now)
		}
		version = now
	}
	changes("nothing", false)
	p.Pull("a.io/app:v1", user("a"))(nil)
	changes("a credential came with a pull", true)
	p.Pull("a.io/app:v2", user("a"))(nil)
	changes("the same came again", false)
	p.Pull("a.io/app:v1", user("b"))(nil)
	changes("another came", true)
	p.Pull("a.io/app:v1", user("a"))(nil)
	changes("the first came again", false)
	p.Pull("a.io/other:v1", user("c"))(nil)
	changes("one came for another repository", false)
	for _, name := range []string{"docker/config.json", "secrets/x/.dockerconfigjson", "secrets/.dockercfg"} {
		write(t, filepath.Join(dir, name), auths("a.io", "u", "one"))
		changes(name+" is there", true)
		write(t, filepath.Join(dir, name), auths("a.io", "u", "three"))
		changes(name+" changes", true)
	}
	changes("nothing", false)
}
