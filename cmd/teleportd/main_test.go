package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/node/disks/control"
	"sluice/internal/node/serve"
)

// TestMain is the holder, too, when a daemon of the tests starts one.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "holder" {
		main()
		return
	}
	os.Exit(m.Run())
}

// execute runs the command line.
func execute(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	cmd := newCommand()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(io.Discard)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

// What is wrong is said, with what to do.
func TestBadFlags(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	for _, c := range []struct{ args, want string }{
		{"--source nfs", `--source "nfs": use one of auto, kernel, userspace`},
		{"--log file", `--log "file": use one of auto, journal, stderr`},
		{"--read-timeout 0s", "are more than 0"},
		{"--decide-timeout -1s", "are more than 0"},
		{"--cache-quota much", "much"},
		{"extra", "too many arguments: extra\nusage: teleportd [flags]"},
		{"status extra", "too many arguments: extra"},
		{"status --output yaml", `--output "yaml": use table or json`},
		{"status --run " + none, "teleportd doesn't answer on " + none + "/control.sock: is it running?"},
		{"holder", "arguments are missing"},
	} {
		if _, err := execute(t, strings.Fields(c.args)...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("teleportd %s: %v, want %q", c.args, err, c.want)
		}
	}
}

// The original's command lines are understood, and what isn't for people isn't shown.
func TestFlagsOfTheOriginal(t *testing.T) {
	for _, c := range []struct {
		args                    string
		metrics, azure, grouped string
		debug                   bool
	}{
		{"--metrics --aksConfig /etc/kubernetes/azure.json", defaultMetrics, "/etc/kubernetes/azure.json", "k8s.io", false},
		{"--debug --aksconfig /etc/kubernetes/azure.json --namespace moby", "", "/etc/kubernetes/azure.json", "moby", true},
		{"--metrics=true", defaultMetrics, "", "k8s.io", false},
		{"--metrics=false", "", "", "k8s.io", false},
		{"--metrics=:9800", ":9800", "", "k8s.io", false},
	} {
		var got config
		cmd := newCommand()
		cmd.ResetFlags()
		got.register(cmd)
		if err := cmd.ParseFlags(strings.Fields(c.args)); err != nil {
			t.Errorf("%s: %v", c.args, err)
			continue
		}
		if err := got.check(); err != nil || got.metrics != c.metrics || got.credentials.azure != c.azure || got.namespace != c.grouped || got.debug != c.debug {
			t.Errorf("%s: %+v, %v", c.args, got, err)
		}
	}
	help, err := execute(t, "--help")
	if err != nil || strings.Contains(help, "standalone") || strings.Contains(help, "holder") || !strings.Contains(help, defaultRun+"/snapshotter.sock") {
		t.Errorf("%v, help:\n%s", err, help)
	}
	if out, err := execute(t, "--version"); err != nil || !strings.HasPrefix(out, "teleportd ") {
		t.Errorf("version %q, %v", out, err)
	}
	for shell, want := range map[string]string{"bash": "__start_teleportd", "zsh": "#compdef teleportd", "fish": "complete -c teleportd"} {
		if out, err := execute(t, "completion", shell); err != nil || !strings.Contains(out, want) {
			t.Errorf("completion for %s: %v, %.80q", shell, err, out)
		}
	}
	if out, err := execute(t, "__complete", "--source", ""); err != nil || !strings.HasPrefix(out, "auto\nkernel\nuserspace\n") {
		t.Errorf("sources: %q, %v", out, err)
	}
}

func TestLog(t *testing.T) {
	var out bytes.Buffer
	c := config{log: logStderr}
	log, err := c.newLog(&out)
	if err != nil {
		t.Fatal(err)
	}
	log.Debug("too much")
	log.Info("enough")
	c.debug = true
	if log, err = c.newLog(&out); err != nil {
		t.Fatal(err)
	}
	log.Debug("more")
	if s := out.String(); strings.Contains(s, "too much") || !strings.Contains(s, "msg=enough") || !strings.Contains(s, "msg=more") {
		t.Errorf("the log is\n%s", s)
	}
}

// ended waits until what runs a daemon returns.
func ended(t *testing.T, done <-chan error) {
	t.Helper()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the daemon doesn't end")
	}
}

// A daemon answers, ends when it's told to, and the next one goes on.
func TestDaemon(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: a running daemon: it mounts, which needs root")
	}
	dir := t.TempDir()
	var c config
	cmd := newCommand()
	cmd.ResetFlags()
	c.register(cmd)
	run := filepath.Join(dir, "run")
	args := []string{"--root", filepath.Join(dir, "root"), "--run", run, "--cache-free", "0", "--metrics=127.0.0.1:0", "--log", "stderr", "--docker-config", dir}
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	for round := range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- runDaemon(ctx, c) }()
		client := control.NewClient(serve.Control(run))
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			conn, err := net.Dial("unix", filepath.Join(run, "snapshotter.sock"))
			if err == nil {
				conn.Close()
				break
			}
			if len(done) > 0 {
				t.Fatalf("round %d: %v", round, <-done)
			}
			if time.Now().After(deadline) {
				t.Fatalf("round %d: it doesn't answer: %v", round, err)
			}
		}
		s, err := client.Status(t.Context())
		if err != nil || s.Daemon.PID != os.Getpid() || len(s.Daemon.Unusable) > 0 {
			t.Errorf("round %d: status %+v, %v", round, s, err)
		}
		text, err := execute(t, "status", "--run", run)
		if err != nil || !strings.Contains(text, "state in "+filepath.Join(dir, "root")) || !strings.Contains(text, "Linux ") {
			t.Errorf("round %d: %v\n%s", round, err, text)
		}
		web := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", serve.Control(run))
		}}}
		resp, err := web.Get("http://teleportd/metrics")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !strings.Contains(string(body), "\nteleportd_images 0\n") {
			t.Errorf("round %d: %v, metrics:\n%s", round, err, body)
		}
		if err := client.Events(t.Context(), "", false, nil); err != nil {
			t.Errorf("round %d: events: %v", round, err)
		}
		cancel()
		ended(t, done)
	}
	// One that ends by itself takes everything with it.
	c.standalone = true
	done := make(chan error, 1)
	go func() { done <- runDaemon(t.Context(), c) }()
	ended(t, done)
	if mounted, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounted), dir) {
		t.Errorf("something is still mounted: %v\n%s", err, mounted)
	}
}
