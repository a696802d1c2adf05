package webhook

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sluice/oci"
)

const digest = oci.Digest("sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")

// bodies are what registries send, shortened by what isn't read.
var bodies = map[string]struct {
	body string
	want []Push
}{
	"distribution": {`{"events":[
		{"id":"1","timestamp":"2026-11-24T03:00:00Z","action":"push","target":{"mediaType":"application/octet-stream","size":7,"digest":"` + digest.String() + `","length":7,"repository":"team/app"},"request":{"useragent":"docker/29"}},
		{"id":"2","action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + digest.String() + `","repository":"team/app","tag":"v1"},"request":{"useragent":"docker/29"},"actor":{},"source":{"addr":"r:5000"}},
		{"id":"3","action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + digest.String() + `","repository":"team/own"},"request":{"useragent":"me"}},
		{"id":"4","action":"push","target":{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"` + digest.String() + `","repository":"team/app","tag":"sha256-9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}},
		{"id":"5","action":"pull","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + digest.String() + `","repository":"team/app"}}]}`,
		[]Push{{"team/app", digest, "v1"}}},
	"Azure": {`{"id":"cb8c3971","timestamp":"2026-11-24T03:00:00Z","action":"push","target":{"mediaType":"application/vnd.docker.distribution.manifest.v2+json","size":524,"digest":"` + digest.String() + `","length":524,"repository":"hello-world","tag":"v1"},"request":{"id":"3cbb","host":"myregistry.azurecr.io","method":"PUT","useragent":"docker/18"}}`,
		[]Push{{"hello-world", digest, "v1"}}},
	"Azure's deletion": {`{"id":"afc3","action":"delete","target":{"mediaType":"application/vnd.docker.distribution.manifest.v2+json","digest":"` + digest.String() + `","repository":"hello-world"}}`, nil},
	"Azure's ping":     {`{"id":"1","action":"ping"}`, nil},
	"Harbor": {`{"type":"PUSH_ARTIFACT","occur_at":1680501893,"operator":"harbor-jobservice","event_data":{"resources":[{"digest":"` + digest.String() + `","tag":"latest","resource_url":"harbor.example.com/library/alpine:latest"}],"repository":{"date_created":1680501893,"name":"alpine","namespace":"library","repo_full_name":"library/alpine","repo_type":"private"}}}`,
		[]Push{{"library/alpine", digest, "latest"}}},
	"Harbor, CloudEvents": {`{"specversion":"1.0","id":"4b2f","source":"/projects/1/webhook/policies/15","type":"harbor.artifact.pushed","datacontenttype":"application/json","time":"2026-11-24T03:00:00Z","data":{"resources":[{"digest":"` + digest.String() + `","tag":"` + digest.String() + `"}],"repository":{"repo_full_name":"library/alpine"}}}`,
		[]Push{{"library/alpine", digest, ""}}},
	"Harbor's scan": {`{"type":"SCANNING_COMPLETED","event_data":{"resources":[{"digest":"` + digest.String() + `","tag":"latest"}],"repository":{"repo_full_name":"library/alpine"}}}`, nil},
	"no events":     {`{"events":[]}`, nil},
	"only a tag":    {`{"action":"push","target":{"repository":"a","tag":"v1"}}`, []Push{{"a", "", "v1"}}},
}

func TestParse(t *testing.T) {
	for name, b := range bodies {
		got, err := Parse([]byte(b.body), "me")
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if d := cmp.Diff(b.want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	event := `{"action":"push","target":{"repository":"a","tag":"v1"}}`
	for want, body := range map[string]string{
		"not a registry's webhook":         "hello",
		"no events, action or type":        `{"hello":"world"}`,
		"cannot unmarshal":                 `[]`,
		"push 0":                           `{"action":"push","target":{"repository":"../../etc","tag":"v1"}}`,
		"digest":                           `{"action":"push","target":{"repository":"a","digest":"sha256:0"}}`,
		"tag":                              `{"action":"push","target":{"repository":"a"}}`,
		fmt.Sprint(maxPushes+1, " pushes"): `{"events":[` + strings.Repeat(event+",", maxPushes) + event + `]}`,
	} {
		if got, err := Parse([]byte(body), ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.100s: %v, error %v, want %q", body, got, err, want)
		}
	}
}

// What Parse returns can be asked of a registry, whatever it was made of.
func FuzzParse(f *testing.F) {
	for _, b := range bodies {
		f.Add([]byte(b.body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		pushes, err := Parse(body, "me")
		if err != nil && pushes != nil {
			t.Fatal("pushes and an error")
		}
		if len(pushes) > maxPushes {
			t.Fatal("too many")
		}
		for _, p := range pushes {
			if _, err := oci.ParseReference("registry.invalid/" + p.String()); err != nil {
				t.Fatalf("%+v: %v", p, err)
			}
			if isReferrersTag(p.Tag) {
				t.Fatalf("%+v", p)
			}
		}
	})
}
