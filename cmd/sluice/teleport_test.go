package main

import (
	"encoding/json"
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
