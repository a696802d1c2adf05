package lifecycle

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sluice/internal/node/mount/control"
	"sluice/test/bed"
)

// TestMirrors pulls and runs an image whose registry is gone for good, by
// hosts.toml: of its mirrors the first never answers, the second changes bits in
// all blobs, and the third is a registry.
func TestMirrors(t *testing.T) {
	s := theStage(t)
	mirror, err := bed.StartRegistry(t.Context(), s.Sluice, t.TempDir())
	must(t, err)
	t.Cleanup(mirror.Stop)
	s.convert(t, s.push(t, mirror, s.app, "app:1"))
	reg, err := bed.StartRegistry(t.Context(), s.Sluice, t.TempDir())
	must(t, err)
	reg.Kill()
	ref := reg.Addr + "/app:1"

	// containerd has no patience for one that is silent, so its own is dead.
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer silent.Close()
	ours := hostsDir(t, reg.Addr, "http://"+silent.Addr().String(), liar(t, mirror.Addr), "http://"+mirror.Addr)
	theirs := hostsDir(t, reg.Addr, "http://"+reg.Addr, "http://"+mirror.Addr)
	n := s.newNode(t, s.Tools, "--hosts-dir", ours, "--no-fill")
	start(t, n)
	_, err = n.Ctr(t.Context(), "images", "pull", "--hosts-dir", theirs, "--snapshotter", bed.Sluice, ref)
	must(t, err)
	streams(t, n, ref)
	r, err := n.Run(t.Context(), bed.Sluice, ref, "mirrored", checkSums()...)
	must(t, err)
	if r.Output != sumsOf(s.app) {
		t.Errorf("the container has %s", r.Output)
	}
	now := status(t, n)
	// The registry is among them since it was asked for what came wrong.
	if p := now.Registries; !slices.ContainsFunc(p, func(p control.RegistryProblem) bool { return p.Host == "http://"+silent.Addr().String()+"/v2" }) {
		t.Errorf("problems of registries are %+v", p)
	}
	if now.Cache.Corrupt == 0 {
		t.Error("the mirror that lies wasn't asked")
	}
}

// liar starts a mirror that changes a bit of whatever it reads of a registry's
// blobs, and returns its URL.
func liar(t *testing.T, registry string) string {
	t.Helper()
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry})
	proxy.ModifyResponse = func(resp *http.Response) error {
		if strings.Contains(resp.Request.URL.Path, "/blobs/") {
			resp.Body = changed{resp.Body}
		}
		return nil
	}
	s := httptest.NewServer(proxy)
	t.Cleanup(s.Close)
	return s.URL
}

type changed struct{ io.ReadCloser }

func (c changed) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	if n > 0 {
		p[0] ^= 1
	}
	return n, err
}

// hostsDir makes a directory of hosts.toml files: of one, for a registry with
// mirrors.
func hostsDir(t *testing.T, registry string, mirrors ...string) string {
	t.Helper()
	text := fmt.Sprintf("server = \"http://%s\"\n", registry)
	for _, m := range mirrors {
		text += fmt.Sprintf("[host.%q]\n", m)
	}
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, registry), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, registry, "hosts.toml"), []byte(text), 0o644))
	return dir
}
