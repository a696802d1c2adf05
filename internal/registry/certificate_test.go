package registry_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/registry"
	"sluice/oci"
	"sluice/oci/ocimem"
)

// writePair writes a certificate with a serial number, and its key.
func writePair(t *testing.T, certFile, keyFile string, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: encoded}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// serveTLS serves with a certificate from files as sluice registry does.
func serveTLS(t *testing.T, listener *pipes, handler http.Handler, log *slog.Logger) (certFile, keyFile string, c *registry.Certificate) {
	t.Helper()
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	writePair(t, certFile, keyFile, 1)
	c, err := registry.LoadCertificate(certFile, keyFile, log)
	if err != nil {
		t.Fatal(err)
	}
	server := registry.NewServer(handler, slog.New(slog.DiscardHandler))
	server.TLSConfig = c.TLSConfig()
	done := make(chan struct{})
	go func() { defer close(done); server.ServeTLS(listener, "", "") }()
	t.Cleanup(func() { server.Close(); <-done })
	return certFile, keyFile, c
}

// dialTLS connects, to whoever answers.
func dialTLS(t *testing.T, listener *pipes, config *tls.Config) (*tls.Conn, error) {
	t.Helper()
	conn, err := listener.dial(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	config.InsecureSkipVerify = true
	encrypted := tls.Client(conn, config)
	return encrypted, encrypted.HandshakeContext(t.Context())
}

// serial connects and returns the serial number of the server's certificate.
func serial(t *testing.T, listener *pipes) int64 {
	t.Helper()
	conn, err := dialTLS(t, listener, &tls.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
}

func TestCertificateFollowsItsFiles(t *testing.T) { synctest.Test(t, testCertificateFollowsItsFiles) }

func testCertificateFollowsItsFiles(t *testing.T) {
	log, lines := newLog()
	listener := newPipes()
	certFile, keyFile, c := serveTLS(t, listener, http.NotFoundHandler(), log)
	if n := serial(t, listener); n != 1 {
		t.Fatalf("the first certificate is %d", n)
	}
	open, err := dialTLS(t, listener, &tls.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	answers := bufio.NewReader(open)
	head := func() {
		t.Helper()
		io.WriteString(open, "HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
		resp, err := http.ReadResponse(answers, &http.Request{Method: http.MethodHead})
		if err != nil || resp.StatusCode != http.StatusNotFound {
			t.Fatalf("over the connection that is open: %v, %v", resp, err)
		}
	}
	head() // the server doesn't wait long for the first

	// A new certificate beside an old key, and no certificate at all.
	writePair(t, certFile, keyFile+".new", 2)
	if err := c.Reload(); err == nil || !strings.Contains(err.Error(), certFile) {
		t.Errorf("half a pair: %v", err)
	}
	if n := serial(t, listener); n != 1 {
		t.Errorf("with half a pair, the certificate is %d", n)
	}
	os.Remove(certFile)
	if err := c.Reload(); err == nil {
		t.Error("no file, and no error")
	}
	if n := serial(t, listener); n != 1 {
		t.Errorf("without files, the certificate is %d", n)
	}

	// A broken one that nobody announces is logged, the good one after it used.
	os.WriteFile(certFile, []byte("nonsense"), 0o600)
	for deadline := time.Now().Add(30 * time.Second); !strings.Contains(lines.String(), "can't be used"); time.Sleep(100 * time.Millisecond) {
		if n := serial(t, listener); n != 1 {
			t.Fatalf("with nonsense, the certificate is %d", n)
		}
		if time.Now().After(deadline) {
			t.Fatal("nonsense isn't logged")
		}
	}
	writePair(t, certFile, keyFile, 3)
	for deadline := time.Now().Add(30 * time.Second); serial(t, listener) != 3; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the new certificate isn't used")
		}
	}
	if n := strings.Count(lines.String(), "can't be used"); n != 1 {
		t.Errorf("%d lines for one broken certificate", n)
	}
	writePair(t, certFile, keyFile, 4)
	if err := c.Reload(); err != nil || serial(t, listener) != 4 {
		t.Errorf("reloaded: %v", err)
	}
	head() // it was open all the time
}

func TestCertificateRefuses(t *testing.T) {
	listener := newPipes()
	certFile, _, _ := serveTLS(t, listener, http.NotFoundHandler(), nil)
	if _, err := registry.LoadCertificate(certFile, "/none", nil); err == nil {
		t.Error("no key, and no error")
	}
	if _, err := dialTLS(t, listener, &tls.Config{MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}); err == nil {
		t.Error("TLS 1.1 is spoken")
	}
}

// Over HTTP/2, pushes, ranges and deadlines are as over HTTP/1.
func TestHTTP2(t *testing.T) { synctest.Test(t, testHTTP2) }

func testHTTP2(t *testing.T) {
	const idle = time.Minute
	reg := ocimem.New()
	log, lines := newLog()
	listener := newPipes()
	addr := listener.Addr().String()
	serveTLS(t, listener, registry.Wrap(registry.NewHandler(reg, registry.Options{}), registry.FrontOptions{IdleTimeout: idle, Log: log}), nil)
	transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DialContext: listener.dial}
	t.Cleanup(transport.CloseIdleConnections)
	client := &http.Client{Transport: transport, Timeout: time.Hour}
	big := bytes.Repeat([]byte(content), 1<<18)
	digest := oci.DigestOf(big).String()

	// Slowly, and for longer than idle.
	pipe, feed := io.Pipe()
	go func() {
		for piece := range len(big) / (1 << 20) {
			time.Sleep(idle - time.Second)
			feed.Write(big[piece<<20 : (piece+1)<<20])
		}
		feed.Close()
	}()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+addr+"/v2/a/blobs/uploads/?digest="+digest, pipe)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated || resp.ProtoMajor != 2 {
		t.Fatalf("a slow push: %s %s", resp.Proto, resp.Status)
	}
	url := "https://" + addr + "/v2/a/blobs/" + digest
	if resp, body := get(t, client, "GET", url); resp.StatusCode != http.StatusOK || body != string(big) {
		t.Errorf("a pull: %s, %d bytes", resp.Status, len(body))
	}
	if resp, body := get(t, client, "GET", url, "Range", "bytes=1000000-1999999"); resp.StatusCode != http.StatusPartialContent || body != string(big[1000000:2000000]) {
		t.Errorf("a range: %s, %d bytes", resp.Status, len(body))
	}

	// A push that stands still, and a pull that nobody reads; others go on.
	pipe, feed = io.Pipe()
	t.Cleanup(func() { feed.Close() })
	go feed.Write([]byte("x"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err = http.NewRequestWithContext(ctx, http.MethodPost, "https://"+addr+"/v2/a/blobs/uploads/?digest="+digest, pipe)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := client.Do(req); err == nil {
		resp.Body.Close()
		if resp.StatusCode != http.StatusRequestTimeout {
			t.Errorf("a push that stands still: %s", resp.Status)
		}
	}
	unread, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer unread.Body.Close()
	time.Sleep(3 * idle)
	if n, err := io.Copy(io.Discard, unread.Body); err == nil {
		t.Errorf("a pull that stood still went on: %d bytes", n)
	}
	if resp, _ := get(t, client, "HEAD", url); resp.StatusCode != http.StatusOK {
		t.Errorf("afterwards: %s", resp.Status)
	}
	for _, l := range lines.requests(t) {
		if l["level"] == "ERROR" && l["status"] == 500.0 {
			t.Errorf("the log: %v", l)
		}
	}
}
