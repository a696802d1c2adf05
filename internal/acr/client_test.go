package acr_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"sluice/internal/acr"
	"sluice/internal/remote"
	"sluice/oci"
)

// A client survives whatever a server answers.
func TestClientOfHostileServer(t *testing.T) {
	var answer func(w http.ResponseWriter, r *http.Request)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { answer(w, r) }))
	defer server.Close()
	client, err := acr.NewClient(strings.TrimPrefix(server.URL, "http://"), remote.Options{Retries: -1, Credentials: remote.Anonymous})
	if err != nil {
		t.Fatal(err)
	}
	send := func(status int, body string, header ...string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(status)
			fmt.Fprint(w, body)
		}
	}
	for want, f := range map[string]func(http.ResponseWriter, *http.Request){
		"isn't what the management API sends":    send(http.StatusOK, "<html>"),
		"circle":                                 send(http.StatusOK, `{"tags":[]}`, "Link", `</acr/v1/app/_tags?last=x>; rel="next"`),
		"HTTP 502 a proxy's words":               send(http.StatusBadGateway, "a proxy's\n words"),
		"does the registry have":                 send(http.StatusNotFound, `{"errors":[{"code":"NOT_FOUND","message":"no such endpoint"}]}`),
		"HTTP 418":                               send(http.StatusTeapot, `{"errors":[{"code":"TEAPOT"}]}`),
		"more than":                              send(http.StatusOK, strings.Repeat(" ", 17<<20)),
		"unexpected answer: HTTP 400":            send(http.StatusBadRequest, `{"errors":[null]}`),
		"what is wrong, in words of control [2J": send(http.StatusConflict, "{\"errors\":[{\"code\":\"CONFLICT\",\"message\":\"what is wrong, in words\\u0000of control\\u001b[2J\"}]}"),
	} {
		answer = f
		_, err := client.Tags(t.Context(), "app", acr.ListOptions{})
		if err == nil || !strings.Contains(strings.NewReplacer(".of control.", " of control ").Replace(err.Error()), want) || len(err.Error()) > 1000 {
			t.Errorf("got %q, want %q", err, want)
		}
	}
	// A list that goes on and on is cut where the caller has enough.
	page := 0
	answer = func(w http.ResponseWriter, _ *http.Request) {
		page++
		w.Header().Set("Link", fmt.Sprintf(`</acr/v1/app/_tags?last=%d>; rel="next"`, page))
		fmt.Fprintf(w, `{"tags":[{"name":"%d","digest":%q}]}`, page, oci.DigestOf(nil))
	}
	if list, err := client.Tags(t.Context(), "app", acr.ListOptions{Top: 7}); err != nil || len(list) != 7 {
		t.Errorf("%d, %v", len(list), err)
	}
}
