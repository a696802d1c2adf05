// Package hosts finds out where to read the repositories of a registry: at its
// mirrors and at the registry itself, as containerd's hosts.toml files say.
//
// Start with Open. Hosts.Registry returns a reader of one repository that asks
// the registry's hosts in the order of the file until one has the answer
// (reader.go). What the files mean is containerd's to say: files.go finds them
// and sees whether they have changed, config.go lets containerd's own parser
// read them. A host that fails is left out for a while (health.go), and what a
// mirror doesn't have isn't asked of it for every range (place.go).
//
// Mirrors need no trust: all content is verified against its digest by whoever
// reads it. But who says which digest a tag has is believed, so tags are asked
// only of hosts with the capability "resolve".
package hosts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"sluice/internal/remote"
	"sluice/oci"
)

// DefaultDirs is where containerd looks for hosts.toml files by itself
// (config_path of its CRI plugin).
const DefaultDirs = "/etc/containerd/certs.d:/etc/docker/certs.d"

const (
	// recheck is how long what the files said is used without looking.
	recheck = time.Second

	// severalDial bounds connecting to a host when the registry has several; a
	// dial_timeout in the file counts instead. mirrorPatience bounds each wait
	// for an answer of those that another one stands in for.
	severalDial    = 2 * time.Second
	mirrorPatience = 4 * time.Second

	maxNamespaces   = 1024 // registries whose files are remembered
	maxRepositories = 4096 // of one registry
	maxServers      = 4096 // whose health is remembered
)

// Options configures Hosts. The zero value is of use: no files, docker's
// credentials.
type Options struct {
	// Dirs are the directories that have a directory for each registry, with
	// a hosts.toml or certificates in it. Those that don't exist are passed
	// over; the first that knows a registry, or has a _default, counts.
	Dirs []string

	// PlainHTTP are the registries, as in references, that are spoken to
	// without TLS unless a file says otherwise.
	PlainHTTP []string

	// Credentials returns the credentials for a repository of a registry; they
	// are asked for by the name of the host that wants them, which may be a
	// mirror's. Nil means docker's.
	Credentials func(registry, repository string) remote.CredentialFunc

	// Log receives which hosts fail and which files are wrong. Nil discards it.
	Log *slog.Logger
}

// Hosts knows where registries are. Use Open. It may be used concurrently.
type Hosts struct {
	opts    Options
	alone   *http.Transport // to registries with one host, without TLS settings of its own
	several *http.Transport // to those with several

	// background runs fn, which must end soon after its context does; stop
	// ends that and waits.
	background func(fn func(ctx context.Context))
	stop       func()

	mu         sync.Mutex // guards what follows; files are read, nothing else is waited for under it
	namespaces map[string]*namespace
	servers    map[string]*health // of those that alone and several connect to, by scheme and host
}

// namespace is a registry, as references name it.
type namespace struct {
	config  *config // what is in force
	stamp   string  // of the files that were last read, right or wrong
	checked time.Time
	problem error // of the files, if they aren't in force

	repositories map[string]*Registry
}

// Open returns the Hosts of directories. They are read when a registry is first
// asked for.
func Open(opts Options) *Hosts {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	h := &Hosts{
		opts: opts, alone: remote.NewTransport(), several: remote.NewTransport(),
		namespaces: make(map[string]*namespace), servers: make(map[string]*health),
	}
	h.several.DialContext = (&net.Dialer{Timeout: severalDial, KeepAlive: 30 * time.Second}).DialContext
	h.several.TLSHandshakeTimeout = severalDial
	h.startBackground()
	return h
}

// startBackground makes h.background and h.stop.
func (h *Hosts) startBackground() {
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex // guards closed, and wg.Go against wg.Wait
	var wg sync.WaitGroup
	closed := false
	h.background = func(fn func(ctx context.Context)) {
		mu.Lock()
		defer mu.Unlock()
		if !closed {
			wg.Go(func() { fn(ctx) })
		}
	}
	h.stop = func() {
		mu.Lock()
		closed = true
		mu.Unlock()
		cancel()
		wg.Wait()
	}
}

// Close ends probes and idle connections. What Registry returned still works,
// but hosts that are left out stay so unless there's no other.
func (h *Hosts) Close() {
	h.stop()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.alone.CloseIdleConnections()
	h.several.CloseIdleConnections()
	for _, n := range h.namespaces {
		n.config.close()
	}
}

// Registry returns a reader of a repository of the registry that references
// name host. It is meant to be called for every use: it looks once a second
// whether the files have changed. Files that are wrong are reported by the log
// and by Problems, and what they said before stays in force; if there's no
// before, the registry itself is asked. The error says that no host may be asked.
func (h *Hosts) Registry(host, repository string) (*Registry, error) {
	if host == "" || strings.ContainsAny(host, "/\\") || strings.HasPrefix(host, ".") || strings.HasPrefix(host, "_") {
		return nil, fmt.Errorf("registry host %.100q: use a host name or address with an optional port", host)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	n, err := h.namespace(host)
	if err != nil {
		return nil, err
	}
	if r := n.repositories[repository]; r != nil {
		return r, nil
	}
	places, err := h.places(host, repository, n.config)
	if err != nil {
		return nil, err
	}
	if len(n.repositories) >= maxRepositories {
		clear(n.repositories)
	}
	r := &Registry{name: host, places: places, log: h.opts.Log, probe: h.probe, served: make(map[oci.Digest]answer)}
	n.repositories[repository] = r
	return r, nil
}

// Problem is that a registry's files are wrong, or that one of its hosts fails.
type Problem struct {
	Registry string `json:"registry"`
	Host     string `json:"host,omitempty"` // the URL of its API; "": the files
	Error    string `json:"error"`
}

// Problems returns what is wrong with the registries that have been asked for,
// ordered by registry. A host is listed until it answers again.
func (h *Hosts) Problems() []Problem {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []Problem
	for _, name := range slices.Sorted(maps.Keys(h.namespaces)) {
		if n := h.namespaces[name]; n.problem != nil {
			all = append(all, Problem{Registry: name, Error: n.problem.Error()})
		}
		for _, e := range h.namespaces[name].config.hosts {
			if err := e.health.problem(); err != nil {
				all = append(all, Problem{Registry: name, Host: e.url.Redacted(), Error: err.Error()})
			}
		}
	}
	return all
}

// namespace returns what is in force for a registry; h.mu is held.
func (h *Hosts) namespace(host string) (*namespace, error) {
	n := h.namespaces[host]
	if n != nil && time.Since(n.checked) < recheck {
		return n, nil
	}
	f, err := find(h.opts.Dirs, host)
	stamp := f.stamp
	if err != nil {
		stamp = err.Error()
	}
	if n != nil && n.stamp == stamp {
		n.checked = time.Now()
		return n, nil
	}
	var c *config
	if err == nil {
		c, err = h.load(host, f)
	}
	if err != nil {
		h.opts.Log.Error("the hosts of a registry are not as its files say", "registry", host, "error", err)
	} else if f.dir != "" {
		h.opts.Log.Info("the hosts of a registry are read from files", "registry", host, "dir", f.dir, "hosts", c.names())
	}
	if c == nil && n == nil {
		var uerr error
		if c, uerr = h.load(host, files{}); uerr != nil {
			return nil, errors.Join(err, uerr)
		}
	}
	if n == nil {
		if len(h.namespaces) >= maxNamespaces {
			h.forget()
		}
		n = &namespace{repositories: make(map[string]*Registry)}
		h.namespaces[host] = n
	}
	n.stamp, n.problem, n.checked = stamp, err, time.Now()
	if c != nil {
		n.config.close()
		n.config = c
		clear(n.repositories)
	}
	return n, nil
}

// forget drops the registry that was looked at longest ago; h.mu is held.
func (h *Hosts) forget() {
	oldest := ""
	for name, n := range h.namespaces {
		if oldest == "" || n.checked.Before(h.namespaces[oldest].checked) {
			oldest = name
		}
	}
	h.namespaces[oldest].config.close()
	delete(h.namespaces, oldest)
}
