package acr_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"sluice/internal/acr"
	"sluice/internal/stored"
	"sluice/internal/teleport"
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

// Expansions are operations, as conversions are.
func TestExpansions(t *testing.T) {
	b := newBench(t, stored.Options{Expand: true})
	ctx, client := t.Context(), b.admin()
	digest := pushRunnable(t, b.reg, "team/app", "v1")
	if _, err := client.StartExpansion(ctx, "team/app", digest); !errors.Is(err, teleport.ErrNotEnabled) {
		t.Errorf("before it takes part: %v", err)
	}
	if _, err := client.UpdateRepository(ctx, "team/app", acr.AttributeChanges{TeleportEnabled: on()}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.LatestExpansion(ctx, "team/app", digest); !errors.Is(err, acr.ErrOperationUnknown) {
		t.Errorf("before there was one: %v", err)
	}
	op, err := client.StartExpansion(ctx, "team/app", digest)
	if err != nil || op.Status != acr.StatusNotStarted || op.Resource != "team/app@"+digest.String() {
		t.Fatalf("%+v, %v", op, err)
	}
	got, err := client.ImageOperation(ctx, "team/app", op.ID)
	if err != nil || got.Name != acr.ExpansionName || got.Progress != "0%" || got.Details != "Expansion started for resource "+op.Resource {
		t.Errorf("%+v, %v", got, err)
	}
	conversion, err := client.StartStreaming(ctx, "team/app", digest)
	if err != nil {
		t.Fatal(err)
	}
	for name, id := range map[string]string{acr.ExpansionName: op.ID, acr.ConversionName: conversion.ID} {
		if list, err := client.ImageOperations(ctx, "team/app", name); err != nil || len(list) != 1 || list[0].ID != id || list[0].Name != name {
			t.Errorf("%s: %+v, %v", name, list, err)
		}
	}
	resp, body := b.send("admin", adminPassword, "GET", "/acr/v1/team/app/_operations?n=1", "")
	if resp.StatusCode != http.StatusOK || strings.Count(body, `"id"`) != 1 {
		t.Errorf("the last one: %s %s", resp.Status, body)
	}
	if got, err := client.CancelImageOperation(ctx, "team/app", op.ID); err != nil || got.Status != acr.StatusCanceled || got.Name != "Cancel: "+acr.ExpansionName {
		t.Errorf("%+v, %v", got, err)
	}
	if latest, err := client.LatestExpansion(ctx, "team/app", digest); err != nil || latest.ID != op.ID || latest.Status != acr.StatusCanceled {
		t.Errorf("%+v, %v", latest, err)
	}
	if again, err := client.StartExpansion(ctx, "team/app", digest); err != nil || again.ID == op.ID {
		t.Errorf("%+v, %v", again, err)
	}
}

func TestExpansionsRefuse(t *testing.T) {
	b := newBench(t, stored.Options{Expand: true})
	digest := pushRunnable(t, b.reg, "repo", "v1").String()
	passwords := map[string]string{
		"reader": b.token("reader", "repositories/repo/content/read"), "pusher": b.token("pusher", "repositories/repo/content/write"), "admin": adminPassword,
	}
	const images = "/acr/v1/repo/_teleport/"
	for _, c := range []struct {
		user, method, path, body string
		status                   int
		code                     string
	}{
		{"", "GET", images + digest, "", 401, "UNAUTHORIZED"},
		{"pusher", "GET", images + digest, "", 403, "DENIED"},
		{"reader", "POST", images + digest, `{}`, 403, "DENIED"},
		{"reader", "GET", images + digest, "", 404, "OPERATION_UNKNOWN"},
		{"pusher", "POST", images + digest, `{}`, 404, "TELEPORT_NOT_ENABLED"},
		{"pusher", "POST", images + digest, `{"format":"vhd"}`, 400, "BAD_REQUEST"},
		{"pusher", "POST", images + oci.DigestOf(nil).String(), `{}`, 404, "RESOURCE_NOT_FOUND"},
		{"pusher", "POST", images + "sha256:1", `{}`, 400, "DIGEST_INVALID"},
		{"admin", "PUT", images + digest, `{}`, 405, "UNSUPPORTED"},
		{"admin", "GET", "/acr/v1/repo/_teleport", "", 404, "NOT_FOUND"},
		{"admin", "GET", images + digest + "/x", "", 404, "NOT_FOUND"},
	} {
		resp, body := b.send(c.user, passwords[c.user], c.method, c.path, c.body)
		if resp.StatusCode != c.status || codeOf(body) != c.code {
			t.Errorf("%s: %s %s %s: %s %s, want %d %s", c.user, c.method, c.path, c.body, resp.Status, body, c.status, c.code)
		}
	}
	h := acr.New(b.reg, b.db, b.store, acr.Options{})
	for _, method := range []string{"GET", "POST"} {
		r := httptest.NewRequest(method, images+digest, strings.NewReader("{}"))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != 405 || !strings.Contains(w.Body.String(), "teleport.enabled") {
			t.Errorf("%s: %d %s", method, w.Code, w.Body)
		}
	}
}
