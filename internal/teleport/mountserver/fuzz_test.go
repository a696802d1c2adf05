package mountserver_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"sluice/internal/teleport/mountapi"
)

// Whatever somebody who may pull asks for, the answer is one of those that are
// documented, and says something.
func FuzzRequests(f *testing.F) {
	b := newBench(f)
	digest := b.push("team/app", "v1", 1000)
	b.enable("team/app")
	b.work()
	b.ended("/mount/v1/team/app/_manifests/v1")
	f.Add("team/app/_manifests/v1", "", "", "")
	f.Add("team/app/_manifests/"+digest.String(), "platform=linux/arm64/v8", "true", "westeurope")
	f.Add("team/app/_manifests/sha256:00", "platform=windows", "FALSE", "east")
	f.Add("team/../app/_manifests//v1", "platform=%zz&platform=", "perhaps", "\x00")
	f.Add("_manifests/x/_manifests/_manifests/", ";", "", "")
	f.Fuzz(func(t *testing.T, path, query, capable, region string) {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.URL = &url.URL{Path: mountapi.Prefix + path, RawQuery: query}
		r.SetBasicAuth("admin", adminPassword)
		r.Header[mountapi.HeaderCapable], r.Header[mountapi.HeaderRegion] = []string{capable}, []string{region}
		w := httptest.NewRecorder()
		b.handler.ServeHTTP(w, r)
		var m mountapi.Mount
		var failure struct {
			Errors []struct{ Code, Message string }
		}
		switch w.Code {
		case http.StatusOK:
			if err := json.Unmarshal(w.Body.Bytes(), &m); err != nil || m.Digest != digest || len(m.Layers) != 1 {
				t.Errorf("%s", w.Body)
			}
		case http.StatusBadRequest, http.StatusNotFound:
			if err := json.Unmarshal(w.Body.Bytes(), &failure); err != nil || len(failure.Errors) != 1 || failure.Errors[0].Code == "" || failure.Errors[0].Message == "" {
				t.Errorf("%d %s", w.Code, w.Body)
			}
		default:
			t.Errorf("%q?%q: %d %s", path, query, w.Code, w.Body)
		}
	})
}
