package control_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/node/cache"
	"sluice/internal/node/endpoint"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/plane"
	"sluice/internal/node/timeline"
)

// serve serves the control API of a manager that can't mount anything, and of
// events, if there are any, and returns its socket.
func serve(t *testing.T, events *happening.Log) string {
	t.Helper()
	dir := t.TempDir()
	c, err := cache.Open(t.Context(), cache.Options{Dir: filepath.Join(dir, "cache")})
	if err != nil {
		t.Fatal(err)
	}
	m, err := mount.Open(t.Context(), mount.Options{
		Root: filepath.Join(dir, "node"), Cache: c,
		Plane:    mount.NoPlane(&plane.UnsupportedError{Reasons: []string{"a test has no kernel"}}),
		Registry: func(_, _ string) (mount.Registry, error) { return nil, errors.New("no network") },
	})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "control.sock")
	l, err := endpoint.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: control.Handler(m, &timeline.Recorder{}, control.Info{Root: dir, Events: events}, slog.New(slog.DiscardHandler))}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(server.Close(), m.Close(), c.Close()); err != nil {
			t.Error(err)
		}
		<-done
	})
	return socket
}

func TestClient(t *testing.T) {
	client := control.NewClient(serve(t, nil))
	s, err := client.Status(t.Context())
	if err != nil || s.Daemon.PID != os.Getpid() || s.Daemon.Root == "" || s.Images == nil || s.Pulls == nil {
		t.Errorf("status is %+v, %v", s, err)
	}
	_, err = client.Mount(t.Context(), control.Mount{Reference: "registry.test/a:1", Dir: t.TempDir()})
	if mount.ReasonOf(err) != mount.RegistryUnavailable {
		t.Errorf("mounting without a network: %v", err)
	}
	if _, err = client.Mount(t.Context(), control.Mount{Reference: "NOT A REFERENCE"}); err == nil || mount.ReasonOf(err) != "" {
		t.Errorf("mounting nonsense: %v", err)
	}
	if err := client.Unmount(t.Context(), "/not/mounted"); !errors.Is(err, mount.ErrUnknownClaim) {
		t.Errorf("unmounting what isn't mounted: %v", err)
	}
}

// TestDisk asks for what concerns the disk, sensibly and not.
func TestDisk(t *testing.T) {
	socket := serve(t, nil)
	client := control.NewClient(socket)
	if u, err := client.DiskUsage(t.Context()); err != nil || u.Images == nil || u.DiskSize == 0 {
		t.Errorf("usage is %+v, %v", u, err)
	}
	// Its owners haven't come back yet.
	if p, err := client.Prune(t.Context(), mount.PruneOptions{All: true}); err == nil || !strings.Contains(err.Error(), "so soon after the start") {
		t.Errorf("pruned %+v, %v", p, err)
	}
	for _, name := range []string{"", "no.such/image:1", "NO REFERENCE", "a b&c=%%%?/..", strings.Repeat("x", 100_000)} {
		for _, pinned := range []bool{true, false} {
			if err := client.Pin(t.Context(), name, pinned); err == nil || !strings.Contains(err.Error(), "not an image of this node") {
				t.Errorf("pinning %.20q: %v, want that there's no such image", name, err)
			}
		}
	}
	raw := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	defer raw.CloseIdleConnections()
	for _, body := range []string{"", "{", "[]", `{"all":1}`, `{"olderThan":"1h"}`, `{"keep":1e30}`, `{"spareMe":true}`} {
		resp, err := raw.Post("http://node/v1/prune", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("prune %q is answered %d, want 400", body, resp.StatusCode)
		}
	}
}

func TestNoDaemon(t *testing.T) {
	dir := t.TempDir()
	client := control.NewClient(filepath.Join(dir, "no.sock"))
	if _, err := client.Status(t.Context()); !errors.Is(err, control.ErrNoDaemon) {
		t.Errorf("no socket: %v", err)
	}
	dead := filepath.Join(dir, "dead.sock")
	l, err := endpoint.Listen(dead)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := control.NewClient(dead).Status(t.Context()); !errors.Is(err, control.ErrNoDaemon) {
		t.Errorf("a dead daemon's socket: %v", err)
	}
	if l, err = endpoint.Listen(dead); err != nil {
		t.Fatalf("a dead daemon's socket is in the way: %v", err)
	}
	l.Close()
}

func TestStrangeDaemon(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusTeapot)
		io.WriteString(w, "<html>")
	})}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	if _, err := control.NewClient(socket).Status(t.Context()); err == nil || errors.Is(err, control.ErrNoDaemon) {
		t.Errorf("an answer that isn't ours: %v", err)
	}
}
