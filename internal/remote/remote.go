// Package remote is an oci.Registry over HTTP: the client end of the OCI
// distribution protocol, for any registry that speaks it.
//
// Start with New. Each request goes through Registry.do (do.go), which
// authenticates, bounds every wait, retries what may be retried and names host,
// repository and digest in errors; errors.go turns answers into the errors of
// package oci. The other files are named after the verbs of the contract:
// reader.go and blob.go, writer.go and upload.go, lister.go and referrers.go,
// deleter.go.
//
// Nothing that a server says is believed: sizes, ranges, digests, links and
// media types are checked, bodies are bounded, and a server that ignores ranges
// or has no referrers API is worked around as distribution-spec 1.1 asks.
package remote

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"

	"sluice/oci"
)

// Options configures a Registry. The zero value is what programs for people
// want: docker's credentials, plain HTTP on loopback only.
type Options struct {
	// Transport carries the requests. Nil means a NewTransport of the
	// registry's own. Registries of one program should share one, so that
	// connections are reused.
	Transport http.RoundTripper

	// PlainHTTP says when to do without TLS.
	PlainHTTP PlainHTTP

	// Endpoint is where the API is, if not below the host's /v2/: its path
	// stands in all requests where "/v2" otherwise does, and its scheme counts
	// instead of PlainHTTP.
	Endpoint *url.URL

	// Namespace is the registry that this one is a mirror of, spelled as in
	// references: "docker.io". Requests that read tell it in the query
	// parameter "ns", as containerd's do (its docs/hosts.md).
	Namespace string

	// Header is sent, in addition, with each request to the registry and its
	// token server, and not to where these redirect.
	Header http.Header

	// ReferrersAPIOnly never takes a tag's word for what refers to a manifest:
	// for a mirror that isn't trusted with tags.
	ReferrersAPIOnly bool

	// Credentials tells who we are. Nil means DockerCredentials.
	Credentials CredentialFunc

	// UserAgent is sent with each request; "sluice" if empty.
	UserAgent string

	// ReadTimeout bounds each wait for the server of a request that reads:
	// for the answer's header, and for each piece of its body. Zero means 30
	// seconds. The whole of a call is bounded by its context only.
	ReadTimeout time.Duration

	// WriteTimeout is the same for requests that push or delete, which make
	// some servers hash or copy gigabytes before they answer. Zero means
	// 5 minutes.
	WriteTimeout time.Duration

	// Retries is how often a request that may be repeated is, after a lost
	// connection or an answer of 408, 429 or 5xx. Zero means 3; negative, never.
	Retries int

	// ChunkSize is the most that an Upload sends in one request, in bytes;
	// it is held in memory meanwhile. Zero means 8 MiB.
	ChunkSize int64

	// Log receives what was retried and worked around. Nil discards it.
	Log *slog.Logger
}

// PlainHTTP says when a Registry speaks HTTP without TLS.
type PlainHTTP int

const (
	// PlainHTTPOnLoopback speaks plain HTTP with localhost, 127.0.0.0/8 and
	// ::1 unless the port is 443, where nobody else can listen in, and TLS
	// with all others. Docker and containerd draw the same line.
	PlainHTTPOnLoopback PlainHTTP = iota

	// PlainHTTPAlways never uses TLS.
	PlainHTTPAlways

	// PlainHTTPNever always uses TLS.
	PlainHTTPNever
)

// Defaults of Options.
const (
	defaultUserAgent    = "sluice"
	defaultReadTimeout  = 30 * time.Second
	defaultWriteTimeout = 5 * time.Minute
	defaultRetries      = 3
	defaultChunkSize    = 8 << 20
)

// Registry is an oci.Registry at the other end of an HTTP connection. Use New.
// It may be used concurrently, and holds nothing that needs closing.
type Registry struct {
	host   string   // as the caller named it, for messages
	base   *url.URL // https://registry-1.docker.io
	api    string   // path of the API: "/v2"
	opts   Options  // defaults filled in
	client *auth.Client
	tokens *tokens // the client's

	// plain is the client without authentication; places is where blobs were.
	plain  *http.Client
	places *locations

	// tagIndexes is held, by sending to it, while an index of the referrers
	// tag schema is read, changed and written.
	tagIndexes chan struct{}
}

var _ oci.Registry = (*Registry)(nil)

// New returns the registry at host, which is a name or address with an optional
// port: "127.0.0.1:5000", "docker.io". It doesn't connect yet.
func New(host string, opts Options) (*Registry, error) {
	base, err := BaseURL(host, opts.PlainHTTP)
	if err != nil {
		return nil, err
	}
	api := "/v2"
	if e := opts.Endpoint; e != nil {
		base, api = &url.URL{Scheme: e.Scheme, Host: e.Host}, strings.TrimSuffix(e.Path, "/")
	}
	if opts.Transport == nil {
		opts.Transport = NewTransport()
	}
	if opts.Credentials == nil {
		opts.Credentials = DockerCredentials
	}
	if opts.UserAgent == "" {
		opts.UserAgent = defaultUserAgent
	}
	if opts.ReadTimeout <= 0 {
		opts.ReadTimeout = defaultReadTimeout
	}
	if opts.WriteTimeout <= 0 {
		opts.WriteTimeout = defaultWriteTimeout
	}
	if opts.Retries == 0 {
		opts.Retries = defaultRetries
	}
	if opts.ChunkSize <= 0 {
		opts.ChunkSize = defaultChunkSize
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	kept := newTokens(opts.ReadTimeout)
	header := http.Header{"User-Agent": {opts.UserAgent}}
	for name, values := range opts.Header {
		header[http.CanonicalHeaderKey(name)] = values
	}
	plain := &http.Client{Transport: &tracedTransport{opts.Transport}, CheckRedirect: checkRedirect(opts.Header)}
	return &Registry{
		host:   host,
		base:   base,
		api:    api,
		opts:   opts,
		tokens: kept,
		plain:  plain,
		places: newLocations(),
		client: &auth.Client{
			Client:     plain,
			Header:     header,
			Credential: opts.Credentials.forOras(),
			Cache:      kept,
			ClientID:   opts.UserAgent,
		},
		tagIndexes: make(chan struct{}, 1),
	}, nil
}

// Host returns the name that New was called with.
func (r *Registry) Host() string { return r.host }

// URL returns scheme and host of the registry's server: "https://HOST".
func (r *Registry) URL() string { return r.base.Scheme + "://" + r.base.Host }

// http2Silence is how long nothing may come on an HTTP/2 connection with requests
// before it is pinged, and again before it is given up. Without, one that died
// without a word would hold up all requests, which share it.
const http2Silence = 5 * time.Second

// NewTransport returns a transport that suits registries: many connections kept
// warm for concurrent ranges, HTTP/2 where TLS offers it, large buffers, proxies
// from the environment. It may be changed before its first use.
func NewTransport() *http.Transport {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dialer.DialContext,
		ForceAttemptHTTP2:      true,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: http2Silence, PingTimeout: http2Silence},
		TLSHandshakeTimeout:    10 * time.Second,
		ExpectContinueTimeout:  time.Second,
		IdleConnTimeout:        90 * time.Second,
		MaxIdleConns:           256,
		MaxIdleConnsPerHost:    64,
		MaxResponseHeaderBytes: 64 << 10,
		ReadBufferSize:         64 << 10,
		WriteBufferSize:        64 << 10,
		DisableCompression:     true,
	}
}

// BaseURL returns where the registry named host is: scheme and address, no path.
func BaseURL(host string, plain PlainHTTP) (*url.URL, error) {
	name := host
	switch host {
	case "docker.io", "index.docker.io":
		name = "registry-1.docker.io"
	}
	u, err := url.Parse("https://" + name)
	if err != nil || u.Host != name || u.Hostname() == "" || u.User != nil || strings.ContainsAny(name, " \t\r\n@/?#") {
		return nil, fmt.Errorf("registry host %.100q: use a host name or address with an optional port, such as \"registry.example.com:5000\"", host)
	}
	switch {
	case plain == PlainHTTPAlways, plain == PlainHTTPOnLoopback && isLoopback(u):
		u.Scheme = "http"
	}
	return u, nil
}

func isLoopback(u *url.URL) bool {
	if u.Port() == "443" {
		return false
	}
	if strings.EqualFold(u.Hostname(), "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(u.Hostname())
	return err == nil && addr.Unmap().IsLoopback()
}

// endpoint returns the URL of the API's path. Names and digests in it have been
// checked, so nothing needs escaping.
func (r *Registry) endpoint(path string, query url.Values) *url.URL {
	u := *r.base
	u.Path = r.api + "/" + path
	u.RawQuery = query.Encode()
	return &u
}

// resolve returns the URL that a server means by reference. One behind a proxy
// that ends TLS often says http: of itself, and means https:.
func (r *Registry) resolve(from *url.URL, reference string) (*url.URL, error) {
	u, err := from.Parse(reference)
	if err != nil {
		return nil, err
	}
	if u.Host == "" || u.User != nil {
		return nil, errors.New("not the URL of a place")
	}
	if r.base.Scheme == "https" && u.Scheme == "http" && u.Hostname() == r.base.Hostname() {
		u.Scheme, u.Host = "https", r.base.Host
	}
	u.Fragment = ""
	return u, nil
}
