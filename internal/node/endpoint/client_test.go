package endpoint_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/node/endpoint"
)

func TestClient(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s.sock")
	client := endpoint.NewClient(socket)
	ask := func(body any) (string, error) {
		req, err := endpoint.NewRequest(t.Context(), http.MethodPost, "/v1/x?y=z", body)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		return string(answer), err
	}
	if _, err := ask(nil); !errors.Is(err, endpoint.ErrNobody) {
		t.Errorf("without a socket: %v", err)
	}
	l, err := endpoint.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() {
		served <- endpoint.Serve(ctx, l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			io.WriteString(w, r.RequestURI+" "+string(body))
		}))
	}()
	if got, err := ask([]int{1}); err != nil || got != "/v1/x?y=z [1]\n" {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := ask(nil); err != nil || got != "/v1/x?y=z " {
		t.Errorf("without a body: %q, %v", got, err)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := ask(nil); !errors.Is(err, endpoint.ErrNobody) {
		t.Errorf("after its end: %v", err)
	}
}

func TestStart(t *testing.T) {
	dir := t.TempDir()
	log, never := filepath.Join(dir, "log"), errors.New("no")
	err := endpoint.Start(t.Context(), log, "/bin/sh", []string{"-c", "echo out of luck; exit 3"}, func(context.Context) error { return never })
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "out of luck") || !strings.Contains(err.Error(), log) {
		t.Errorf("a daemon that ends at once: %v", err)
	}
	// Somebody else's answers.
	if err := endpoint.Start(t.Context(), log, "/bin/true", nil, func(context.Context) error { return nil }); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := endpoint.Start(ctx, log, "/bin/sleep", []string{"1"}, func(context.Context) error { return never }); err == nil {
		t.Error("who gives up has a daemon that answers")
	}
	if err := endpoint.Start(t.Context(), log, filepath.Join(dir, "missing"), nil, func(context.Context) error { return nil }); err == nil {
		t.Error("a program that isn't there was started")
	}
}
