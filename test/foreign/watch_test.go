package foreign

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"sluice/oci"
	"sluice/test/bed"
)

// What is pushed to distribution is converted, as its own notifications tell.
func TestWatchDistribution(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	address := net.JoinHostPort("127.0.0.2", port) // for later: distribution is told of it first, and nobody else gets this port meanwhile
	t.Setenv("REGISTRY_NOTIFICATIONS_ENDPOINTS", fmt.Sprintf(
		"[{name: sluice, url: %q, timeout: 5s, threshold: 100, backoff: 200ms, headers: {Authorization: [Bearer s3cret]}}]", "http://"+address+"/hook"))
	p := withRegistry(t, "distribution")
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := p.image("team/app", "before", runtime.GOARCH, tree(1)...) // told again until somebody listens
	watch := func() *bed.Process {
		w, err := bed.Start(dir, "watch", nil, p.bin, "artifact-streaming", "watch", "--registry", "http://"+p.addr, "--listen", address,
			"--secret-file", secret, "--data", filepath.Join(dir, "data"), "--repository", "team/*")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(w.Stop)
		if err := w.AwaitSocket(t.Context(), "tcp", address); err != nil {
			t.Fatal(err)
		}
		return w
	}
	w := watch()
	p.awaitArtifact("team/app", before)
	w.Kill()
	image := p.image("team/app", "", runtime.GOARCH, tree(2)...)
	index := p.manifest("team/app", "all", oci.MediaTypeIndex, oci.Index{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex,
		Manifests: []oci.Descriptor{{MediaType: image.MediaType, Digest: image.Digest, Size: image.Size, Platform: &oci.Platform{OS: "linux", Architecture: runtime.GOARCH}}},
	})
	unwanted := p.image("other/app", "v1", runtime.GOARCH, tree(3)...)
	watch()
	p.awaitArtifact("team/app", image)
	p.awaitArtifact("team/app", index)
	if n := p.artifacts("other/app", unwanted); n != 0 {
		t.Error("an image was converted that nobody asked for")
	}
}

func (p *program) artifacts(repo string, subject oci.Descriptor) (n int) {
	p.t.Helper()
	for _, err := range p.reg.Referrers(p.t.Context(), repo, subject.Digest, oci.ArtifactTypeStreaming) {
		if err != nil {
			p.t.Fatal(err)
		}
		n++
	}
	return n
}

func (p *program) awaitArtifact(repo string, subject oci.Descriptor) {
	p.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); p.artifacts(repo, subject) == 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("%s of %s has no streaming artifact", subject.Digest, repo)
		}
	}
}
