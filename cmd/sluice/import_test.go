package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/registry"
	"sluice/oci"
	"sluice/oci/ocimem"
)

// serveRegistry returns the address of a registry, behind the wrappers.
func serveRegistry(t *testing.T, reg oci.Registry, wrap ...func(http.Handler) http.Handler) string {
	t.Helper()
	var h http.Handler = registry.NewHandler(reg, registry.Options{})
	for _, w := range wrap {
		h = w(h)
	}
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

// importHome gives the test a user's directories of its own.
func importHome(t *testing.T) {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
}

// imported is what -o json prints.
type imported struct {
	Image, Digest, MediaType string
	Tags, Platforms, Notes   []string
	Copied, Skipped, Mounted struct{ Blobs, Bytes int64 }
	DryRun                   bool
}

func runImport(t *testing.T, args ...string) (imported, string) {
	t.Helper()
	stdout, stderr, err := runSluice(t, append([]string{"import", "-o", "json"}, args...)...)
	if err != nil {
		t.Fatalf("import %v: %v", args, err)
	}
	var doc imported
	if err := json.Unmarshal([]byte(stdout), &doc); err != nil {
		t.Fatal(err)
	}
	return doc, stderr
}

func TestImport(t *testing.T) {
	importHome(t)
	from, to := ocimem.New(), ocimem.New()
	src, dst := serveRegistry(t, from), serveRegistry(t, to)
	desc := pushImage(t, from, "team/app", "v1", "linux", "one", strings.Repeat("two ", 300_000))

	dry, _ := runImport(t, src+"/team/app:v1", dst+"/copy/app", "--dry-run")
	if _, err := to.ResolveManifest(t.Context(), "copy/app", "v1"); err == nil || !dry.DryRun || dry.Copied.Blobs != 3 {
		t.Errorf("a dry run: %+v, %v", dry, err)
	}
	got, stderr := runImport(t, src+"/team/app:v1", dst+"/copy/app")
	if got.Digest != desc.Digest.String() || got.Copied != dry.Copied || got.Platforms[0] != "linux/amd64" || got.Tags[0] != "v1" {
		t.Errorf("it printed %+v", got)
	}
	for _, want := range []string{"copy/app: copying 3 blobs, 1.2 MB", "copy/app: copied"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("it said %q, which lacks %q", stderr, want)
		}
	}
	stdout, _, err := runSluice(t, "import", src+"/team/app:v1", dst+"/copy/app:v2", "--tag", "v3", "--tag", "v4")
	if err != nil || !strings.Contains(stdout, "v2,v3,v4") || !strings.Contains(stdout, shortDigest(desc.Digest)) {
		t.Errorf("%q, %v", stdout, err)
	}
	for _, tag := range []string{"v1", "v2", "v3", "v4"} {
		if got, err := to.ResolveManifest(t.Context(), "copy/app", tag); err != nil || got.Digest != desc.Digest {
			t.Errorf("%s: %v, %v", tag, got, err)
		}
	}
	got, _ = runImport(t, dst+"/copy/app:v1", dst+"/other/app")
	if got.Mounted.Blobs != 3 {
		t.Errorf("within a registry: %+v", got)
	}
	got, stderr = runImport(t, src+"/team/app@"+desc.Digest.String(), dst+"/untagged/app")
	if len(got.Tags) != 0 || !strings.Contains(stderr, "by its digest") {
		t.Errorf("of a digest: %+v, %q", got, stderr)
	}
	if _, err := to.ResolveManifest(t.Context(), "untagged/app", desc.Digest.String()); err != nil {
		t.Error(err)
	}
}

func TestImportWithCredentials(t *testing.T) {
	importHome(t)
	from, to := ocimem.New(), ocimem.New()
	src := serveRegistry(t, from, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if user, password, _ := r.BasicAuth(); user != "me" || password != "secret" {
				w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			next.ServeHTTP(w, r)
		})
	})
	dst := serveRegistry(t, to)
	pushImage(t, from, "app", "v1", "linux", "one")
	try := func(password string, args ...string) error {
		cmd := newCommand()
		cmd.SetArgs(append([]string{"import", src + "/app:v1", dst + "/app"}, args...))
		cmd.SetIn(strings.NewReader(password))
		cmd.SetOut(io.Discard)
		cmd.SetErr(io.Discard)
		return cmd.ExecuteContext(t.Context())
	}
	for want, err := range map[string]error{
		"UNAUTHORIZED":              try(""),
		"UNAUTHORIZED: ":            try("wrong\n", "--source-username", "me", "--source-password-stdin"),
		"no password on":            try("", "--source-username", "me", "--source-password-stdin"),
		"[source-username source-p": try("", "--source-username", "me"),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if err := try("secret\n", "--source-username", "me", "--source-password-stdin"); err != nil {
		t.Error(err)
	}
}

// savedImage returns what docker save wrote before version 25.
func savedImage(t *testing.T, name string) []byte {
	t.Helper()
	config := oci.ImageConfig{Platform: oci.Platform{OS: "linux", Architecture: "arm64"}}
	config.RootFS.DiffIDs = []oci.Digest{oci.DigestOf([]byte("layer"))}
	c, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range map[string]string{
		"config.json": string(c), "x/layer.tar": "layer",
		"manifest.json": `[{"Config":"config.json","RepoTags":["` + name + `"],"Layers":["x/layer.tar"]}]`,
	} {
		if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(content)), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestImportOfArchives(t *testing.T) {
	importHome(t)
	to := ocimem.New()
	dst := serveRegistry(t, to)
	content := savedImage(t, "app:v7")
	t.Chdir(t.TempDir())
	for _, name := range []string{"saved.tar", "odd:name@x.tar"} {
		if err := os.WriteFile(name, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	abs, err := filepath.Abs("saved.tar")
	if err != nil {
		t.Fatal(err)
	}
	for _, from := range []string{
		"saved.tar", "./saved.tar", abs, "docker-archive:saved.tar", "docker-archive:saved.tar:app:v7", "docker-archive:" + abs + ":v7",
		"odd:name@x.tar", "docker-archive:odd:name@x.tar:docker.io/library/app:v7", "-",
	} {
		to := ocimem.New()
		dst := serveRegistry(t, to)
		var out bytes.Buffer
		cmd := newCommand()
		cmd.SetArgs([]string{"import", from, dst + "/team/app"})
		cmd.SetIn(bytes.NewReader(content))
		cmd.SetOut(&out)
		cmd.SetErr(io.Discard)
		if err := cmd.ExecuteContext(t.Context()); err != nil || !strings.Contains(out.String(), "linux/arm64") {
			t.Errorf("%s: %q, %v", from, &out, err)
		}
		if _, err := to.ResolveManifest(t.Context(), "team/app", "v7"); err != nil {
			t.Errorf("%s: %v", from, err)
		}
	}
	for want, args := range map[string][]string{
		`it has "app:v7"`:             {"docker-archive:saved.tar:app:v8", dst + "/app"},
		"no such file":                {"docker-archive:nonesuch.tar:app", dst + "/app"},
		"no such file or":             {"./nonesuch.tar", dst + "/app"},
		"not an OCI image layout but": {"oci-archive:saved.tar", dst + "/app"},
		"names no registry":           {"saved.tar", "app:v1"},
		"the digest is the image's":   {"saved.tar", dst + "/app@" + oci.DigestOf(nil).String()},
		"target: image reference":     {"saved.tar", dst + "/UPPER"},
		"linux/arm64 only":            {"saved.tar", dst + "/app", "--platform", "linux/amd64"},
		"--output":                    {"saved.tar", dst + "/app", "-o", "xml"},
		"needs to exist":              {"NONESUCH", dst + "/app"},
		"is for registries":           {"saved.tar", dst + "/app", "--source-username", "me", "--source-password-stdin"},
		"usage: sluice import":        {"saved.tar"},
		"is not a tag":                {"saved.tar", dst + "/app", "--tag", "-x"},
	} {
		_, _, err := runSluice(t, append([]string{"import"}, args...)...)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: got %v, want %q", args, err, want)
		}
	}
}

// cutter forwards connections to addr, and cuts each after so many bytes.
type cutter struct {
	after int64
	cuts  atomic.Int64
	bytes atomic.Int64
}

func (c *cutter) listen(t *testing.T, addr string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() { l.Close(); all.Wait() })
	all.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { c.forward(t.Context(), client, addr) })
		}
	})
	return l.Addr().String()
}

func (c *cutter) forward(ctx context.Context, client net.Conn, addr string) {
	defer client.Close()
	server, err := net.Dial("tcp", addr)
	if err != nil {
		return
	}
	defer server.Close()
	defer context.AfterFunc(ctx, func() { client.Close(); server.Close() })()
	left := c.after
	var mu sync.Mutex
	pipe := func(dst io.Writer, src io.Reader) {
		defer client.Close()
		defer server.Close()
		b := make([]byte, 16<<10)
		for {
			n, err := src.Read(b)
			c.bytes.Add(int64(n))
			mu.Lock()
			left -= int64(n)
			over := left < 0
			mu.Unlock()
			if over {
				c.cuts.Add(1)
				return
			}
			if _, werr := dst.Write(b[:n]); err != nil || werr != nil {
				return
			}
		}
	}
	var both sync.WaitGroup
	both.Go(func() { pipe(server, client) })
	pipe(client, server)
	both.Wait()
}

func randomText(n int) string {
	b := make([]byte, n)
	src := rand.NewChaCha8([32]byte{7})
	_, _ = src.Read(b)
	return string(b)
}

// On a line that breaks every few megabytes, in both directions, an import
// arrives, and little is sent twice.
func TestImportOverABadLine(t *testing.T) {
	importHome(t)
	from, to := ocimem.New(), ocimem.New()
	const size = 24 << 20
	desc := pushImage(t, from, "app", "v1", "linux", randomText(size))
	in, out := &cutter{after: 5 << 20}, &cutter{after: 11 << 20}
	src, dst := in.listen(t, serveRegistry(t, from)), out.listen(t, serveRegistry(t, to))
	got, _ := runImport(t, src+"/app:v1", dst+"/app")
	if got.Digest != desc.Digest.String() {
		t.Errorf("got %+v", got)
	}
	if in.cuts.Load() < 4 || out.cuts.Load() < 2 {
		t.Errorf("the lines were cut %d and %d times", in.cuts.Load(), out.cuts.Load())
	}
	if n := in.bytes.Load(); n > size*3/2 {
		t.Errorf("%d bytes came for an image of %d", n, size)
	}
}

// An import that was killed goes on where it was.
func TestKilledImportGoesOn(t *testing.T) {
	importHome(t)
	from, to := ocimem.New(), ocimem.New()
	const size = 48 << 20
	desc := pushImage(t, from, "app", "v1", "linux", randomText(size))
	var patched atomic.Int64
	var under sync.WaitGroup // requests
	going, killed := make(chan struct{}), make(chan struct{})
	goes, kill := sync.OnceFunc(func() { close(going) }), sync.OnceFunc(func() { close(killed) })
	src := serveRegistry(t, from)
	dst := serveRegistry(t, to, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPatch {
				under.Add(1)
				defer under.Done()
				defer patched.Add(r.ContentLength)
				if patched.Load() >= size/3 { // it gets no further before it's killed
					goes()
					<-killed
				}
			}
			next.ServeHTTP(w, r)
		})
	})
	t.Cleanup(kill)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "import", src+"/app:v1", dst+"/app")
	cmd.Env = append(os.Environ(), programVariable+"=1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-going:
	case <-ctx.Done():
		t.Error("the import didn't get going")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("the import was done before it was killed")
	}
	first := patched.Load()
	kill()
	under.Wait()
	got, _ := runImport(t, src+"/app:v1", dst+"/app")
	if got.Digest != desc.Digest.String() {
		t.Errorf("got %+v", got)
	}
	if n := patched.Load(); n > size+(9<<20) || first < size/3 {
		t.Errorf("%d bytes were sent at first and %d in all, of a layer of %d", first, n, size)
	}
}

// Whoever interrupts an import hears how to go on.
func TestInterruptedImportSaysSo(t *testing.T) {
	importHome(t)
	from, to := ocimem.New(), ocimem.New()
	pushImage(t, from, "app", "v1", "linux", randomText(24<<20))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	src, dst := serveRegistry(t, from), serveRegistry(t, to, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPatch {
				cancel()
			}
			next.ServeHTTP(w, r)
		})
	})
	cmd := newCommand()
	cmd.SetArgs([]string{"import", src + "/app:v1", dst + "/app"})
	cmd.SetOut(io.Discard)
	cmd.SetErr(io.Discard)
	err := cmd.ExecuteContext(ctx)
	if err == nil || !strings.Contains(err.Error(), "run the same command again") {
		t.Errorf("got %v", err)
	}
}
