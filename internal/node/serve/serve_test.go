package serve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"sluice/internal/node/cache"
	"sluice/internal/node/credentials"
	"sluice/internal/node/cri"
	"sluice/internal/node/endpoint"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/remote"
)

// options are those of a daemon whose machine can't mount anything, with a
// containerd that isn't there.
func options(t *testing.T) Options {
	t.Helper()
	dir := t.TempDir()
	c, err := cache.Open(t.Context(), cache.Options{Dir: filepath.Join(dir, "cache")})
	if err != nil {
		t.Fatal(err)
	}
	m, err := mount.Open(t.Context(), mount.Options{
		Root: filepath.Join(dir, "root"), Cache: c,
		Plane:    mount.NoPlane(&plane.UnsupportedError{Reasons: []string{"a test has no kernel"}}),
		Registry: func(_, _ string) (mount.Registry, error) { return nil, os.ErrNotExist },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(m.Close(), c.Close()); err != nil {
			t.Error(err)
		}
	})
	run := filepath.Join(dir, "run")
	if err := os.Mkdir(run, 0o700); err != nil {
		t.Fatal(err)
	}
	return Options{
		Root: filepath.Join(dir, "root"), Run: run, Images: m, Events: happening.NewLog(8),
		Containerd: filepath.Join(dir, "containerd.sock"), Passed: credentials.NewPassed(filepath.Join(run, "credentials.json"), slog.New(slog.DiscardHandler)),
		References: func(context.Context) []string { return nil }, Metrics: "127.0.0.1:0",
	}
}

// says answers every request with a text.
func says(text string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) })
}

func body(t *testing.T, resp *http.Response, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// sockets are all that there are.
func sockets(o Options) []string {
	return []string{Snapshotter(o.Run), Control(o.Run), Kubelet(o.Run)}
}

// Everybody is answered, by who should answer, until the daemon is told to end or
// is lost; then nobody is, and the next one listens in the same places.
func TestServe(t *testing.T) {
	o := options(t)
	for _, want := range []error{nil, ErrLost, nil} {
		o.Events = happening.NewLog(8)
		f, err := Listen(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		lost := make(chan struct{})
		served := make(chan error, 1)
		go func() { served <- f.Serve(ctx, says("control"), says("metrics"), lost) }()

		req, err := endpoint.NewRequest(ctx, http.MethodGet, "/", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := endpoint.NewClient(Control(o.Run)).Do(req)
		if got := body(t, resp, err); got != "control" {
			t.Errorf("at the control socket: %q", got)
		}
		req, err = http.NewRequestWithContext(ctx, http.MethodGet, "http://"+f.Metrics()+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err = http.DefaultClient.Do(req)
		if got := body(t, resp, err); got != "metrics" {
			t.Errorf("of metrics: %q", got)
		}
		for _, socket := range sockets(o) {
			if err := dial(socket); err != nil {
				t.Error(err)
			}
		}

		if want != nil {
			close(lost)
		} else {
			cancel()
		}
		if err := <-served; !errors.Is(err, want) {
			t.Errorf("it ended with %v, want %v", err, want)
		}
		cancel()
		for _, socket := range sockets(o) {
			if err := dial(socket); err == nil {
				t.Errorf("%s still answers", socket)
			}
		}
		if _, _, err := o.Events.Follow(t.Context(), happening.Cursor{}); err == nil {
			t.Error("who follows events isn't told that the daemon has ended")
		}
	}
}

func dial(socket string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	return conn.Close()
}

// Without a containerd nobody waits for kubelet, and without an address nobody
// asks for metrics.
func TestServeLess(t *testing.T) {
	o := options(t)
	o.Containerd, o.Passed, o.Metrics = "", nil, ""
	f, err := Listen(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if err := dial(Kubelet(o.Run)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("at kubelet's socket: %v", err)
	}
	if f.Metrics() != "" {
		t.Errorf("metrics at %s", f.Metrics())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Serve(ctx, says(""), says(""), nil); err != nil {
		t.Error(err)
	}
}

// Where one thing can't be listened to, nothing is.
func TestListenNowhere(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for name, spoil := range map[string]func(*Options){
		"metrics":         func(o *Options) { o.Metrics = taken.Addr().String() },
		"its own kubelet": func(o *Options) { o.Containerd = Kubelet(o.Run) },
		"snapshotter": func(o *Options) {
			if err := os.WriteFile(Snapshotter(o.Run), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := options(t)
			good := o
			spoil(&o)
			if _, err := Listen(t.Context(), o); err == nil {
				t.Fatal("no error")
			}
			for _, socket := range sockets(o) {
				if err := dial(socket); err == nil {
					t.Errorf("%s is listened at", socket)
				}
			}
			if name == "snapshotter" {
				return
			}
			f, err := Listen(t.Context(), good) // the state is as it was
			if err != nil {
				t.Fatal(err)
			}
			if err := f.close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// What kubelet passes with a pull is there for the image's reads, unless the
// registry refuses it.
func TestBeginPull(t *testing.T) {
	o := options(t)
	f, err := Listen(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer f.close()
	want := remote.Credential{Username: "team", Password: "secret"}
	end := f.beginPull(cri.Pull{Image: "r.test/app:1", Credential: want})
	got, _, err := o.Passed.Credential(t.Context(), credentials.Request{Host: "r.test", Repository: "app"})
	if err != nil || got != want {
		t.Errorf("while it's pulled: %+v, %v", got, err)
	}
	end(nil)
	f.beginPull(cri.Pull{Image: "r.test/open:1"})(nil)
	if got, _, err := o.Passed.Credential(t.Context(), credentials.Request{Host: "r.test", Repository: "open"}); got != (remote.Credential{}) {
		t.Errorf("nothing was passed: %+v, %v", got, err)
	}
}

func TestUntil(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	other := errors.New("other")
	left := []error{fmt.Errorf("%w: it says so", ErrLost), ErrLost, other}
	runs := 0
	err := Until(t.Context(), log, func(context.Context) error { runs++; return left[runs-1] })
	if !errors.Is(err, other) || runs != 3 {
		t.Errorf("%v after %d runs", err, runs)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = Until(ctx, log, func(context.Context) error { cancel(); return ErrLost })
	if !errors.Is(err, ErrLost) {
		t.Errorf("told to end: %v", err)
	}
}

func TestLost(t *testing.T) {
	lost := make(chan struct{})
	if err := errors.Join(Lost(nil), Lost(lost)); err != nil {
		t.Error(err)
	}
	close(lost)
	if err := Lost(lost); !errors.Is(err, ErrLost) {
		t.Error(err)
	}
}
