package acr_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"sluice/internal/acr"
	"sluice/internal/stored"
	"sluice/oci"
)

// As many repositories as may can have teleportEnabled, and those that have it can
// be found.
func TestTeleportEnabled(t *testing.T) {
	b := newBench(t, stored.Options{Expand: true})
	ctx, client := t.Context(), b.admin()
	push(t, b.reg, "one", "one", "v1")
	push(t, b.reg, "two", "two", "v1")
	if r, err := client.UpdateRepository(ctx, "one", acr.AttributeChanges{TeleportEnabled: on()}); err != nil || !r.Attributes.TeleportEnabled {
		t.Errorf("%+v, %v", r, err)
	}
	_, err := client.UpdateRepository(ctx, "two", acr.AttributeChanges{TeleportEnabled: on(), DeleteEnabled: off()})
	if !errors.Is(err, oci.ErrDenied) || !strings.Contains(err.Error(), "such as one") {
		t.Errorf("a second of one: %v", err)
	}
	if r, err := client.Repository(ctx, "two"); err != nil || r.Attributes.TeleportEnabled || !r.Attributes.DeleteEnabled {
		t.Errorf("what was refused has changed something: %+v, %v", r, err)
	}
	if r, err := client.UpdateRepository(ctx, "one", acr.AttributeChanges{TeleportEnabled: off()}); err != nil || r.Attributes.TeleportEnabled {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := client.UpdateRepository(ctx, "two", acr.AttributeChanges{TeleportEnabled: on()}); err != nil || !r.Attributes.TeleportEnabled {
		t.Errorf("after that: %+v, %v", r, err)
	}
}

// Who may push may change teleportEnabled, and nothing else.
func TestTeleportEnabledByPushers(t *testing.T) {
	b := newBench(t, stored.Options{Expand: true})
	push(t, b.reg, "team/app", "one", "v1")
	callers := map[string]string{
		"pusher": b.token("pusher", "repositories/team/*/content/read", "repositories/team/*/content/write"),
		"puller": b.token("puller", "repositories/team/*/content/read"),
	}
	for _, c := range []struct {
		who, body string
		want      int
	}{
		{"pusher", `{"teleportEnabled":true}`, 200},
		{"pusher", `{"teleportEnabled":false}`, 200},
		{"pusher", `{"teleportEnabled":true,"deleteEnabled":false}`, 403},
		{"pusher", `{"deleteEnabled":false}`, 403},
		{"pusher", `{}`, 403},
		{"puller", `{"teleportEnabled":true}`, 403},
	} {
		if resp, body := b.send(c.who, callers[c.who], "PATCH", "/acr/v1/team/app", c.body); resp.StatusCode != c.want {
			t.Errorf("%s: %s: %s %s", c.who, c.body, resp.Status, body)
		}
	}
	if r, err := b.admin().Repository(t.Context(), "team/app"); err != nil || r.Attributes.TeleportEnabled || !r.Attributes.DeleteEnabled {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestTeleportWithoutExpansion(t *testing.T) {
	b := newBench(t, stored.Options{})
	push(t, b.reg, "one", "one", "v1")
	h := acr.New(b.reg, b.db, b.store, acr.Options{})
	for body, want := range map[string]int{`{"teleportEnabled":true}`: 405, `{"teleportEnabled":false}`: 200} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPatch, "/acr/v1/one", strings.NewReader(body)))
		if w.Code != want || want == 405 && !strings.Contains(w.Body.String(), "teleport.enabled") {
			t.Errorf("%s: %d %s", body, w.Code, w.Body)
		}
	}
}
