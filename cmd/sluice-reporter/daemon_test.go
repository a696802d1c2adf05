package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/node/cache"
	teleport "sluice/internal/node/disks/control"
	"sluice/internal/node/endpoint"
	"sluice/internal/node/happening"
	"sluice/internal/node/happening/feed"
	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/plane"
	"sluice/internal/node/timeline"
)

// serve serves the control API of a node daemon on which this plane works, if
// it has a name, and returns a client.
func serve(t *testing.T, usable control.Plane, events *happening.Log) daemon {
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
	info := control.Info{Root: dir, Events: events, Plane: usable}
	server := &http.Server{Handler: control.Handler(m, &timeline.Recorder{}, info, slog.New(slog.DiscardHandler))}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(server.Close(), m.Close(), c.Close()); err != nil {
			t.Error(err)
		}
		<-done
	})
	return daemon{control.NewClient(socket)}
}

func TestStreams(t *testing.T) {
	d := serve(t, control.Plane{Name: "fuse"}, nil)
	want := func(text string) {
		t.Helper()
		why, err := d.Streams(t.Context())
		if err != nil || text == "" && why != "" || !strings.Contains(why, text) {
			t.Errorf("it doesn't stream because of %q, %v; want %q", why, err, text)
		}
	}
	want("")
	if err := d.SetStreaming(t.Context(), false, "the label says so"); err != nil {
		t.Fatal(err)
	}
	want("the label says so")
	if err := d.SetStreaming(t.Context(), true, ""); err != nil {
		t.Fatal(err)
	}
	want("")
	d = serve(t, control.Plane{Reasons: []string{"an old kernel"}}, nil)
	want("an old kernel")
	if why, err := (daemon{control.NewClient("/none")}).Streams(t.Context()); !errors.Is(err, control.ErrNoDaemon) {
		t.Errorf("without a daemon: %q, %v", why, err)
	}
}

func TestFollow(t *testing.T) {
	events := happening.NewLog(2)
	for i := range 5 {
		events.Add(happening.Event{Kind: happening.Started, Container: fmt.Sprint(i + 1)})
	}
	first, _ := events.After(happening.Cursor{})
	d := serve(t, control.Plane{Name: "fuse"}, events)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []string
	err := d.Follow(ctx, happening.Cursor{Epoch: first[0].Epoch, Seq: 1}, func(e happening.Event, lost uint64) error {
		got = append(got, fmt.Sprintf("%s after %d lost", e.Container, lost))
		switch len(got) {
		case 2:
			events.Add(happening.Event{Kind: happening.Started, Container: "6"})
		case 3:
			cancel()
		}
		return nil
	})
	if s := strings.Join(got, ", "); s != "4 after 2 lost, 5 after 0 lost, 6 after 0 lost" || !errors.Is(err, context.Canceled) {
		t.Errorf("followed %s, %v", s, err)
	}
	if err := serve(t, control.Plane{}, nil).Follow(t.Context(), happening.Cursor{}, nil); err == nil || !strings.Contains(err.Error(), "tells of no events") {
		t.Errorf("a daemon that has no events: %v", err)
	}
}

// teleportd is asked the same.
func TestTeleportd(t *testing.T) {
	events := happening.NewLog(2)
	var status teleport.Status
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		if err := json.NewEncoder(w).Encode(status); err != nil {
			t.Error(err)
		}
	})
	mux.Handle("GET /v1/events", feed.Handler(events, slog.New(slog.DiscardHandler)))
	socket := filepath.Join(t.TempDir(), "control.sock")
	l, err := endpoint.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- endpoint.Serve(ctx, l, mux) }()
	d := (&flags{daemon: forTeleport, socket: socket}).client()
	if why, err := d.Streams(t.Context()); why != "" || err != nil {
		t.Errorf("it doesn't work because of %q, %v", why, err)
	}
	if err := d.SetStreaming(t.Context(), true, ""); err != nil {
		t.Error(err)
	}
	if err := d.SetStreaming(t.Context(), false, "a label says so"); err == nil {
		t.Error("teleportd was switched off")
	}
	for i := range 3 {
		events.Add(happening.Event{Kind: happening.Started, Container: fmt.Sprint(i + 1)})
	}
	last, _ := events.After(happening.Cursor{})
	enough := errors.New("enough")
	err = d.Follow(t.Context(), happening.Cursor{Epoch: last[0].Epoch, Seq: 0}, func(e happening.Event, lost uint64) error {
		if e.Container != "2" || lost != 1 {
			t.Errorf("followed %s after %d lost", e.Container, lost)
		}
		return enough
	})
	if err != enough {
		t.Errorf("following ended with %v", err)
	}
	status.Daemon.Unusable = []string{"an old kernel"}
	if why, err := d.Streams(t.Context()); err != nil || !strings.Contains(why, "an old kernel") {
		t.Errorf("on an old kernel: %q, %v", why, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := d.Streams(t.Context()); !errors.Is(err, teleport.ErrNoDaemon) {
		t.Errorf("without teleportd: %v", err)
	}
}
