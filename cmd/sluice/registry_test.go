package main

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
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"sluice/oci"
)

// startRegistry runs `sluice registry` with a free port until the test ends, and
// returns its address and a function that stops it, waits for that, and returns what
// it ended with.
func startRegistry(t *testing.T, args ...string) (addr string, stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := registryCommand(ctx, w, append([]string{"--listen", "127.0.0.1:0"}, args...)...)
		w.CloseWithError(err)
		done <- err
	}()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { // before its directory goes
		if err := stop(); err != nil {
			t.Errorf("the registry ended: %v", err)
		}
	})
	line, err := bufio.NewReader(r).ReadString('\n')
	rest, ok := strings.CutPrefix(line, "listening on ")
	addr, _, _ = strings.Cut(rest, ",")
	if !ok || err != nil {
		t.Fatalf("it said %q, %v", line, err)
	}
	return addr, stop
}

// registryCommand is `sluice registry`.
func registryCommand(ctx context.Context, stdout io.Writer, args ...string) error {
	cmd := newCommand()
	cmd.SetArgs(append([]string{"registry"}, args...))
	cmd.SetOut(stdout)
	cmd.SetErr(io.Discard)
	return cmd.ExecuteContext(ctx)
}

func TestRegistryServesAndStops(t *testing.T) {
	data := filepath.Join(t.TempDir(), "new", "data")
	addr, stop := startRegistry(t, "--data", data)

	// A push that is under way when the registry is told to stop is served.
	body, source := io.Pipe()
	content := bytes.Repeat([]byte("x"), 100_000)
	digest := oci.DigestOf(content)
	req, err := http.NewRequest(http.MethodPost, "http://"+addr+"/v2/a/blobs/uploads/?digest="+digest.String(), body)
	if err != nil {
		t.Fatal(err)
	}
	answer := make(chan int, 1)
	go func() {
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Error(err)
			answer <- 0
			return
		}
		resp.Body.Close()
		answer <- resp.StatusCode
	}()
	source.Write(content[:50_000])
	for arrived := false; !arrived; time.Sleep(5 * time.Millisecond) {
		uploads, err := os.ReadDir(filepath.Join(data, ".sluice/uploads"))
		if err != nil {
			t.Fatal(err)
		}
		arrived = len(uploads) > 0
	}
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	for { // until it takes no more connections
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			break
		}
		conn.Close()
		time.Sleep(5 * time.Millisecond)
	}
	source.Write(content[50_000:])
	source.Close()
	if status := <-answer; status != http.StatusCreated {
		t.Errorf("the push under way: status %d", status)
	}
	if err := <-stopped; err != nil {
		t.Errorf("stop: %v", err)
	}

	addr, stop = startRegistry(t, "--data", data)
	resp, err := http.Head("http://" + addr + "/v2/a/blobs/" + digest.String())
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("the blob after a restart: status %d", resp.StatusCode)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestRegistryRefuses(t *testing.T) {
	data := t.TempDir()
	addr, _ := startRegistry(t, "--data", data)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string][]string{
		"another registry":              {"--data", data},
		addr + " is in use":             {"--data", t.TempDir(), "--listen", addr},
		"can't listen on 256.0.0.1:1":   {"--data", t.TempDir(), "--listen", "256.0.0.1:1"},
		file + "/data can't be used":    {"--data", file + "/data"},
		"no such file or directory":     {"--data", t.TempDir(), "--tls-cert", "/none", "--tls-key", "/none"},
		"data directory /proc/self/new": {"--data", "/proc/self/new"},
		"listen = \"5000\" (flag)":      {"--data", t.TempDir(), "--listen", "5000"},
		"write KEY=VALUE":               {"--set", "auth.enabled"},
		"there is no such key":          {"--set", "auth.enable=true"},
	} {
		err := registryCommand(t.Context(), io.Discard, append([]string{"--listen", "127.0.0.1:0"}, args...)...)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: error %v, want one with %q", args, err, want)
		}
	}
}

func TestRegistryTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	pool := writeCertificate(t, cert, key)
	addr, stop := startRegistry(t, "--data", filepath.Join(dir, "data"), "--tls-cert", cert, "--tls-key", key)
	client := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}}
	content := bytes.Repeat([]byte("0123456789"), 1<<18)
	url := "https://" + addr + "/v2/a/blobs/"
	digest := oci.DigestOf(content).String()
	resp, err := client.Post(url+"uploads/?digest="+digest, "application/octet-stream", bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated || resp.ProtoMajor != 2 {
		t.Errorf("push: %s, %s", resp.Status, resp.Proto)
	}
	resp, err = client.Get(url + digest)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("pull: %d bytes, %v", len(got), err)
	}
	client.CloseIdleConnections()
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func writeCertificate(t *testing.T, certName, keyName string) *x509.CertPool {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{certName: {Type: "CERTIFICATE", Bytes: der}, keyName: {Type: "PRIVATE KEY", Bytes: encoded}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return pool
}

// A registry whose index is lost, damaged, or that never had one (as before
// there was an index), has its images all the same.
func TestRegistryRebuildsIndex(t *testing.T) {
	data := t.TempDir()
	file := filepath.Join(data, "index.db")
	content := []byte("layer")
	blob := oci.DigestOf(content)
	manifest := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"application/x-test",` +
		`"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"` + blob.String() + `","size":5},"layers":[]}`
	addr, stop := startRegistry(t, "--data", data)
	send(t, http.MethodPost, "http://"+addr+"/v2/a/blobs/uploads/?digest="+blob.String(), "application/octet-stream", string(content), http.StatusCreated)
	send(t, http.MethodPut, "http://"+addr+"/v2/a/manifests/v1", "application/vnd.oci.image.manifest.v1+json", manifest, http.StatusCreated)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	served := func(after string) {
		addr, stop := startRegistry(t, "--data", data)
		got := send(t, http.MethodGet, "http://"+addr+"/v2/a/tags/list", "", "", http.StatusOK)
		if !strings.Contains(got, `["v1"]`) {
			t.Errorf("%s: tags are %s", after, got)
		}
		if got := send(t, http.MethodGet, "http://"+addr+"/v2/a/manifests/v1", "", "", http.StatusOK); got != manifest {
			t.Errorf("%s: manifest is %s", after, got)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	}

	remove(t, file)
	served("the index is new")

	if err := os.WriteFile(file, bytes.Repeat([]byte("damaged "), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	err := registryCommand(t.Context(), io.Discard, "--data", data, "--listen", "127.0.0.1:0")
	if err == nil || !strings.Contains(err.Error(), "rebuild-index") {
		t.Errorf("a damaged index: error %v, want one that names rebuild-index", err)
	}
	var out bytes.Buffer
	if err := registryCommand(t.Context(), &out, "rebuild-index", "--data", data); err != nil || out.String() != "indexed 1 repository\n" {
		t.Errorf("rebuild-index: %q, %v", out.String(), err)
	}
	served("the index was damaged")

	// It refuses while a registry runs.
	startRegistry(t, "--data", data)
	if err := registryCommand(t.Context(), io.Discard, "rebuild-index", "--data", data); err == nil || !strings.Contains(err.Error(), "another registry") {
		t.Errorf("rebuild-index beside a registry: %v", err)
	}
}

func remove(t *testing.T, file string) {
	t.Helper()
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Remove(file + suffix); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
}

// send sends a request and returns the answer's body.
func send(t *testing.T, method, url, contentType, body string, want int) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != want {
		t.Fatalf("%s %s: %s, %v\n%s", method, url, resp.Status, err, got)
	}
	return string(got)
}

func TestCheckConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "registry.toml")
	if err := os.WriteFile(file, []byte("listen = \":1\"\n[soft_delete]\ndays = 7\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SLUICE_REGISTRY_STORAGE_S3_SECRET_KEY", "geheim")
	var out bytes.Buffer
	if err := registryCommand(t.Context(), &out, "check-config", "--config", file, "--set", "soft_delete.days=9", "--set", "storage.s3.access_key=me"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`listen = ":1"  # ` + file + ":1\n", "soft_delete.days = 9  # flag\n", "push.upload_age = \"24h0m0s\"\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("check-config doesn't print %q:\n%s", want, &out)
		}
	}
	if strings.Contains(out.String(), "geheim") {
		t.Error("check-config prints a secret")
	}
}

// With an object store the data directory has the index alone, and is made like
// any other.
func TestRegistryOnAnObjectStore(t *testing.T) {
	backend := s3mem.New()
	if err := backend.CreateBucket("images"); err != nil {
		t.Fatal(err)
	}
	objects := httptest.NewServer(gofakes3.New(backend).Server())
	defer objects.Close()
	t.Setenv("SLUICE_REGISTRY_STORAGE_S3_SECRET_KEY", "secret")
	args := []string{
		"--data", filepath.Join(t.TempDir(), "new", "data"), "--set", "storage.kind=s3", "--set", "storage.s3.bucket=images",
		"--set", "storage.s3.endpoint=" + strings.TrimPrefix(objects.URL, "http://"), "--set", "storage.s3.insecure=true",
		"--set", "storage.s3.access_key=me", "--set", "storage.s3.region=us-east-1",
	}
	addr, stop := startRegistry(t, args...)
	blob := oci.DigestOf([]byte("layer"))
	send(t, http.MethodPost, "http://"+addr+"/v2/a/blobs/uploads/?digest="+blob.String(), "application/octet-stream", "layer", http.StatusCreated)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	addr, stop = startRegistry(t, args...)
	if got := send(t, http.MethodGet, "http://"+addr+"/v2/a/blobs/"+blob.String(), "", "", http.StatusOK); got != "layer" {
		t.Errorf("the blob is %q", got)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}
