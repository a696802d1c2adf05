package notify_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/index"
	"sluice/internal/notify"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

// The registry writes events and this package reads them; neither imports the
// other. So they agree here.
func TestEventsAreTheRegistrys(t *testing.T) {
	if notify.Queue != stored.EventQueue {
		t.Errorf("queues %q and %q", notify.Queue, stored.EventQueue)
	}
	theirs := stored.Event{
		ID: "id", Time: time.Now().UTC(), Action: "push", Repository: "a", Digest: "sha256:00", Tag: "1", MediaType: "m/t", Size: 9,
		Actor: "me", Remote: "192.0.2.1:1", Agent: "curl", RequestID: "r",
	}
	for v, i := reflect.ValueOf(theirs), 0; i < v.NumField(); i++ {
		if v.Field(i).IsZero() {
			t.Errorf("this test doesn't fill in %s", v.Type().Field(i).Name)
		}
	}
	payload, err := json.Marshal(theirs)
	if err != nil {
		t.Fatal(err)
	}
	var ours notify.Event
	if err := json.Unmarshal(payload, &ours); err != nil {
		t.Fatal(err)
	}
	back, err := json.Marshal(ours)
	if err != nil {
		t.Fatal(err)
	}
	var again stored.Event
	if err := json.Unmarshal(back, &again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(theirs, again); diff != "" {
		t.Errorf("an event changed on its way (-want +got):\n%s", diff)
	}
}

// A push to the registry arrives at an endpoint, with who made it.
func TestPushArrives(t *testing.T) {
	db, err := index.Open(t.Context(), index.Options{URL: "sqlite:" + filepath.Join(t.TempDir(), "index.db")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	bodies := make(chan string, 10)
	endpoint := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		bodies <- string(b)
	}))
	t.Cleanup(endpoint.Close)
	n, err := notify.New(db, notify.Options{Poll: 5 * time.Millisecond, Endpoints: []notify.Endpoint{{Name: "e", URL: endpoint.URL}}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})

	reg := stored.New(&storage.Memory{}, db, stored.Options{AllowSparse: true, Events: true})
	who := oci.WithActor(t.Context(), oci.Actor{Name: "robot", Remote: "192.0.2.7:1", RequestID: "r1"})
	content := []byte(`{"schemaVersion":2,"mediaType":"` + oci.MediaTypeIndex + `","manifests":[]}`)
	desc, err := reg.PushManifest(who, "team/app", "v1", oci.MediaTypeIndex, content)
	if err != nil {
		t.Fatal(err)
	}
	if err := reg.DeleteManifest(who, "team/app", desc.Digest); err != nil {
		t.Fatal(err)
	}
	for _, action := range []string{"push", "delete"} {
		select {
		case body := <-bodies:
			for _, want := range []string{`"action":"` + action + `"`, `"repository":"team/app"`, desc.Digest.String(), `"name":"robot"`, `"addr":"192.0.2.7:1"`, `"id":"r1"`} {
				if !strings.Contains(body, want) {
					t.Errorf("%s lacks %s", body, want)
				}
			}
		case <-time.After(time.Minute):
			t.Fatalf("no %s arrived", action)
		}
	}
}
