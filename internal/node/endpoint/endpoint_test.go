package endpoint_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"sluice/internal/node/endpoint"
)

func TestListen(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s", "control.sock")
	l, err := endpoint.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if fi, err := os.Stat(socket); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", fi.Mode(), err)
	}
	if second, err := endpoint.Listen(socket); err == nil {
		second.Close()
		t.Error("two daemons listen on one socket")
	}
	if left, err := os.ReadDir(filepath.Dir(socket)); err != nil || len(left) != 1 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

// A socket that a dead daemon left is in nobody's way.
func TestListenAgain(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "dead.sock")
	for range 2 {
		l, err := endpoint.Listen(socket)
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
}

func TestListenKeepsFiles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(file, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := endpoint.Listen(file); err == nil {
		l.Close()
		t.Error("a file was replaced by a socket")
	}
	if content, err := os.ReadFile(file); err != nil || string(content) != "content" {
		t.Errorf("the file has %q, %v", content, err)
	}
}

// Who is told to end before it has begun has closed its listener, too: the next
// can listen there at once.
func TestServeEndsAtOnce(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s.sock")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for range 200 {
		l, err := endpoint.Listen(socket)
		if err != nil {
			t.Fatal(err)
		}
		if err := endpoint.Serve(ended, l, http.NotFoundHandler()); err != nil {
			t.Fatal(err)
		}
	}
}

// Who has asked gets an answer, though the daemon is to end.
func TestServeEnds(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s.sock")
	l, err := endpoint.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	asked, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- endpoint.Serve(ctx, l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			close(asked)
			<-ctx.Done()
			io.WriteString(w, "late")
		}))
	}()
	go func() {
		<-asked
		cancel()
	}()
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://daemon/")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if string(body) != "late" || err != nil {
		t.Errorf("%q, %v", body, err)
	}
	if err := errors.Join(resp.Body.Close(), <-ended); err != nil {
		t.Error(err)
	}
	if err := endpoint.Serve(t.Context(), l, http.NotFoundHandler()); err == nil {
		t.Error("a closed listener is served")
	}
}
