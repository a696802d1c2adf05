package remote

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"sluice/oci"
)

func TestCall(t *testing.T) {
	var asked atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "u" || password != "p" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		body, _ := io.ReadAll(r.Body)
		switch asked.Add(1); r.URL.Path {
		case "/api/a b":
			w.Header().Set("X-Saw", r.Method+" "+r.URL.RawQuery+" "+r.Header.Get("Content-Type")+" "+string(body))
			w.WriteHeader(http.StatusCreated)
			io.WriteString(w, "done")
		case "/api/code":
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, `{"errors":[{"code":"TAG_UNKNOWN","message":"no such tag"}]}`)
		default:
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer server.Close()
	reg, err := New(strings.TrimPrefix(server.URL, "http://"), Options{
		Credentials: func(context.Context, string) (Credential, error) {
			return Credential{Username: "u", Password: "p"}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	a, err := reg.Call(t.Context(), APIRequest{What: "trying", Method: http.MethodPost, Path: "/api/a b", Query: map[string][]string{"n": {"1"}}, Body: []byte(`{}`)})
	if want := "POST n=1 application/json {}"; err != nil || a.Status != http.StatusCreated || string(a.Body) != "done" || a.Header.Get("X-Saw") != want {
		t.Errorf("got %+v, %v", a, err)
	}
	_, err = reg.Call(t.Context(), APIRequest{What: "looking for it", Path: "/api/code"})
	if !errors.Is(err, &oci.Error{Code: "TAG_UNKNOWN"}) || err.Error() != "looking for it at "+reg.Host()+": no such tag" {
		t.Errorf("a code of its own: %v", err)
	}
	// What changes something is not sent again by itself, what reads is.
	for method, want := range map[string]int64{http.MethodGet: 4, http.MethodDelete: 1} {
		asked.Store(0)
		if _, err := reg.Call(t.Context(), APIRequest{What: "asking", Method: method, Path: "/api/busy"}); err == nil || asked.Load() != want {
			t.Errorf("%s was sent %d times, %v", method, asked.Load(), err)
		}
	}
}
