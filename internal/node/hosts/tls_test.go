package hosts_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/oci"
)

// authority is a private CA.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	a.cert, a.key, a.pem = issue(t, nil, &x509.Certificate{
		Subject: pkix.Name{CommonName: "a private CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

// issue makes a key and a certificate for it; without a CA, a self-signed one.
func issue(t *testing.T, ca *authority, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := template, key
	if ca != nil {
		parent, signer = ca.cert, ca.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// server returns a certificate for 127.0.0.1.
func (a *authority) server(t *testing.T) tls.Certificate {
	t.Helper()
	cert, key, _ := issue(t, a, &x509.Certificate{
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

// client returns a certificate and a key for a client, as the text of files.
func (a *authority) client(t *testing.T, name string) (cert, key string) {
	t.Helper()
	_, k, cert := issue(t, a, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return cert, string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))
}

// serveTLS starts a registry with a certificate of server, that wants one of
// clients, if that isn't nil.
func serveTLS(t *testing.T, server, clients *authority) *server {
	s := newServer(t)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{server.server(t)}}
	if clients != nil {
		s.TLS.ClientCAs = x509.NewCertPool()
		s.TLS.ClientCAs.AddCert(clients.cert)
		s.TLS.ClientAuth = tls.RequireAndVerifyClientCert
	}
	s.EnableHTTP2 = true
	s.StartTLS()
	return s
}

// last returns the last request.
func (s *server) last() *http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[len(s.seen)-1]
}

// Private CAs and client certificates in all forms that containerd knows; what
// they open is spoken to by HTTP/2, over one connection.
func TestTLS(t *testing.T) {
	ca, clients := newAuthority(t), newAuthority(t)
	cert, key := clients.client(t, "node-1")
	pair := map[string]string{"ca.pem": ca.pem, "node.cert": cert, "node.key": key, "both.pem": cert + key}
	for name, c := range map[string]struct {
		toml  string // of the registry's directory; SERVER is its URL
		files map[string]string
		works bool
	}{
		"nothing":            {toml: "server = \"SERVER\"\n"},
		"CA only":            {toml: "server = \"SERVER\"\nca = \"ca.pem\"\n"},
		"pair":               {toml: "server = \"SERVER\"\nca = \"ca.pem\"\nclient = [[\"node.cert\", \"node.key\"]]\n", works: true},
		"one file":           {toml: "server = \"SERVER\"\nca = [\"ca.pem\"]\nclient = \"both.pem\"\n", works: true},
		"files":              {toml: "server = \"SERVER\"\nca = [\"ca.pem\"]\nclient = [\"both.pem\"]\n", works: true},
		"not verified":       {toml: "server = \"SERVER\"\nskip_verify = true\nclient = \"both.pem\"\n", works: true},
		"another CA":         {toml: "server = \"SERVER\"\nca = \"other.pem\"\nclient = \"both.pem\"\n", files: map[string]string{"other.pem": clients.pem}},
		"of a mirror":        {toml: "server = \"http://127.0.0.1:1\"\n[host.\"SERVER\"]\nca = \"ca.pem\"\nclient = \"both.pem\"\ndial_timeout = \"3s\"\n", works: true},
		"of a mirror's path": {toml: "server = \"http://127.0.0.1:1\"\n[host.\"SERVER/v2\"]\noverride_path = true\nca = \"ca.pem\"\nclient = \"both.pem\"\n", works: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := serveTLS(t, ca, clients).fill(t)
			files := map[string]string{"example.test/hosts.toml": strings.ReplaceAll(c.toml, "SERVER", s.URL)}
			for _, more := range []map[string]string{pair, c.files} {
				for name, text := range more {
					files["example.test/"+name] = text
				}
			}
			r := example(t, openDirs(t, dir(t, files)))
			if !c.works {
				if _, err := r.GetManifest(t.Context(), repo, "v1"); err == nil {
					t.Error("it works")
				}
				return
			}
			if _, err := r.GetManifest(t.Context(), repo, "v1"); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for i := range int64(20) {
				wg.Go(func() { checkRange(t, r, 100*i, 1000) })
			}
			wg.Wait()
			if n := s.connections(); n != 1 {
				t.Errorf("%d connections", n)
			}
			if req := s.last(); req.ProtoMajor != 2 || req.TLS.PeerCertificates[0].Subject.CommonName != "node-1" {
				t.Errorf("%s of %q", req.Proto, req.TLS.PeerCertificates[0].Subject)
			}
		})
	}
}

// A directory without a hosts.toml, with certificates as docker has them.
func TestDockersCertificates(t *testing.T) {
	ca, clients := newAuthority(t), newAuthority(t)
	cert, key := clients.client(t, "node-1")
	s := serveTLS(t, ca, clients).fill(t)
	host, port, _ := net.SplitHostPort(s.addr())
	for name, sub := range map[string]string{"colon": s.addr(), "underscores": host + "_" + port + "_", "default": "_default"} {
		t.Run(name, func(t *testing.T) {
			root := dir(t, map[string]string{
				filepath.Join(sub, "ca.crt"): ca.pem, filepath.Join(sub, "node.cert"): cert, filepath.Join(sub, "node.key"): key,
			})
			r, err := openDirs(t, filepath.Join(root, "none"), root).Registry(s.addr(), repo)
			if err != nil {
				t.Fatal(err)
			}
			checkRange(t, r, 0, 100)
			if req := s.last(); req.URL.RawQuery != "" {
				t.Errorf("the registry is told which registry is meant: %s", req.URL)
			}
		})
	}
}

// A registry on loopback that no file knows has no privileges with TLS.
func TestLoopbackIsVerified(t *testing.T) {
	l, err := net.Listen("tcp", "127.83.17.6:443")
	if err != nil {
		t.Skip("listening at port 443:", err)
	}
	s := newServer(t)
	s.Listener.Close()
	s.Listener = l
	s.TLS = &tls.Config{Certificates: []tls.Certificate{newAuthority(t).server(t)}}
	s.StartTLS()
	r, err := openDirs(t).Registry(s.addr(), repo)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.ResolveManifest(t.Context(), repo, "v1"); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an unknown certificate: %v", err)
	}
}

// A registry on loopback that has a directory may speak TLS with any certificate,
// or do without, as containerd has it. One that has none does without, and costs
// no attempt.
func TestLoopback(t *testing.T) {
	plain, secret := serve(t).fill(t), serveTLS(t, newAuthority(t), nil).fill(t)
	root := dir(t, map[string]string{plain.addr() + "/README": "", secret.addr() + "/README": ""})
	for name, c := range map[string]struct {
		server      *server
		dirs        []string
		connections int
	}{
		"without a directory": {plain, nil, 1},
		"plain":               {plain, []string{root}, 2},
		"TLS":                 {secret, []string{root}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			before := c.server.connections()
			r, err := openDirs(t, c.dirs...).Registry(c.server.addr(), repo)
			if err != nil {
				t.Fatal(err)
			}
			for i := range int64(3) {
				checkRange(t, r, i, 100)
			}
			if n := c.server.connections() - before; n != c.connections {
				t.Errorf("%d connections, want %d", n, c.connections)
			}
		})
	}
}

// Headers of the file go to its host and nowhere else: not to where that sends
// its clients.
func TestHeadersStayWithTheirHost(t *testing.T) {
	objects, mirror := serve(t).fill(t), serve(t).fill(t)
	mirror.setFront(func(w http.ResponseWriter, req *http.Request) bool {
		if !strings.Contains(req.URL.Path, "/blobs/") {
			return false
		}
		http.Redirect(w, req, objects.URL+req.URL.Path, http.StatusTemporaryRedirect)
		return true
	})
	r := example(t, open(t, fmt.Sprintf("server = \"http://127.0.0.1:1\"\n[host.%q.header]\nx-secret = \"sesame\"\nX-Both = [\"a\", \"b\"]\n", mirror.URL)))
	checkRange(t, r, 0, 10)
	checkRange(t, r, 0, 10)
	if _, err := r.GetManifest(t.Context(), repo, oci.DigestOf(mirror.manifest.Content).String()); err != nil {
		t.Error(err)
	}
	if got := mirror.last().Header; got.Get("X-Secret") != "sesame" || len(got.Values("X-Both")) != 2 {
		t.Errorf("the mirror got %v", got)
	}
	if got := objects.last().Header; got.Get("X-Secret") != "" || got.Get("X-Both") != "" {
		t.Errorf("the object store got %v", got)
	}
}
