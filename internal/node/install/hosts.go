package install

import (
	"fmt"
	"net/url"
	"path"
	"path/filepath"
	"strings"
)

// defaultHosts is where hosts.toml files go when containerd has no directory.
const defaultHosts = "/etc/containerd/certs.d"

// Registry is a registry for which containerd and sluice need a hosts.toml.
type Registry struct {
	Host string // as in references: HOST or HOST:PORT
	URL  string // where it answers: itself without TLS, or a mirror
}

// ParseRegistry understands HOST, a registry that speaks HTTP without TLS, and
// HOST=URL, one that answers at a URL.
func ParseRegistry(s string) (Registry, error) {
	host, at, ok := strings.Cut(s, "=")
	if !ok {
		at = "http://" + host
	}
	u, err := url.Parse(at)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return Registry{}, fmt.Errorf("registry %q: use HOST[:PORT] or HOST[:PORT]=URL, such as registry.example.com=http://mirror.local:5000", s)
	}
	if h, err := url.Parse("//" + host); err != nil || h.Host != host || host == "" || strings.HasPrefix(host, ".") {
		return Registry{}, fmt.Errorf("registry %q: %q isn't the name of a host", s, host)
	}
	return Registry{Host: host, URL: strings.TrimSuffix(at, "/")}, nil
}

func (r Registry) text() string {
	const made = "# Made by sluice node install, removed by sluice node uninstall.\n"
	if u, err := url.Parse(r.URL); err == nil && u.Host == r.Host {
		return fmt.Sprintf("%sserver = %q\n", made, r.URL)
	}
	return fmt.Sprintf("%sserver = %q\n\n[host.%q]\n  capabilities = [\"pull\", \"resolve\", \"referrers\"]\n", made, "https://"+r.Host, r.URL)
}

// hostsFiles are the files for the registries. Those of somebody else stay.
func (o Options) hostsFiles(rec record, dirs string) (files []file, notes []string) {
	if dirs == "" {
		dirs = defaultHosts
	}
	dir, _, _ := strings.Cut(dirs, string(filepath.ListSeparator))
	for _, r := range o.Registries {
		name := path.Join(dir, r.Host, "hosts.toml")
		f := file{path: name, content: []byte(r.text()), mode: 0o644, why: "containerd and sluice: where " + r.Host + " is"}
		if have, err := o.read(name); err == nil && string(have) != r.text() && rec.find(name) == nil {
			notes = append(notes, fmt.Sprintf("%s is there already, and stays as it is", name))
			continue
		}
		files = append(files, f)
	}
	return files, notes
}
