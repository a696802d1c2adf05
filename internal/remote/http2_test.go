package remote_test

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"sluice/internal/remote"
)

// relay carries bytes between connections and a server, until it is told to
// forget those that it carries: as a router or balancer that lost its state, it
// then swallows what comes and says nothing.
type relay struct {
	net.Listener
	server string

	mu        sync.Mutex
	forgotten []net.Conn
	carried   []net.Conn
}

func newRelay(t *testing.T, server string) *relay {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{Listener: l, server: server}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s, err := net.Dial("tcp", r.server)
			if err != nil {
				c.Close()
				continue
			}
			r.mu.Lock()
			r.carried = append(r.carried, c, s)
			r.mu.Unlock()
			wg.Go(func() { r.copy(s, c) })
			wg.Go(func() { r.copy(c, s) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.mu.Lock()
		for _, c := range append(r.carried, r.forgotten...) {
			c.Close()
		}
		r.mu.Unlock()
		wg.Wait()
	})
	return r
}

func (r *relay) copy(to io.Writer, from net.Conn) {
	buf := make([]byte, 4096)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		r.mu.Lock()
		swallow := slices.Contains(r.forgotten, from)
		r.mu.Unlock()
		if !swallow {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
	}
}

func (r *relay) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forgotten, r.carried = append(r.forgotten, r.carried...), nil
}

// A server that resets a request's stream is asked again, as one that cuts a
// connection of HTTP/1.
func TestHTTP2StreamIsReset(t *testing.T) {
	var cuts atomic.Int64
	cuts.Store(2)
	reg := serveHTTP2(t, func(w http.ResponseWriter, req *http.Request) {
		if cuts.Add(-1) >= 0 {
			panic(http.ErrAbortHandler)
		}
		answer(200, string(blob))(w, req)
	}, func(addr string) string { return addr })
	readBlob(t, reg)
}

// serveHTTP2 returns a registry that handle answers as, by HTTP/2, at the address
// that at makes of the server's.
func serveHTTP2(t *testing.T, handle http.HandlerFunc, at func(addr string) string) *remote.Registry {
	t.Helper()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.ProtoMajor != 2 {
			t.Errorf("asked by %s", req.Proto)
		}
		handle(w, req)
	}))
	server.EnableHTTP2 = true
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	transport := remote.NewTransport()
	transport.TLSClientConfig = &tls.Config{RootCAs: x509.NewCertPool()}
	transport.TLSClientConfig.RootCAs.AddCert(server.Certificate())
	t.Cleanup(transport.CloseIdleConnections)
	reg, err := remote.New(at(server.Listener.Addr().String()), remote.Options{Transport: transport, PlainHTTP: remote.PlainHTTPNever, Credentials: remote.Anonymous})
	if err != nil {
		t.Fatal(err)
	}
	return reg
}

func readBlob(t *testing.T, reg *remote.Registry) {
	t.Helper()
	r, err := reg.GetBlob(t.Context(), "some/repo", blobDigest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || string(got) != string(blob) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// A connection that died without a word doesn't hold up all requests that share
// it: it is found out and replaced before anybody's patience ends.
func TestDeadHTTP2Connection(t *testing.T) {
	t.Parallel()
	var between *relay
	reg := serveHTTP2(t, answer(200, string(blob)), func(addr string) string {
		between = newRelay(t, addr)
		return between.Addr().String()
	})
	readBlob(t, reg)
	between.forget()
	readBlob(t, reg)
}
