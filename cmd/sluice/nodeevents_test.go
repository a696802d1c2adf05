package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/node/endpoint"
	"sluice/internal/node/happening"
	"sluice/internal/node/hosts"
	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/serve"
	"sluice/oci"
)

func TestEventTable(t *testing.T) {
	at := time.Date(2026, 11, 29, 9, 14, 3, 0, time.Local)
	event := func(e happening.Event) control.Happening {
		e.Time, e.Image = at, "host/app:1"
		return control.Happening{Event: e}
	}
	all := []control.Happening{
		event(happening.Event{Kind: happening.Pulling, Pod: happening.Pod{Namespace: "shop", Name: "web-0"}, Streamed: true}),
		event(happening.Event{Kind: happening.Started, Pod: happening.Pod{Namespace: "shop", Name: "web-0"}, Container: "init", Attempt: 2, Streamed: true, Duration: 412345678, BytesHere: 31_200_000, BytesTotal: 595_000_000}),
		event(happening.Event{Kind: happening.Started, Streamed: true, Present: true, BytesHere: 1, BytesTotal: 2}),
		{Lost: 7},
		event(happening.Event{Kind: happening.Started, Container: "a-long-name-of-a-container", Reason: "Unauthorized", Message: "HTTP 401"}),
		event(happening.Event{Kind: "moved"}),
	}
	const want = `TIME      POD               CONTAINER                   IMAGE                     RESULT
09:14:03  shop/web-0        -                           host/app:1                is pulled, and streams
09:14:03  shop/web-0        init (2)                    host/app:1                streamed; pulled in 412ms; 31.2 MB of 595.0 MB here
09:14:03  -                 -                           host/app:1                streamed; it was here already; 1 B of 2 B here
7 events were lost: they were too many to keep
09:14:03  -                 a-long-name-of-a-container  host/app:1                not streamed: Unauthorized: HTTP 401
09:14:03  -                 -                           host/app:1                moved
`
	var out bytes.Buffer
	table := eventTable{out: &out}
	for _, h := range all {
		table.fit(h)
	}
	for _, h := range all {
		if err := table.print(h); err != nil {
			t.Fatal(err)
		}
	}
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", &out, want)
	}
}

func TestEventsVerb(t *testing.T) {
	dir := t.TempDir()
	if _, stderr, code := runProgram(t, "node", "events", "--run", dir, "--root", dir); code == 0 || !strings.Contains(stderr, "is sluice node running?") {
		t.Errorf("without a daemon: %d, %s", code, stderr)
	}
	if _, stderr, code := runProgram(t, "node", "events", "--output", "xml"); code == 0 || !strings.Contains(stderr, "table or json") {
		t.Errorf("as XML: %d, %s", code, stderr)
	}
	log := happening.NewLog(4)
	l, err := endpoint.Listen(serve.Control(dir))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: control.Handler(nil, nil, control.Info{Events: log}, nil)}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	verb := func(flags ...string) string {
		t.Helper()
		out, stderr, code := runProgram(t, append([]string{"node", "events", "--run", dir, "--root", dir}, flags...)...)
		if code != 0 {
			t.Errorf("%q: %d, %s", flags, code, stderr)
		}
		return out
	}
	if got := verb("-o", "json"); got != "[]\n" {
		t.Errorf("no events as JSON: %q", got)
	}
	log.Add(happening.Event{Kind: happening.Started, Image: "host/app:1", Streamed: true})
	if got := verb(); !strings.HasPrefix(got, "TIME ") || strings.Count(got, "\n") != 2 || !strings.Contains(got, "host/app:1") {
		t.Errorf("the table: %q", got)
	}
	if got := verb("--output", "json"); !strings.Contains(got, `"seq": 1`) || !strings.Contains(got, `"kind": "started"`) {
		t.Errorf("as JSON: %s", got)
	}
	log.Close() // the daemon ends
	out, stderr, code := runProgram(t, "node", "events", "--run", dir, "--root", dir, "--follow", "-o", "json")
	if code == 0 || !strings.Contains(stderr, "the node daemon has ended") || strings.Count(out, "\n") != 1 {
		t.Errorf("followed to the daemon's end: %d, %s, %s", code, out, stderr)
	}
}

// What registries answer that are asked about a conversion: ours, and others.
func TestAskConversion(t *testing.T) {
	const repo = "team/app"
	subject := oci.DigestOf([]byte("image"))
	answers := map[string]string{} // by path, or for all
	status := http.StatusOK
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status)
		if a, ok := answers[r.URL.Path]; ok {
			fmt.Fprint(w, a)
			return
		}
		fmt.Fprint(w, answers[""])
	}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	h := hosts.Open(hosts.Options{Dirs: []string{filepath.Join(t.TempDir(), "none")}})
	defer h.Close()
	of, operation := "/acr/v1/"+repo+"/_streaming/"+subject.String(), "/acr/v1/"+repo+"/_operations/op-1"
	for _, c := range []struct {
		name        string
		status      int
		answers     map[string]string
		want        mount.Conversion
		unsupported bool
	}{
		{"queued", 200, map[string]string{of: `{"id":"op-1","status":"NotStarted"}`}, mount.Conversion{Pending: true, State: "NotStarted"}, false},
		{"running", 200, map[string]string{of: `{"id":"op-1","status":"Running"}`}, mount.Conversion{Pending: true, State: "Running"}, false},
		{"done", 200, map[string]string{of: `{"id":"op-1","status":"Succeeded"}`}, mount.Conversion{State: "Succeeded"}, false},
		{"failed", 200, map[string]string{of: `{"id":"op-1","status":"Failed"}`, operation: `{"id":"op-1","status":"Failed","details":"a layer is bad"}`}, mount.Conversion{State: "Failed: a layer is bad"}, false},
		{"not asked for", 404, map[string]string{"": `{"errors":[{"code":"OPERATION_UNKNOWN","message":"no"}]}`}, mount.Conversion{}, false},
		{"it doesn't convert", 404, map[string]string{"": `{"errors":[{"code":"UNSUPPORTED","message":"no"}]}`}, mount.Conversion{}, true},
		{"another API", 404, map[string]string{"": "404 page not found"}, mount.Conversion{}, true},
		{"a page for people", 200, map[string]string{"": "<html>"}, mount.Conversion{}, true},
		{"it has no time", 429, map[string]string{"": "later"}, mount.Conversion{}, false},
	} {
		answers, status = c.answers, c.status
		got, err := askConversion(h)(t.Context(), host, repo, subject)
		if got != c.want || errors.Is(err, oci.ErrUnsupported) != c.unsupported || err == nil && c.status == 429 {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
	}
}
