package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func load(t *testing.T, path string, env []string, flags map[string]string) *Registry {
	t.Helper()
	r, err := Load(path, env, flags)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// problems returns the lines of Load's error.
func problems(t *testing.T, path string, env []string, flags map[string]string) []string {
	t.Helper()
	_, err := Load(path, env, flags)
	var all Problems
	if !errors.As(err, &all) {
		t.Fatalf("error %v, want Problems", err)
	}
	return strings.Split(strings.ReplaceAll(err.Error(), path, "FILE"), "\n")
}

// The example has every key, with its default.
func TestExample(t *testing.T) {
	content, err := os.ReadFile("../../docs/registry.toml")
	if err != nil {
		t.Fatal(err)
	}
	text := string(content)
	got := load(t, write(t, "registry.toml", text), nil, nil)
	if d := cmp.Diff(Default(), got, cmpopts.IgnoreUnexported(Registry{})); d != "" {
		t.Errorf("the example isn't the default: %s", d)
	}
	for _, key := range Keys() {
		if !strings.Contains(key, ".0.") && !isSecret(key) && got.Origin(key) == "default" {
			t.Errorf("the example has no %s", key)
		}
	}
	// And with what is commented out.
	secret := write(t, "secret", "s3cret\n")
	full := ""
	for line := range strings.Lines(text) {
		if len(line) > 2 && line[0] == '#' && line[1] != ' ' {
			line = line[1:]
		}
		full += strings.ReplaceAll(line, "/etc/sluice/webhook-secret", secret)
	}
	got = load(t, write(t, "registry.toml", full), nil, nil)
	for _, key := range Keys() {
		if !isSecret(key) && got.Origin(key) == "default" {
			t.Errorf("the example has no %s, not even commented out", key)
		}
		if isSecret(key) && key != "database.url" && !strings.Contains(text, strings.TrimPrefix(key[strings.LastIndexByte(key, '.'):], ".")+"_file = ") {
			t.Errorf("the example has no file for %s", key)
		}
	}
	if got.Webhooks[0].Secret.Value() != "s3cret" {
		t.Errorf("the webhook's secret is %q", got.Webhooks[0].Secret.Value())
	}
}

func isSecret(key string) bool {
	return slices.Contains(Keys(), key+"_file") && key != "database.url"
}

func TestPrecedence(t *testing.T) {
	path := write(t, "registry.toml", "listen = \":1\"\ndata = \"/file\"\n[log]\nlevel = \"warn\"\n")
	got := load(t, path, []string{"SLUICE_REGISTRY_LISTEN=:2", "SLUICE_REGISTRY_DATA=/env", "HOME=/", EnvFile + "=" + path},
		map[string]string{"listen": ":3"})
	want := []string{":3 flag", "/env environment SLUICE_REGISTRY_DATA", "warn " + path + ":4", "text default"}
	have := []string{
		got.Listen + " " + got.Origin("listen"), got.Data + " " + got.Origin("data"),
		got.Log.Level + " " + got.Origin("log.level"), got.Log.Format + " " + got.Origin("log.format"),
	}
	if d := cmp.Diff(want, have); d != "" {
		t.Error(d)
	}
}

// Every key has a variable of its own, and what it sets is that key.
func TestEnvironment(t *testing.T) {
	names := map[string]string{}
	for _, key := range Keys() {
		name := EnvName(key)
		if names[name] != "" {
			t.Errorf("%s is of %s and %s", name, names[name], key)
		}
		names[name] = key
		r, err := Load("", []string{name + "=7"}, nil)
		if err == nil {
			if r.Origin(key) != "environment "+name {
				t.Errorf("%s didn't set %s", name, key)
			}
			continue
		}
		if text := err.Error(); strings.Contains(text, "no such key") || !strings.Contains(text, key) && !strings.Contains(text, name) && !strings.HasPrefix(key, "webhooks.0.") && !strings.HasPrefix(key, "auth.issuers.0.") {
			t.Errorf("%s: %v", name, err)
		}
	}
	got := load(t, "", []string{
		"SLUICE_REGISTRY_WEBHOOKS_1_URL=https://b/", "SLUICE_REGISTRY_WEBHOOKS_1_NAME=b", "SLUICE_REGISTRY_WEBHOOKS_0_URL=https://a/",
		"SLUICE_REGISTRY_WEBHOOKS_0_NAME=a", "SLUICE_REGISTRY_WEBHOOKS_0_ACTIONS=push, delete", "SLUICE_REGISTRY_WEBHOOKS_1_HEADERS=A=1,B=x=y",
		"SLUICE_REGISTRY_WEBHOOKS_0_SECRET=s", "SLUICE_REGISTRY_LIMITS_MAX_BLOB=2GiB", "SLUICE_REGISTRY_AUTH_ACCESS_LIFETIME=10m",
		"SLUICE_REGISTRY_AUTH_ENABLED=true", "SLUICE_REGISTRY_LIMITS_READS=10",
		// What Kubernetes sets beside a service named sluice-registry.
		"SLUICE_REGISTRY_SERVICE_HOST=10.0.0.1", "SLUICE_REGISTRY_SERVICE_PORT=5000", "SLUICE_REGISTRY_SERVICE_PORT_HTTP=5000",
		"SLUICE_REGISTRY_PORT=tcp://10.0.0.1:5000", "SLUICE_REGISTRY_PORT_5000_TCP_ADDR=10.0.0.1",
	}, nil)
	want := Default()
	want.Webhooks = []Webhook{
		{Name: "a", URL: "https://a/", Actions: []string{"push", "delete"}, Secret: "s"},
		{Name: "b", URL: "https://b/", Headers: map[string]string{"A": "1", "B": "x=y"}},
	}
	want.Limits.MaxBlob, want.Limits.Reads, want.Auth.AccessLifetime, want.Auth.Enabled = 2<<30, 10, 10*time.Minute, true
	if d := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Registry{})); d != "" {
		t.Error(d)
	}
}

func TestProblems(t *testing.T) {
	for name, c := range map[string]struct {
		file  string
		env   []string
		flags map[string]string
		want  []string
	}{
		"syntax": {file: "listen = \"x\ndata = 1", want: []string{"FILE:1:"}},
		"unknown": {
			file: "lisen = \":1\"\n[storage]\nkindd = \"s3\"\n[storage.s3]\nbukket = \"b\"\n[nothing.like.it]\na = 1\n",
			env:  []string{"SLUICE_REGISTRY_LOG_LEVELL=info"}, flags: map[string]string{"log.form": "json"},
			want: []string{
				"lisen (FILE:1): there is no such key; did you mean listen?",
				"nothing (FILE): there is no such key",
				"storage.kindd (FILE:3): there is no such key; did you mean storage.kind?",
				"storage.s3.bukket (FILE:5): there is no such key; did you mean storage.s3.bucket?",
				"SLUICE_REGISTRY_LOG_LEVELL (environment): there is no such key; did you mean SLUICE_REGISTRY_LOG_LEVEL?",
				"log.form (flag): there is no such key; did you mean log.format?",
			},
		},
		"wrong table": {file: "bucket = \"b\"", want: []string{"bucket (FILE:1): there is no such key; did you mean storage.s3.bucket?"}},
		"types": {
			file: "listen = 1\ndata = \"\"\nwebhooks = 3\nlog = \"info\"\n[auth]\nenabled = \"yes\"\naccess_lifetime = 75\nrefresh_lifetime = \"3 hours\"\n[limits]\nreads = 1.5\nwrites = 99999999999999\nmax_blob = \"5 parsecs\"\nmax_manifest = -1\n",
			want: []string{
				"auth.access_lifetime = 75 (FILE:7): a duration",
				"auth.enabled = yes (FILE:6): true or false",
				"auth.refresh_lifetime = 3 hours (FILE:8): a duration",
				"limits.max_blob = 5 parsecs (FILE:12): a number of bytes",
				"limits.max_manifest = -1 (FILE:13): a number of bytes",
				"limits.reads = 1.5 (FILE:10): a whole number",
				"limits.writes = 99999999999999 (FILE:11): a whole number",
				"listen = 1 (FILE:1): a string",
				"log = info (FILE:4): a table",
				"webhooks = 3 (FILE:3): a list of tables",
				`data = "" (FILE:2): a directory`,
			},
		},
		"values": {
			file: "listen = \"here\"\n[storage]\nkind = \"floppy\"\nredirect = \"1s\"\n[tls]\ncert = \"x\"\n[soft_delete]\ndays = 91\n[log]\nlevel = \"loud\"\n[garbage_collection]\ngrace = \"0s\"\n[auth.admin]\nenabled = true\n",
			env:  []string{"SLUICE_REGISTRY_LIMITS_READS=-1", "SLUICE_REGISTRY_TRACES_ENDPOINT=somewhere"},
			want: []string{
				`listen = "here" (FILE:1): HOST:PORT`,
				`storage.kind = "floppy" (FILE:3): local, azure, s3`,
				`storage.redirect = "1s" (FILE:4): a duration from`,
				`tls.key = "" (default): a file (PEM), since tls.cert is set`,
				`auth.admin.enabled = true (FILE:14): false, or auth.enabled = true`,
				`limits.reads = -1 (environment SLUICE_REGISTRY_LIMITS_READS): requests a minute`,
				`soft_delete.days = 91 (FILE:8): 0 (deleted at once) or 1 to 90`,
				`garbage_collection.grace = "0s" (FILE:12): a duration from`,
				`log.level = "loud" (FILE:10): debug, info, warn, error`,
				`traces.endpoint = "somewhere" (environment SLUICE_REGISTRY_TRACES_ENDPOINT): a URL`,
			},
		},
		"lists": {
			file: "[[webhooks]]\nname = \"a\"\nurl = \"https://h/\"\n[[webhooks]]\nname = \"a\"\nurl = \"ftp://h/\"\nactions = [\"push\", \"sing\"]\nrepositories = [\"*/x\"]\n[[auth.issuers]]\nurl = \"http://example.com\"\n[[auth.issuers.rules]]\nclaims = { sub = \"*x\" }\n",
			want: []string{
				`auth.issuers.0.url = "http://example.com" (FILE:10): a URL that begins with https://`,
				`auth.issuers.0.audience = "" (default): the audience`,
				`auth.issuers.0.rules.0.scope_map = "" (default): the name`,
				`auth.issuers.0.rules.0.claims = { "sub" = "(hidden)" } (FILE:12): values with * only at the end`,
				`webhooks.1.name = "a" (FILE:5): a name that no other webhook has`,
				`webhooks.1.url = "ftp://h/" (FILE:6): a URL`,
				`webhooks.1.actions = ["push", "sing"] (FILE:7): some of push`,
				`webhooks.1.repositories = ["*/x"] (FILE:8): names`,
			},
		},
		"s3": {
			file: "[storage]\nkind = \"s3\"\n[storage.s3]\nendpoint = \"https://x\"\naccess_key = \"k\"\nsecret_key = \"hunter2\"\nprefix = \"../x\"\n",
			want: []string{
				"storage.s3.secret_key = (hidden) (FILE:6): a secret is not written here",
				"storage.s3.endpoint =", "storage.s3.bucket =", "storage.s3.access_key =", "storage.s3.prefix =",
			},
		},
		"azure": {
			file: "[storage]\nkind = \"azure\"\n", want: []string{"storage.azure.service_url =", "storage.azure.container ="},
		},
		"secret files": {
			file: "[auth.admin]\npassword_file = \"/none\"\n[database]\nurl = \"postgres://u:hunter2@h/d\"\n",
			want: []string{`auth.admin.password_file = /none (FILE:2): a file with the secret`, "database.url = \"(hidden)\" (FILE:4): no password"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := problems(t, write(t, "registry.toml", c.file), c.env, c.flags)
			for i := range max(len(got), len(c.want)) {
				have, want := "", "nothing"
				if i < len(got) {
					have = got[i]
				}
				if i < len(c.want) {
					want = c.want[i]
				}
				if !strings.HasPrefix(have, want) {
					t.Errorf("%d: %s\nwant %s…", i, have, want)
				}
				if strings.Contains(have, "hunter2") {
					t.Errorf("it tells a secret: %s", have)
				}
			}
		})
	}
}

// No form of printing shows a secret.
func TestNoSecrets(t *testing.T) {
	secret := write(t, "secret", "hunter2\n")
	r := load(t, "", []string{
		"SLUICE_REGISTRY_AUTH_ADMIN_PASSWORD=hunter2", "SLUICE_REGISTRY_DATABASE_URL=postgres://u:hunter2@h/d",
		"SLUICE_REGISTRY_STORAGE_S3_SECRET_KEY_FILE=" + secret, "SLUICE_REGISTRY_STORAGE_AZURE_CONNECTION_STRING=AccountKey=hunter2",
		"SLUICE_REGISTRY_WEBHOOKS_0_URL=https://u:hunter2@h/?token=hunter2", "SLUICE_REGISTRY_WEBHOOKS_0_NAME=a",
		"SLUICE_REGISTRY_WEBHOOKS_0_HEADERS=Authorization=Bearer hunter2", "SLUICE_REGISTRY_WEBHOOKS_0_SECRET=hunter2",
		"SLUICE_REGISTRY_TRACES_ENDPOINT=https://u:hunter2@h", "SLUICE_REGISTRY_STORAGE_S3_ACCESS_KEY=key",
	}, nil)
	if r.Storage.S3.SecretKey.Value() != "hunter2" || r.Auth.Admin.Password.Value() != "hunter2" || r.DatabaseURL() != "postgres://u:hunter2@h/d" {
		t.Error("the secrets are not there")
	}
	for _, text := range []string{
		r.String(), fmt.Sprintf("%v %+v %#v %s", r, r, r, r), fmt.Sprintf("%v %+v %#v", r.Auth, r.Auth, r.Database), fmt.Sprintf("%q %x", r.Auth.Admin.Password, r.Auth.Admin.Password),
	} {
		if strings.Contains(text, "hunter2") || strings.Contains(text, "68756e74657232") {
			t.Errorf("a secret shows: %s", text)
		}
	}
	if !strings.Contains(r.String(), "auth.admin.password = \"(hidden)\"  # environment SLUICE_REGISTRY_AUTH_ADMIN_PASSWORD") {
		t.Errorf("the dump doesn't tell that there is a password:\n%s", r)
	}
}

// What is printed can be read again.
func TestDump(t *testing.T) {
	r := Default()
	r.Limits.MaxBlob, r.Push.UploadAge, r.Storage.Kind = 3<<30, 90*time.Second, StorageLocal
	got := load(t, write(t, "dump.toml", withoutSecrets(r.String())), nil, nil)
	if d := cmp.Diff(r, got, cmpopts.IgnoreUnexported(Registry{})); d != "" {
		t.Error(d)
	}
}

func withoutSecrets(dump string) string {
	kept := ""
	for line := range strings.Lines(dump) {
		if key, _, _ := strings.Cut(line, " ="); !isSecret(key) {
			kept += line
		}
	}
	return kept
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]Size{
		"0": 0, "123": 123, "4MiB": 4 << 20, "10 GB": 10e9, "1TiB": 1 << 40, "5B": 5, "7kB": 7000,
		"": -1, "-1": -1, "1.5GiB": -1, "GiB": -1, "9999999TiB": -1, "8388608TiB": -1, "0x10": -1, "1_000": -1,
	} {
		got, err := ParseSize(text)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
		if back, err := ParseSize(got.String()); got >= 0 && (err != nil || back != got) {
			t.Errorf("%d prints as %v", got, got)
		}
	}
}

// Whatever a file has, it is told what is wrong or gives a configuration that
// Check likes.
func FuzzLoad(f *testing.F) {
	example, err := os.ReadFile("../../docs/registry.toml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(example))
	f.Add("[[webhooks]]\nurl = 1\n[webhooks.headers]\na = [1]\n")
	f.Add("auth.issuers = [{ rules = [{ claims = {} }] }]")
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(dir, "fuzz.toml")
		if strings.Contains(text, "_file") { // it would read any
			return
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := Load(path, nil, nil)
		var all Problems
		switch {
		case err == nil:
			if err := r.Check(); err != nil {
				t.Fatalf("accepted, and then: %v", err)
			}
		case !errors.As(err, &all) || len(all) == 0:
			t.Fatalf("%T: %v", err, err)
		}
	})
}
