package apiserver_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/kube"
	"sluice/internal/kube/apiserver"
)

// open returns the cluster behind a server that answers as handler does.
func open(t *testing.T, handler http.HandlerFunc) *apiserver.Cluster {
	t.Helper()
	server := httptest.NewTLSServer(handler) // tokens aren't sent without TLS
	t.Cleanup(server.Close)
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: x,
contexts: [{name: x, context: {cluster: c, user: u}}], users: [{name: u, user: {token: secret}}],
clusters: [{name: c, cluster: {server: %q, insecure-skip-tls-verify: true}}]}`, server.URL+"/proxy")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := apiserver.Open(file, "a-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// What an API server, or a proxy before it, answers means one of few things.
// (What a real one answers when is kubetest's affair.)
func TestAnswers(t *testing.T) {
	const status = `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"so it is","reason":%q,"code":%d}`
	for _, c := range []struct {
		code    int
		after   string
		body    string
		want    error // nil: Unavailable
		waits   time.Duration
		message string
	}{
		{404, "", fmt.Sprintf(status, "NotFound", 404), kube.ErrNotFound, 0, "so it is"},
		{409, "", fmt.Sprintf(status, "AlreadyExists", 409), kube.ErrExists, 0, "so it is"},
		{422, "", `{"message":"so it is","reason":"Invalid","details":{"causes":[{"message":"field is immutable","field":"metadata.uid"}]}}`, kube.ErrConflict, 0, "so it is"},
		{409, "", fmt.Sprintf(status, "Conflict", 409), nil, 0, "so it is"}, // somebody else wrote at the same time
		{403, "", fmt.Sprintf(status, "Forbidden", 403), kube.ErrForbidden, 0, "so it is"},
		{403, "", `{"message":"pods \"p\" is forbidden: not yet ready to handle request","reason":"Forbidden"}`, nil, 0, "not yet ready"},
		{422, "", fmt.Sprintf(status, "Invalid", 422), kube.ErrRefused, 0, "so it is"},
		{400, "", "<html>no</html>", kube.ErrRefused, 0, "400 Bad Request: <html>no"},
		{401, "", fmt.Sprintf(status, "Unauthorized", 401), nil, 0, "so it is"},
		{429, "7", fmt.Sprintf(status, "TooManyRequests", 429), nil, 7 * time.Second, "so it is"},
		{429, "-7", "", nil, 0, "429"},
		{500, "", fmt.Sprintf(status, "InternalError", 500), nil, 0, "so it is"},
		{502, "", "<html>", nil, 0, "502 Bad Gateway: <html>"},
		{503, "soon", strings.Repeat("x", 1<<20), nil, 0, "503"},
		{504, "", `{"message":`, nil, 0, "504"},
		{200, "", "no JSON", nil, 0, "answer to"},
		{200, "", "", nil, 0, "answer to"},
	} {
		cluster := open(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "Bearer secret" || r.URL.EscapedPath() != "/proxy/api/v1/namespaces/n%2F../pods/p/status" {
				t.Errorf("asked %s of %q", r.URL.EscapedPath(), r.Header)
			}
			if c.after != "" {
				w.Header().Set("Retry-After", c.after)
			}
			w.WriteHeader(c.code)
			fmt.Fprint(w, c.body)
		})
		_, err := cluster.Pod(t.Context(), kube.PodRef{Namespace: "n/..", Name: "p", UID: "u"})
		if err == nil || !strings.Contains(err.Error(), c.message) || len(err.Error()) > 1000 {
			t.Errorf("%d %.80s: %.300v", c.code, c.body, err)
		}
		var u *kube.Unavailable
		switch {
		case c.want != nil:
			if !errors.Is(err, c.want) {
				t.Errorf("%d %.80s: %v, want %v", c.code, c.body, err, c.want)
			}
		case !errors.As(err, &u) || !u.Answered || u.After != c.waits:
			t.Errorf("%d %.80s: %+v, want that it's unavailable for %v", c.code, c.body, u, c.waits)
		}
	}
}

func TestNobodyAnswers(t *testing.T) {
	hang := make(chan struct{})
	cluster := open(t, func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-hang:
		case <-r.Context().Done():
		}
		panic(http.ErrAbortHandler)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	var u *kube.Unavailable
	if err := cluster.Works(ctx, "n"); !errors.As(err, &u) || u.Answered {
		t.Errorf("a server that hangs: %v", err)
	}
	close(hang)
	if err := cluster.Works(t.Context(), "n"); !errors.As(err, &u) || u.Answered {
		t.Errorf("a server that breaks off: %v", err)
	}
	if err := cluster.WatchNode(t.Context(), "n", func(map[string]string) {}); !errors.As(err, &u) {
		t.Errorf("a watch of a server that breaks off: %v", err)
	}
}

// What comes on a watch besides the node.
func TestWatch(t *testing.T) {
	const node = `{"type":"ADDED","object":{"kind":"PartialObjectMetadata","metadata":{"name":"n","labels":{"a":"b"}}}}` + "\n"
	for body, want := range map[string]string{
		node + `{"type":"BOOKMARK","object":{"metadata":{}}}` + node:                                         "<nil>",
		node + `{"type":"ERROR","object":{"kind":"Status","message":"too old resource version","code":410}}`: "too old",
		node + `{"type":`:     "unexpected EOF",
		node + `{"type":7}`:   "cannot unmarshal",
		node + "garbage":      "invalid character",
		node + node[:20]:      "unexpected EOF",
		node + `{"type":"X"}`: "<nil>",
	} {
		cluster := open(t, func(w http.ResponseWriter, r *http.Request) {
			if q := r.URL.Query(); q.Get("watch") != "true" || q.Get("fieldSelector") != "metadata.name=n" || !strings.Contains(r.Header.Get("Accept"), "PartialObjectMetadata") {
				t.Errorf("asked %s of %q", r.URL, r.Header)
			}
			fmt.Fprint(w, body)
		})
		seen := 0
		err := cluster.WatchNode(t.Context(), "n", func(l map[string]string) {
			seen++
			if l["a"] != "b" {
				t.Errorf("labels are %v", l)
			}
		})
		if seen != strings.Count(body, node) || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%q: seen %d times, %v; want %s", body, seen, err, want)
		}
	}
}

func TestOpen(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad, []byte("no: [YAML"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := apiserver.Open(bad, "a-test"); err == nil || !strings.Contains(err.Error(), bad) {
		t.Errorf("a damaged kubeconfig: %v, %v", c, err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	if c, err := apiserver.Open("", "a-test"); err == nil || !strings.Contains(err.Error(), "automountServiceAccountToken") {
		t.Errorf("in a pod without a token: %v, %v", c, err)
	}
}
