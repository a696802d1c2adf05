package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"sluice/internal/acr"
)

func TestTeleportCommands(t *testing.T) {
	addr, reg := converting(t, "--set", "teleport.enabled=true", "--set", "teleport.server=files.example.com",
		"--set", "teleport.max_repositories=1", "--set", "teleport.max_layer=1MiB")
	pushImage(t, reg, "team/app", "v1", "linux", "one", "two")
	pushImage(t, reg, "tool", "v1", "linux", "one")
	checking := "Checking http://" + addr + "/mount/v1/team/app/_manifests/v1\n"

	stdout, _, err := runSluice(t, "teleport", "check-expansion", addr+"/team/app:v1")
	if err == nil || stdout != checking+"Status: 404\nTeleport: "+addr+"-team/app:v1 not enabled\n" {
		t.Errorf("not enabled: %q, %v", stdout, err)
	}
	stdout, _, err = runSluice(t, "teleport", "edit-attribute", addr+"/team/app", "enable")
	result, _ := strings.CutPrefix(stdout, "Sending Patch Request for team/app\n  RESULT: ")
	var r acr.Repository
	if e := json.Unmarshal([]byte(result), &r); err != nil || e != nil || !r.Attributes.TeleportEnabled {
		t.Errorf("enable: %q, %v, %v", stdout, err, e)
	}
	refuses(t, "max_repositories", "teleport", "edit-attribute", addr+"/tool", "enable")
	refuses(t, "enable or disable", "teleport", "edit-attribute", addr+"/tool", "toggle")
	says(t, "team/app -> Enabled\ntool -> Disabled\n\nSummary:\nEnabled Repositories:\n\nteam/app\n", "teleport", "find-repositories", "-r", addr)
	stdout, _, err = runSluice(t, "teleport", "find-repositories", "-r", addr, "-o", "json")
	var all []teleportRepository
	if e := json.Unmarshal([]byte(stdout), &all); err != nil || e != nil || len(all) != 2 || !all[0].Enabled || all[1].Enabled {
		t.Errorf("%q, %v, %v", stdout, err, e)
	}

	stdout, _, err = runSluice(t, "teleport", "check-expansion", addr+"/team/app:v1")
	if want := `^` + checking + `(Status: 409\nTeleport: expanding layers\n)*Status: 200\nTeleport: layers ready\n$`; err != nil || !regexp.MustCompile(want).MatchString(stdout) {
		t.Errorf("%q, %v", stdout, err)
	}
	stdout, _, err = runSluice(t, "teleport", "check-expansion", "-r", addr, "team/app:v1", "--no-wait", "-o", "json")
	var state expansionState
	if e := json.Unmarshal([]byte(stdout), &state); err != nil || e != nil || state.Status != 200 || state.State != "ready" || len(state.Mount.Layers) != 2 || state.Mount.SMB.Password != "" {
		t.Errorf("%q, %v, %v", stdout, err, e)
	}
	pushImage(t, reg, "team/app", "large", "linux", strings.Repeat("x", 2<<20))
	stdout, _, err = runSluice(t, "teleport", "check-expansion", addr+"/team/app:large")
	if err == nil || !strings.Contains(err.Error(), "teleport.max_layer") || !strings.HasSuffix(stdout, "Status: 422\nUnknown status 422\n") {
		t.Errorf("too large: %q, %v", stdout, err)
	}
	refuses(t, "which one", "teleport", "check-expansion", addr+"/team/app")
	teleportOperations(t, addr)
}

// teleportOperations looks at the operations of TestTeleportCommands: one that
// succeeded and one that failed.
func teleportOperations(t *testing.T, addr string) {
	t.Helper()
	stdout, _, err := runSluice(t, "teleport", "operation", "list", addr+"/team/app", "-o", "json")
	var list []acr.Operation
	if e := json.Unmarshal([]byte(stdout), &list); err != nil || e != nil || len(list) != 2 || list[0].ErrorCode != "EXPANSION_LIMIT_EXCEEDED" || list[1].Status != acr.StatusSucceeded {
		t.Fatalf("%s, %v, %v", stdout, err, e)
	}
	stdout, _, err = runSluice(t, "teleport", "operation", "list", "-r", addr, "--repository", "team/app")
	if lines := strings.Split(stdout, "\n"); err != nil || len(lines) != 4 || !strings.HasPrefix(lines[1], list[0].ID+"  Failed ") {
		t.Errorf("%q, %v", stdout, err)
	}
	if stdout, _, err := runSluice(t, "artifact-streaming", "operation", "list", addr+"/team/app", "-o", "json"); err != nil || stdout != "[]\n" {
		t.Errorf("conversions: %q, %v", stdout, err)
	}
	stdout, _, err = runSluice(t, "teleport", "operation", "show", "-r", addr, "--image", "team/app:large")
	if err != nil || !strings.Contains(stdout, list[0].ID) || !strings.Contains(stdout, "TeleportExpansion") || !strings.Contains(stdout, "Failed") {
		t.Errorf("%q, %v", stdout, err)
	}
	stdout, _, err = runSluice(t, "teleport", "expand", addr+"/team/app:large", "-o", "json")
	var op acr.Operation
	if e := json.Unmarshal([]byte(stdout), &op); err != nil || e != nil || op.ID == list[0].ID || op.Status == acr.StatusSucceeded {
		t.Errorf("%s, %v, %v", stdout, err, e)
	}
	stdout, _, err = runSluice(t, "teleport", "operation", "cancel", "--repository", addr+"/team/app", "--id", op.ID)
	if err != nil || !strings.Contains(stdout, op.ID) {
		t.Errorf("%q, %v", stdout, err)
	}
	refuses(t, "teleportEnabled", "teleport", "expand", addr+"/tool:v1")
	refuses(t, "no expansion", "teleport", "operation", "show", "--image", addr+"/tool:v1")
	refuses(t, "OPERATION_UNKNOWN", "teleport", "operation", "cancel", "--repository", addr+"/tool", "--id", op.ID)
}

// What a registry answers besides is shown as it was in the original, and with
// --debug which requests were made.
func TestCheckExpansionOfStrangers(t *testing.T) {
	status := http.StatusTeapot
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/" {
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(status)
		}
	}))
	defer server.Close()
	addr := strings.TrimPrefix(server.URL, "http://")
	path := "/mount/v1/team/app/_manifests/v1"
	stdout, stderr, err := runSluice(t, "teleport", "check-expansion", "--debug", addr+"/team/app:v1")
	if err == nil || stdout != "Checking "+server.URL+path+"\nStatus: 418\nUnknown status 418\n" {
		t.Errorf("%q, %v", stdout, err)
	}
	if !strings.Contains(stderr, "GET "+server.URL+path+": 418") || !strings.Contains(stderr, "  Retry-After: 7\n") {
		t.Errorf("--debug says %q", stderr)
	}
	status = http.StatusForbidden
	stdout, stderr, err = runSluice(t, "teleport", "check-expansion", "-o", "json", addr+"/team/app:v1")
	var state expansionState
	if e := json.Unmarshal([]byte(stdout), &state); err == nil || e != nil || state.Status != 403 || state.State != "unknown" || state.Reason == "" || strings.Contains(stderr, "GET ") {
		t.Errorf("%q, %q, %v, %v", stdout, stderr, err, e)
	}
	status = http.StatusNotFound
	if stdout, _, err = runSluice(t, "teleport", "check-expansion", addr+"/team/app:v1"); err == nil || !strings.Contains(stdout, "Status: 404\n") {
		t.Errorf("a registry without the API: %q, %v", stdout, err)
	}
	server.Close()
	if stdout, _, err = runSluice(t, "teleport", "check-expansion", addr+"/team/app:v1"); err == nil || strings.Contains(stdout, "Status") {
		t.Errorf("a registry that is gone: %q, %v", stdout, err)
	}
}

// What a file server needs to be told once.
func TestSMBConfig(t *testing.T) {
	stdout, _, err := runSluice(t, "registry", "smb-config", "--data", "/srv/images")
	if err != nil || !strings.Contains(stdout, "include = /srv/images/teleport/_samba/shares.conf\n") || strings.Contains(stdout, "smb ports") {
		t.Errorf("%q, %v", stdout, err)
	}
	stdout, _, err = runSluice(t, "registry", "smb-config", "--set", "teleport.samba_directory=/samba", "--port", "1445", "--state", "/state")
	if err != nil || !strings.Contains(stdout, "include = /samba/shares.conf\n") || !strings.Contains(stdout, "smb ports = 1445\n") || !strings.Contains(stdout, "private dir = /state/private\n") {
		t.Errorf("%q, %v", stdout, err)
	}
}
