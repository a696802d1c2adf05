package hosts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"

	"sluice/internal/remote"
)

// dockerHub is where the API of docker.io is.
const dockerHub = "registry-1.docker.io"

// config is the hosts of a registry.
type config struct {
	hosts []endpoint
	own   []*http.Transport // of single hosts
}

// endpoint is one host: a mirror, or at the end the registry itself.
type endpoint struct {
	docker.RegistryHost
	url       *url.URL // of the API
	last      bool
	transport http.RoundTripper
	health    *health
}

func (c *config) names() []string {
	var all []string
	for _, e := range c.hosts {
		all = append(all, e.url.Redacted())
	}
	return all
}

func (c *config) close() {
	if c == nil {
		return
	}
	for _, t := range c.own {
		t.CloseIdleConnections()
	}
}

// load returns what files mean for a registry.
func (h *Hosts) load(host string, f files) (*config, error) {
	clients := transports{own: make(map[*http.Client]*http.Transport)}
	all := []docker.RegistryHost{h.unknown(host)}
	if f.dir != "" {
		var err error
		if all, err = h.parse(host, f, clients.update); err != nil {
			return nil, err
		}
	}
	c := &config{}
	for i, r := range all {
		e, err := newEndpoint(r, i == len(all)-1)
		if err != nil {
			return nil, f.wrong(err)
		}
		if t := clients.own[r.Client]; t != nil {
			c.own = append(c.own, t)
			e.transport, e.health = r.Client.Transport, new(health)
			if d, ok := f.dials[r.Host]; ok {
				t.DialContext = dialer(d)
			} else if len(all) > 1 {
				t.DialContext, t.TLSHandshakeTimeout = dialer(severalDial), severalDial
			}
		} else {
			h.share(&e, len(all) == 1)
		}
		c.hosts = append(c.hosts, e)
	}
	return c, nil
}

// unknown is the host of a registry that no directory knows. On loopback it does
// without TLS; containerd tries that first and accepts any certificate.
func (h *Hosts) unknown(host string) docker.RegistryHost {
	r := docker.RegistryHost{Scheme: "https", Host: host, Path: "/v2", Capabilities: pull | resolve | referrers}
	_, port, _ := net.SplitHostPort(host)
	if slices.Contains(h.opts.PlainHTTP, host) || docker.IsLocalhost(host) && port != "443" {
		r.Scheme = "http"
	}
	return r
}

// parse lets containerd say what the files of a registry's directory mean. Its
// HTTP clients go through update.
func (h *Hosts) parse(host string, f files, update dockerconfig.UpdateClientFunc) ([]docker.RegistryHost, error) {
	var complaint complaints
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.AddHook(&complaint)
	ctx := log.WithLogger(context.Background(), logrus.NewEntry(logger)) // only carries the logger
	options := dockerconfig.HostOptions{
		HostDir:      func(string) (string, error) { return f.dir, nil },
		UpdateClient: update,
	}
	if slices.Contains(h.opts.PlainHTTP, host) {
		options.DefaultScheme = "http"
	}
	all, err := dockerconfig.ConfigureHosts(ctx, options)(host)
	switch {
	case err != nil:
		return nil, f.wrong(err)
	case complaint.err != nil:
		return nil, f.wrong(complaint.err)
	case len(all) == 0:
		return nil, fmt.Errorf("%s names no host for %s", f.dir, host)
	}
	return all, nil
}

// newEndpoint returns what containerd has read of one host, as an endpoint
// without a transport.
func newEndpoint(r docker.RegistryHost, last bool) (endpoint, error) {
	e := endpoint{RegistryHost: r, last: last, url: &url.URL{Scheme: r.Scheme, Host: r.Host, Path: path.Join("/", r.Path)}}
	if r.Host == "docker.io" || r.Host == "index.docker.io" {
		e.url.Host = dockerHub
	}
	_, err := remote.New(e.url.Host, remote.Options{Transport: http.DefaultTransport}) // checks the name
	if err != nil || r.Scheme != "http" && r.Scheme != "https" {
		return e, fmt.Errorf("host %q: use a URL such as \"https://mirror.example.com\"", e.url.Redacted())
	}
	return e, nil
}

// share gives an endpoint without TLS settings the transport and health of all
// such; h.mu is held.
func (h *Hosts) share(e *endpoint, alone bool) {
	e.transport = h.several
	if alone {
		e.transport = h.alone
	}
	server := e.Scheme + "://" + e.Host
	if e.health = h.servers[server]; e.health != nil {
		return
	}
	if len(h.servers) >= maxServers {
		clear(h.servers) // who is down will be found out anew
	}
	e.health = new(health)
	h.servers[server] = e.health
}

// transports replaces those that containerd makes, which have no HTTP/2 and keep
// few connections.
type transports struct {
	shared *http.Transport // stands for that of hosts without settings of their own
	own    map[*http.Client]*http.Transport
}

// update is containerd's UpdateClientFunc. It is called for the client without
// settings first.
func (s *transports) update(client *http.Client) error {
	theirs, ok := client.Transport.(*http.Transport)
	switch {
	case !ok || theirs == s.shared:
	case s.shared == nil:
		s.shared = theirs
	default:
		t := remote.NewTransport()
		t.TLSClientConfig = theirs.TLSClientConfig
		client.Transport, s.own[client] = t, t
	}
	return nil
}

func dialer(timeout time.Duration) func(ctx context.Context, network, address string) (net.Conn, error) {
	return (&net.Dialer{Timeout: timeout, KeepAlive: 30 * time.Second}).DialContext
}

// complaints takes what containerd logs when it disregards a file: it returns no
// error then.
type complaints struct{ err error }

// Levels implements logrus.Hook.
func (*complaints) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

// Fire implements logrus.Hook.
func (c *complaints) Fire(e *logrus.Entry) error {
	c.err = errors.New(e.Message)
	if err, ok := e.Data[logrus.ErrorKey].(error); ok {
		c.err = err
	}
	return nil
}
