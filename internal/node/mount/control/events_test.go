package control_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
)

func TestEvents(t *testing.T) {
	log := happening.NewLog(4)
	client := control.NewClient(serve(t, log))
	read := func(after string) (all []string) {
		t.Helper()
		if err := client.Events(t.Context(), after, false, func(h control.Happening) error {
			all = append(all, fmt.Sprintf("%d-%d %s", h.Lost, h.Seq, h.Image))
			return nil
		}); err != nil {
			t.Errorf("events after %q: %v", after, err)
		}
		return all
	}
	if got := read(""); got != nil {
		t.Errorf("events of nothing: %q", got)
	}
	for i := range 7 {
		log.Add(happening.Event{Kind: happening.Started, Image: fmt.Sprint("image ", i)})
	}
	events, _ := log.After(happening.Cursor{})
	if got := fmt.Sprint(read("")); got != "[0-4 image 3 0-5 image 4 0-6 image 5 0-7 image 6]" {
		t.Errorf("all events: %s", got)
	}
	if got := fmt.Sprint(read(happening.Cursor{Epoch: events[0].Epoch, Seq: 1}.String())); !strings.HasPrefix(got, "[2-0  0-4 image 3 ") {
		t.Errorf("a reader that was away: %s", got)
	}
	if got := fmt.Sprint(read(events[2].Cursor().String())); got != "[0-7 image 6]" {
		t.Errorf("a reader that goes on: %s", got)
	}
	for _, bad := range []string{"nonsense", "a:b", strings.Repeat("x", 10_000) + ":1"} {
		if err := client.Events(t.Context(), bad, false, func(control.Happening) error { return nil }); err == nil || !strings.Contains(err.Error(), "isn't EPOCH:NUMBER") {
			t.Errorf("events after %.20q: %v", bad, err)
		}
	}
}

func TestFollowEvents(t *testing.T) {
	log := happening.NewLog(16)
	socket := serve(t, log)
	client := control.NewClient(socket)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	seen, ended := make(chan control.Happening), make(chan error, 1)
	go func() {
		ended <- client.Events(ctx, "", true, func(h control.Happening) error { seen <- h; return nil })
	}()
	for i := range 100 {
		log.Add(happening.Event{Kind: happening.Pulling, Image: fmt.Sprint(i)})
		if h := <-seen; h.Image != fmt.Sprint(i) || h.Seq != uint64(i+1) {
			t.Fatalf("event %d comes as %+v", i, h)
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("a follower that was ended: %v", err)
	}
	stop := errors.New("enough")
	if err := client.Events(t.Context(), "", true, func(control.Happening) error { return stop }); err != stop {
		t.Errorf("a follower that has enough: %v", err)
	}
	go func() {
		ended <- client.Events(t.Context(), "", true, func(h control.Happening) error { return nil })
	}()
	log.Close()
	if err := <-ended; !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a daemon that ends: %v", err)
	}
}

func TestNoEvents(t *testing.T) {
	err := control.NewClient(serve(t, nil)).Events(t.Context(), "", true, func(control.Happening) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "tells of no events") {
		t.Errorf("a daemon without events: %v", err)
	}
	err = control.NewClient(filepath.Join(t.TempDir(), "none")).Events(t.Context(), "", true, func(control.Happening) error { return nil })
	if !errors.Is(err, control.ErrNoDaemon) {
		t.Errorf("no daemon: %v", err)
	}
}

// What a strange daemon sends is refused, and takes no memory.
func TestStrangeEvents(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var answer io.Reader
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, answer) })}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	event := `{"epoch":"e","seq":1,"kind":"started","image":"a"}`
	for _, c := range []struct {
		name, error string
		answer      io.Reader
		events      int
	}{
		{"what we'd send", "", strings.NewReader("\n" + event + "\n\n" + event + "\n"), 2},
		{"a kind that we don't know", "", strings.NewReader(`{"epoch":"e","seq":1,"kind":"moved","more":[1]}` + "\n"), 1},
		{"HTML", "invalid character", strings.NewReader("<html>\n"), 0},
		{"no events", "what isn't one", strings.NewReader(event + "\n{}\n"), 1},
		{"another type", "cannot unmarshal", strings.NewReader(`{"seq":"one"}` + "\n"), 0},
		{"a negative loss", "cannot unmarshal", strings.NewReader(`{"lost":-1}` + "\n"), 0},
		{"no epoch", "isn't EPOCH:NUMBER", strings.NewReader(`{"seq":1,"kind":"started"}` + "\n"), 0},
		{"a long epoch", "isn't EPOCH:NUMBER", strings.NewReader(`{"epoch":"` + strings.Repeat("e", 999) + `","seq":1,"kind":"started"}` + "\n"), 0},
		{"an epoch that moves the number", "isn't EPOCH:NUMBER", strings.NewReader(`{"epoch":"e:1","seq":1,"kind":"started"}` + "\n"), 0},
		{"half a line", "unexpected EOF", strings.NewReader(event[:20]), 0},
		{"a line without end", "more than 65536 bytes", endless{}, 0},
	} {
		answer = c.answer
		events := 0
		err := control.NewClient(socket).Events(t.Context(), "", false, func(control.Happening) error { events++; return nil })
		if (err == nil) != (c.error == "") || err != nil && !strings.Contains(err.Error(), c.error) || events != c.events {
			t.Errorf("%s: %d events, %v; want %d, %q", c.name, events, err, c.events, c.error)
		}
	}
}

// endless is one line without end.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

func TestStreamingIsSwitched(t *testing.T) {
	socket := serve(t, nil)
	client := control.NewClient(socket)
	is := func(want mount.Switch) {
		t.Helper()
		s, err := client.Status(t.Context())
		if err != nil || s.Switch != want {
			t.Errorf("streaming is %+v, %v; want %+v", s.Switch, err, want)
		}
	}
	is(mount.Switch{})
	if err := client.SetStreaming(t.Context(), false, "the node's label says so"); err != nil {
		t.Error(err)
	}
	is(mount.Switch{Off: true, Why: "the node's label says so"})
	raw := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	defer raw.CloseIdleConnections()
	for _, body := range []string{"", "{", "{}", `{"why":"x"}`, `{"enabled":null}`, `{"enabled":"yes"}`, `{"enabled":true,"force":1}`, `{"enabled":true,"why":"` + strings.Repeat("x", 100_000) + `"}`} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://node/v1/streaming", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := raw.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%.30q is answered %d, want 400", body, resp.StatusCode)
		}
	}
	is(mount.Switch{Off: true, Why: "the node's label says so"})
	if err := client.SetStreaming(t.Context(), false, strings.Repeat("ü", 10_000)); err != nil {
		t.Error(err)
	}
	if s, err := client.Status(t.Context()); err != nil || len(s.Switch.Why) > 1100 {
		t.Errorf("%d bytes of why, %v", len(s.Switch.Why), err)
	}
	if err := client.SetStreaming(t.Context(), true, "all is well"); err != nil {
		t.Error(err)
	}
	is(mount.Switch{})
}
