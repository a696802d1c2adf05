package hosts_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"

	"sluice/internal/node/hosts"
	"sluice/oci"
)

// configurations are hosts.toml files. A, B and C are URLs of servers, AA is the
// host and port of A.
var configurations = map[string]string{
	"no file":              "",
	"server":               `server = "A"`,
	"mirror":               "server = \"A\"\n[host.\"B\"]",
	"order":                "server = \"A\"\n[host.\"C\"]\n[host.\"B\"]",
	"subtables":            "server = \"A\"\n[host.\"C\"]\n[host.\"C\".header]\nX-Test = \"c\"\n[host.\"B\"]\n[host.\"B\".header]\nX-Test = [\"b\", \"bb\"]",
	"headers of a server":  "server = \"A\"\n[header]\nX-Test = \"a\"",
	"inline":               "server = \"A\"\nhost = {\"B\" = {capabilities = [\"pull\"]}}",
	"dotted":               "server = \"A\"\nhost.\"B\".capabilities = [\"pull\"]",
	"pull":                 "server = \"A\"\n[host.\"B\"]\ncapabilities = [\"pull\"]\n[host.\"C\"]\ncapabilities = [\"pull\", \"resolve\"]",
	"case":                 "server = \"A\"\n[host.\"B\"]\ncapabilities = [\"Pull\", \"RESOLVE\"]",
	"push":                 "server = \"A\"\n[host.\"B\"]\ncapabilities = [\"pull\", \"push\"]",
	"referrers":            "server = \"A\"\n[host.\"B\"]\ncapabilities = [\"pull\", \"referrers\"]\n[host.\"C\"]\ncapabilities = [\"pull\", \"resolve\"]",
	"server pulls only":    "server = \"A\"\ncapabilities = [\"pull\"]\n[host.\"B\"]\ncapabilities = [\"pull\", \"resolve\"]",
	"path":                 "server = \"A\"\n[host.\"B/mirror\"]",
	"path with v2":         "server = \"A\"\n[host.\"B/v2/mirror\"]",
	"path to v2":           "server = \"A\"\n[host.\"B/mirror/v2/\"]",
	"slash":                "server = \"A/\"",
	"dots":                 "server = \"A\"\n[host.\"B/x/../y//z\"]",
	"override path":        "server = \"A\"\n[host.\"B/v2/mirror/hub\"]\noverride_path = true",
	"override with none":   "server = \"A\"\n[host.\"B\"]\noverride_path = true",
	"override with slash":  "server = \"A\"\n[host.\"B/\"]\noverride_path = true",
	"mirror twice":         "server = \"A\"\n[host.\"B/one\"]\n[host.\"B/two\"]",
	"mirror of itself":     "server = \"A\"\n[host.\"A\"]",
	"dial time-out":        "server = \"A\"\n[host.\"B\"]\ndial_timeout = \"2s\"",
	"no server":            "[host.\"B\"]\n[host.\"C\"]",
	"without verification": "server = \"A\"\n[host.\"B\"]\nskip_verify = true",
	"comment":              "# nothing",
	"unknown keys":         "server = \"A\"\nx = 1\n[host.\"B\"]\ny = 2",

	"unknown capability": "server = \"B\"\ncapabilities = [\"fly\"]",
	"not TOML":           "server = B",
	"wrong type":         "server = \"B\"\nca = 5",
	"wrong duration":     "server = \"B\"\ndial_timeout = \"soon\"",
	"key twice":          "server = \"B\"\nserver = \"C\"",
}

// wire remembers requests, as "server path namespace header", each once.
type wire struct {
	mu    sync.Mutex
	asked []string
}

func (w *wire) note(name string, req *http.Request) {
	kind := strings.Split(strings.TrimPrefix(req.URL.Path, "/"), "/")
	slices.Reverse(kind) // …/manifests/v1
	if len(kind) < 2 || kind[1] != "manifests" && kind[1] != "blobs" && kind[1] != "referrers" {
		return // probes of TLS
	}
	values := append([]string{}, req.Header.Values("X-Test")...)
	line := fmt.Sprintf("%s %s ns=%s %v", name, req.URL.Path, req.URL.Query()["ns"], values)
	w.mu.Lock()
	defer w.mu.Unlock()
	if !slices.Contains(w.asked, line) { // who repeats, and with which method, is another matter
		w.asked = append(w.asked, line)
	}
}

func (w *wire) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	asked := w.asked
	w.asked = nil
	return asked
}

// containerd's own resolver is the oracle: where nobody has anything, both ask
// all hosts, the same ones in the same order, for the same paths and with the same
// headers.
func TestContainerdsRequests(t *testing.T) {
	var w wire
	replace := []string{}
	var addr string
	for _, name := range []string{"A", "B", "C"} {
		s := serve(t)
		s.setFront(func(rw http.ResponseWriter, req *http.Request) bool {
			w.note(name, req)
			if strings.Contains(req.URL.Path, "/referrers/") { // of mirrors that know none, containerd asks only the first
				http.NotFound(rw, req)
				return true
			}
			return false
		})
		if name == "A" {
			addr = s.addr()
			replace = append(replace, "AA", s.addr())
		}
		replace = append(replace, `"`+name+`"`, `"`+s.URL+`"`, `"`+name+`/`, `"`+s.URL+`/`)
	}
	for name, text := range configurations {
		for _, registry := range []string{"example.test", addr} {
			if registry == "example.test" && !strings.Contains(text, "server") || registry != addr && slices.Contains([]string{
				"unknown capability", "not TOML", "wrong type", "wrong duration", "key twice"}, name) {
				continue // the server would be example.test
			}
			t.Run(name+" for "+strings.TrimSuffix(registry, addr), func(t *testing.T) {
				root := t.TempDir()
				if text != "" {
					root = dir(t, map[string]string{registry + "/hosts.toml": strings.NewReplacer(replace...).Replace(text)})
				}
				for what, ask := range map[string]struct {
					theirs func(ctx context.Context, r remotes.Resolver) error
					ours   func(r *hosts.Registry) error
				}{
					"a tag":      {resolveTag(registry), func(r *hosts.Registry) error { _, err := r.ResolveManifest(t.Context(), repo, "v1"); return err }},
					"a manifest": {fetch(registry, oci.MediaTypeImageManifest), func(r *hosts.Registry) error { _, err := r.GetManifest(t.Context(), repo, digest); return err }},
					"a blob":     {fetch(registry, oci.MediaTypeOctetStream), func(r *hosts.Registry) error { _, err := r.GetBlob(t.Context(), repo, digest); return err }},
					"a referrer": {fetchReferrers(registry), ourReferrers(t)},
				} {
					w.take()
					terr := ask.theirs(quiet(t.Context()), docker.NewResolver(docker.ResolverOptions{Hosts: dockerconfig.ConfigureHosts(quiet(t.Context()),
						dockerconfig.HostOptions{HostDir: dockerconfig.HostDirFromRoot(root)})}))
					theirs := w.take()
					r, err := openDirs(t, root).Registry(registry, repo)
					if err == nil {
						err = ask.ours(r)
					}
					ours := w.take()
					if what == "a referrer" { // where there's no such API, they look for a tag at last; we, at each host
						theirs, ours = only(theirs, "/referrers/"), only(ours, "/referrers/")
						if len(theirs) == 0 { // nobody may be asked: we ask those who know tags
							continue
						}
					} else if terr == nil || err == nil {
						t.Fatalf("%s: it isn't missing: %v, %v", what, terr, err)
					}
					if len(theirs) == 0 {
						t.Errorf("%s: containerd asked nobody", what)
					}
					if !slices.Equal(ours, theirs) {
						t.Errorf("%s: asked\n%s\ncontainerd:\n%s", what, strings.Join(ours, "\n"), strings.Join(theirs, "\n"))
					}
				}
			})
		}
	}
}

const digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func quiet(ctx context.Context) context.Context {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return log.WithLogger(ctx, logrus.NewEntry(l))
}

func only(lines []string, with string) []string {
	return slices.DeleteFunc(lines, func(l string) bool { return !strings.Contains(l, with) })
}

func resolveTag(registry string) func(context.Context, remotes.Resolver) error {
	return func(ctx context.Context, r remotes.Resolver) error {
		_, _, err := r.Resolve(ctx, registry+"/"+repo+":v1")
		return err
	}
}

func fetch(registry, mediaType string) func(context.Context, remotes.Resolver) error {
	return func(ctx context.Context, r remotes.Resolver) error {
		f, err := r.Fetcher(ctx, registry+"/"+repo+":v1")
		if err != nil {
			return err
		}
		body, err := f.Fetch(ctx, ocispec.Descriptor{MediaType: mediaType, Digest: digest, Size: 10})
		if err != nil {
			return err
		}
		defer body.Close()
		_, err = io.ReadAll(body)
		return err
	}
}

func fetchReferrers(registry string) func(context.Context, remotes.Resolver) error {
	return func(ctx context.Context, r remotes.Resolver) error {
		f, err := r.Fetcher(ctx, registry+"/"+repo+":v1")
		if err != nil {
			return err
		}
		_, err = f.(remotes.ReferrersFetcher).FetchReferrers(ctx, digest)
		return err
	}
}

func ourReferrers(t *testing.T) func(r *hosts.Registry) error {
	return func(r *hosts.Registry) error {
		for _, err := range r.Referrers(t.Context(), repo, digest, "") {
			return err
		}
		return nil
	}
}
