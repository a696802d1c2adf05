package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/kube"
)

// What is missing or wrong is said, with what to do.
func TestFlags(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	for _, c := range []struct{ args, want string }{
		{"", "set NODE_NAME, in a DaemonSet by"},
		{"--node n", "this process isn't in a pod; name a file with --kubeconfig"},
		{"--node n --kubeconfig " + none, none + ": no such file"},
		{"--node n --api-rate 0", "--api-rate 0: at least"},
		{"--node n --api-rate NaN", "--api-rate NaN: at least"},
		{"--node n --api-burst 0", "--api-burst 0: at least 1"},
		{"--node n --label-grace -1s", "--label-grace -1s: 0 or more"},
		{"--node n --node-label a --opt-out-label a", "are both a"},
		{"--node n --for orca", "--for orca: it's streaming or teleport"},
		{"--node n --for teleport --opt-out-label a", "can't be switched off by a label"},
		{"--node n --for teleport", "this process isn't in a pod"},
		{"unlabel --node n --for=", "it's streaming or teleport"},
		{"--node n --log-format yaml", "it's text or json"},
		{"--node n extra", "unknown command"},
		{"unlabel", "set NODE_NAME"},
		{"unlabel --node n --node-label=", "which one is to be taken away"},
		{"unlabel --node n", "this process isn't in a pod"},
	} {
		t.Setenv("NODE_NAME", "")
		t.Setenv("KUBERNETES_SERVICE_HOST", "")
		cmd := newCommand()
		cmd.SetArgs(strings.Fields(c.args))
		cmd.SetOut(io.Discard)
		cmd.SetErr(io.Discard)
		err := cmd.ExecuteContext(t.Context())
		if err == nil || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(c.want)) {
			t.Errorf("sluice-reporter %s: %v, want %q", c.args, err, c.want)
		}
	}
}

// What isn't said follows from the daemon that is reported of.
func TestForWhichDaemon(t *testing.T) {
	for _, c := range []struct{ args, socket, label, optOut, component string }{
		{"", nodeSocket, "kubernetes.azure.com/artifactstreaming-enabled", kube.DefaultOptOutLabel, "sluice"},
		{"--for teleport", teleportSocket, "kubernetes.azure.com/enable-acr-teleport-plugin", "", "teleportd"},
		{"--for teleport --node-label= --control-socket s", "s", "", "", "teleportd"},
		{"--node-label l --opt-out-label=", nodeSocket, "l", "", "sluice"},
	} {
		var f flags
		cmd := newCommand()
		cmd.ResetFlags()
		f.register(cmd)
		if err := cmd.ParseFlags(strings.Fields(c.args)); err != nil {
			t.Fatal(err)
		}
		f.choose(cmd.Flags().Changed)
		if f.socket != c.socket || f.label != c.label || f.optOut != c.optOut || f.feature().Component != c.component {
			t.Errorf("%s: %+v", c.args, f)
		}
	}
}

func TestVersion(t *testing.T) {
	var out bytes.Buffer
	cmd := newCommand()
	cmd.SetArgs([]string{"--version"})
	cmd.SetOut(&out)
	if err := cmd.Execute(); err != nil || !strings.HasPrefix(out.String(), "sluice-reporter ") {
		t.Errorf("%q, %v", out.String(), err)
	}
}

func TestHealth(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	log := slog.New(slog.DiscardHandler)
	if _, err := serveHealth(l.Addr().String(), nil, log); err == nil {
		t.Error("an address that is taken isn't an error")
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	address := net.JoinHostPort("127.0.0.2", port) // nobody else gets this port meanwhile
	ready := errors.New("the API server doesn't answer")
	stop, err := serveHealth(address, func() error { return ready }, log)
	if err != nil {
		t.Fatal(err)
	}
	get := func(path string) (int, string) {
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://"+address+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	if code, _ := get("/healthz"); code != 200 {
		t.Errorf("/healthz answers %d", code)
	}
	if code, text := get("/readyz"); code != 503 || !strings.Contains(text, ready.Error()) {
		t.Errorf("/readyz answers %d %s", code, text)
	}
	ready = nil
	if code, _ := get("/readyz"); code != 200 {
		t.Errorf("/readyz answers %d when all is well", code)
	}
	stop()
	if conn, err := net.Dial("tcp", address); err == nil {
		conn.Close()
		t.Error("somebody listens afterwards")
	}
}
