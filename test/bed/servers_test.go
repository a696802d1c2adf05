package bed

import (
	"context"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"testing"
)

func checkout(t *testing.T) string {
	t.Helper()
	src, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return src
}

func status(t *testing.T, url string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	return resp.StatusCode
}

// ends fails the test unless nobody listens at addr once stop has returned.
func ends(t *testing.T, addr string, stop func()) {
	t.Helper()
	stop()
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
		t.Errorf("something listens on %s after it was stopped", addr)
	}
}

func TestAzurite(t *testing.T) {
	a, err := StartAzurite(t.Context(), checkout(t), t.TempDir(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Stop)
	if got := status(t, a.ServiceURL+"?comp=list"); got != http.StatusForbidden {
		t.Errorf("a request without signature is answered with %d", got)
	}
	if err := a.NewContainer(t.Context(), "images"); err != nil {
		t.Error(err)
	}
	ends(t, a.ServiceURL[len("http://"):len(a.ServiceURL)-len(azuriteAccount)-1], a.Stop)
}

func TestMinIO(t *testing.T) {
	m, err := StartMinIO(t.Context(), checkout(t), t.TempDir(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Stop)
	if err := m.NewBucket("images"); err != nil {
		t.Fatal(err)
	}
	if got := status(t, "http://"+m.Addr+"/images/"); got != http.StatusForbidden {
		t.Errorf("a request without signature is answered with %d", got)
	}
	ends(t, m.Addr, m.Stop)
}

func TestPostgres(t *testing.T) {
	p, err := StartPostgres(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	url, err := p.NewDatabase(t.Context(), "registry")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), filepath.Join(p.bin, "psql"), "-At", "-c", "SHOW fsync", "-c", "SHOW synchronous_commit", url).CombinedOutput()
	if err != nil || string(out) != "on\non\n" {
		t.Errorf("%v: %s", err, out)
	}
	ends(t, p.Addr, p.Stop)
}

func TestPeers(t *testing.T) {
	say := func(s string) { t.Log(s) }
	for name, start := range map[string]func(context.Context, string) (*Peer, error){
		"olareg": func(ctx context.Context, dir string) (*Peer, error) { return StartOlareg(ctx, checkout(t), dir, say) },
		"distribution": func(ctx context.Context, dir string) (*Peer, error) {
			return StartDistribution(ctx, checkout(t), dir, say)
		},
		"nginx": StartNginx,
	} {
		t.Run(name, func(t *testing.T) {
			p, err := start(t.Context(), t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(p.Stop)
			ends(t, p.Addr, p.Stop)
		})
	}
}
