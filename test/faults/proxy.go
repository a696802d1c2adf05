package faults

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sluice/oci"
)

// Kind is one of the requests that a node makes.
type Kind string

// The kinds, in the order in which a pull meets them. They are named in test
// names.
const (
	Token         Kind = "token"          // GET /token
	Resolve       Kind = "resolve"        // HEAD of a manifest
	Manifest      Kind = "manifest"       // GET of the image's index or manifest
	Config        Kind = "config"         // the image's config
	Referrers     Kind = "referrers"      // the list of referrers
	Artifact      Kind = "artifact"       // the streaming artifact's manifest
	Metadata      Kind = "metadata"       // of the merged tree
	Table         Kind = "table"          // of chunks, or its root
	Page          Kind = "page"           // of a chunk table that doesn't come whole
	Boot          Kind = "boot"           // the boot pack
	Layer         Kind = "layer"          // ranges of the artifact's layers
	LayerMetadata Kind = "layer-metadata" // of one layer
	Original      Kind = "original"       // layers of the image itself
	Other         Kind = "other"
)

// Proxy is a registry's only door. It speaks HTTP/1.1 on loopback, wants a
// token for everything, and hands them out to anybody.
type Proxy struct {
	upstream string
	scheme   string
	kinds    map[oci.Digest]Kind // of blobs and manifests
	server   *http.Server
	ln       net.Listener
	served   sync.WaitGroup
	active   atomic.Int64 // requests that aren't answered yet

	mu    sync.Mutex
	token int // the only one that is valid
	armed *armed
	seen  []Kind
	watch func(n int, k Kind)
}

// armed is a fault that waits for its request.
type armed struct {
	fault Fault
	kind  Kind
	left  int           // how often it may still happen; negative: always
	hits  int           // how often it did
	over  chan struct{} // closed by Disarm
}

// Fault is something that happens to a request.
type Fault struct {
	Name  string
	Serve func(x *Exchange)

	Body  bool // only happens to answers with a body
	Range bool // only happens to ranges

	Mild   bool // the node must cope, however often it happens
	Final  bool // need not be tried again
	Stalls bool // takes all the time there is: for documents there's no second try

	Spreads bool // concerns tokens: harms other requests, too, and no token server

	// Reason is what `sluice node status` must say of a pull that failed by
	// this; empty: any reason.
	Reason string
}

// NewProxy starts a proxy to the registry at upstream. kinds says what its blobs
// and manifests are.
func NewProxy(ctx context.Context, upstream string, kinds map[oci.Digest]Kind) (*Proxy, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return serve(&Proxy{upstream: upstream, scheme: "http", kinds: kinds, ln: ln}), nil
}

// NewTLSProxy is NewProxy at an address of one's own, with TLS: on loopback nodes
// speak it only with port 443.
func NewTLSProxy(ctx context.Context, addr, upstream string, kinds map[oci.Digest]Kind, certificate func() *tls.Certificate) (*Proxy, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	ln = tls.NewListener(ln, &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return certificate(), nil },
	})
	return serve(&Proxy{upstream: upstream, scheme: "https", kinds: kinds, ln: ln}), nil
}

func serve(p *Proxy) *Proxy {
	p.server = &http.Server{Handler: p, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0)}
	p.served.Go(func() { _ = p.server.Serve(p.ln) }) // until Close
	return p
}

// Addr is where nodes find it, as host:port.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// Close ends the proxy and all its connections: the registry is gone.
func (p *Proxy) Close() {
	p.Disarm()
	p.server.Close()
	p.served.Wait()
}

// Arm makes a fault happen to the next requests of a kind, at most times of
// them; all of them if it is negative.
func (p *Proxy) Arm(f Fault, kind Kind, times int) {
	p.Disarm()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.armed = &armed{fault: f, kind: kind, left: times, over: make(chan struct{})}
}

// Disarm ends the fault, also where it is going on, and returns how often it
// happened.
func (p *Proxy) Disarm() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.armed == nil {
		return 0
	}
	hits := p.armed.hits
	close(p.armed.over)
	p.armed = nil
	return hits
}

// Watch has fn called with each request, which is answered when fn returns: the
// n-th since Watch, from 1 on. Nil ends it.
func (p *Proxy) Watch(fn func(n int, k Kind)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen, p.watch = nil, fn
}

// Seen returns the requests since Watch.
func (p *Proxy) Seen() []Kind {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]Kind(nil), p.seen...)
}

// SeenOf returns how many requests of a kind there were since Watch.
func (p *Proxy) SeenOf(kind Kind) int {
	n := 0
	for _, k := range p.Seen() {
		if k == kind {
			n++
		}
	}
	return n
}

// Active is how many requests wait for an answer or receive one.
func (p *Proxy) Active() int { return int(p.active.Load()) }

// ExpireTokens makes all tokens invalid that were handed out.
func (p *Proxy) ExpireTokens() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.token++
}

// kind says what a request is.
func (p *Proxy) kind(r *http.Request) Kind {
	if r.URL.Path == "/token" {
		return Token
	}
	parts := strings.Split(r.URL.Path, "/")
	if len(parts) < 3 || parts[1] != "v2" {
		return Other
	}
	name := parts[len(parts)-1]
	known, ok := p.kinds[oci.Digest(name)]
	switch parts[len(parts)-2] {
	case "referrers":
		return Referrers
	case "manifests":
		switch {
		case ok && known == Artifact:
			return Artifact
		case r.Method == http.MethodHead:
			return Resolve
		}
		return Manifest
	case "blobs":
		if at := r.Header.Get("Range"); known == Table && at != "" && !strings.HasPrefix(at, "bytes=0-") {
			return Page
		}
		if ok {
			return known
		}
	}
	return Other
}

// ServeHTTP answers a request, or does the armed fault to it.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.active.Add(1)
	defer p.active.Add(-1)
	k := p.kind(r)
	p.mu.Lock()
	p.seen = append(p.seen, k)
	n, watch := len(p.seen), p.watch
	a := p.armed
	if a != nil && (a.kind != k || a.left == 0) {
		a = nil
	}
	if a != nil {
		a.left--
		a.hits++
	}
	p.mu.Unlock()
	if watch != nil {
		watch(n, k)
	}
	if a == nil {
		p.answer(w, r)
		return
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err) // HTTP/1.1 can always be hijacked
	}
	defer conn.Close()
	a.fault.Serve(&Exchange{Request: r, Kind: k, Conn: conn, proxy: p, over: a.over})
}

// answer answers as it should be.
func (p *Proxy) answer(w http.ResponseWriter, r *http.Request) {
	if path, ok := strings.CutPrefix(r.URL.Path, "/signed"); ok {
		r.URL.Path = path
	} else if r.URL.Path == "/expired" {
		http.Error(w, "<Error><Code>AuthenticationFailed</Code><Message>Signature not valid in the specified time frame</Message></Error>", http.StatusForbidden)
		return
	} else if r.URL.Path == "/token" {
		fmt.Fprint(w, p.grant())
		return
	} else if !p.allows(r) {
		w.Header().Set("WWW-Authenticate", p.challenge(r))
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
		return
	}
	resp, err := p.ask(r, r.Header)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	for name, values := range resp.Header {
		w.Header()[name] = values
	}
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(w, resp.Body) // the client may go away
}

func (p *Proxy) grant() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf(`{"token":"token-%d","access_token":"token-%[1]d","expires_in":300}`, p.token)
}

func (p *Proxy) allows(r *http.Request) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return r.Header.Get("Authorization") == fmt.Sprintf("Bearer token-%d", p.token)
}

func (p *Proxy) challenge(r *http.Request) string {
	scope := ""
	for _, resource := range []string{"/manifests/", "/blobs/", "/referrers/"} {
		if repo, _, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), resource); ok {
			scope = fmt.Sprintf(`,scope="repository:%s:pull"`, repo)
		}
	}
	return fmt.Sprintf(`Bearer realm="%s://%s/token",service="faults"%s`, p.scheme, p.Addr(), scope)
}

// ask asks the registry.
func (p *Proxy) ask(r *http.Request, header http.Header) (*http.Response, error) {
	u := *r.URL
	u.Scheme, u.Host = "http", p.upstream
	req, err := http.NewRequestWithContext(context.WithoutCancel(r.Context()), r.Method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header = header.Clone()
	req.Header.Del("Authorization") // it is ours
	return http.DefaultTransport.RoundTrip(req)
}

// Exchange is a request to which a fault happens. When Serve returns, the
// connection is closed.
type Exchange struct {
	Request *http.Request
	Kind    Kind
	Conn    net.Conn
	proxy   *Proxy
	over    <-chan struct{}
}

// Reply is an answer: headers, Content-Length among them, may say anything.
type Reply struct {
	Proto  string // "HTTP/1.1"
	Status int
	Header http.Header
	Body   []byte
}

// Answer is what the registry says.
func (x *Exchange) Answer() Reply { return x.answer(x.Request.Header) }

// Whole is what the registry says when it isn't asked for a range.
func (x *Exchange) Whole() Reply {
	h := x.Request.Header.Clone()
	h.Del("Range")
	return x.answer(h)
}

func (x *Exchange) answer(header http.Header) Reply {
	if x.Kind == Token {
		body := x.proxy.grant()
		return Reply{Status: http.StatusOK, Body: []byte(body),
			Header: http.Header{"Content-Type": {"application/json"}, "Content-Length": {fmt.Sprint(len(body))}}}
	}
	resp, err := x.proxy.ask(x.Request, header)
	if err != nil {
		return Reply{Status: http.StatusBadGateway, Header: http.Header{"Content-Length": {"0"}}}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return Reply{Status: http.StatusBadGateway, Header: http.Header{"Content-Length": {"0"}}}
	}
	h := resp.Header.Clone()
	if resp.ContentLength >= 0 {
		h.Set("Content-Length", fmt.Sprint(resp.ContentLength))
	}
	h.Set("Connection", "close")
	return Reply{Status: resp.StatusCode, Header: h, Body: body}
}

// Head is the reply up to its body.
func (r Reply) Head() []byte {
	proto := r.Proto
	if proto == "" {
		proto = "HTTP/1.1"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %d %s\r\n", proto, r.Status, http.StatusText(r.Status))
	for name, values := range r.Header {
		for _, v := range values {
			fmt.Fprintf(&b, "%s: %s\r\n", name, v)
		}
	}
	b.WriteString("\r\n")
	return []byte(b.String())
}

// Send sends a reply, whatever it is.
func (x *Exchange) Send(r Reply) {
	x.Write(r.Head())
	if x.Request.Method != http.MethodHead {
		x.Write(r.Body)
	}
}

// Write sends bytes. That the other end is gone is its business.
func (x *Exchange) Write(b []byte) { _, _ = x.Conn.Write(b) }

// Reset ends the connection with a TCP reset.
func (x *Exchange) Reset() {
	if c, ok := x.Conn.(*net.TCPConn); ok {
		_ = c.SetLinger(0)
	}
	x.Conn.Close()
}

// Stall waits until the node gives up or the fault is over.
func (x *Exchange) Stall() { x.Pause(time.Hour) }

// Pause waits for a while, at most until the node gives up or the fault is
// over, and reports whether neither happened.
func (x *Exchange) Pause(d time.Duration) bool {
	for end := time.Now().Add(d); time.Now().Before(end); {
		select {
		case <-x.over:
			return false
		default:
		}
		wait := time.Now().Add(20 * time.Millisecond)
		if wait.After(end) {
			wait = end
		}
		if err := x.Conn.SetReadDeadline(wait); err != nil {
			return false
		}
		var b [1]byte
		if _, err := x.Conn.Read(b[:]); err != nil {
			var slow net.Error
			if !errors.As(err, &slow) || !slow.Timeout() {
				return false
			}
		}
	}
	return true
}
