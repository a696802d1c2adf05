package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sluice/internal/node/plane"
)

// TestUninstallWithoutContainerd: what somebody mounted is in the way, what
// isn't ours stays, and the second time there's nothing.
func TestUninstallWithoutContainerd(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	addr, _ := startRegistry(t, "--data", filepath.Join(t.TempDir(), "data"))
	pushShell(t, addr, "shell")
	base, dir := t.TempDir(), t.TempDir()
	root, sockets := filepath.Join(base, "state"), filepath.Join(base, "run")
	flags := []string{"--root", root, "--run", sockets}
	t.Cleanup(func() { endDaemon(t, sockets, dir) })
	if _, stderr, code := runProgram(t, append([]string{"mount", addr + "/shell:v1", dir}, flags...)...); code != 0 {
		t.Fatalf("mount: exit code %d: %s", code, stderr)
	}
	uninstall := func(args ...string) (stdout, stderr string, code int) {
		return runProgram(t, append(append([]string{"node", "uninstall", "--containerd", ""}, flags...), args...)...)
	}
	if _, stderr, code := uninstall(); code == 0 || !strings.Contains(stderr, dir) {
		t.Errorf("with a mount: exit code %d, %s", code, stderr)
	}
	if _, err := os.ReadFile(filepath.Join(dir, "bin", "cat")); err != nil {
		t.Errorf("a refused uninstall took the mount away: %v", err)
	}
	secret := filepath.Join(sockets, "credentials.json")
	if err := os.WriteFile(secret, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(root, "somebody's")
	if err := os.WriteFile(foreign, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code := uninstall("--force", "--dry-run", "--output", "json")
	var u uninstalled
	if err := json.Unmarshal([]byte(stdout), &u); code != 0 || err != nil {
		t.Fatalf("dry run: exit code %d, %v: %s", code, err, stderr)
	}
	if !u.DryRun || len(u.Daemons) != 1 || !slices.Equal(u.Users, []string{dir}) || !slices.Equal(u.Kept, []string{foreign}) ||
		!slices.Contains(u.Removed, filepath.Join(root, "cache")) || !slices.Contains(u.Removed, filepath.Join(sockets, "plane")) {
		t.Errorf("dry run: %+v", u)
	}
	if m, err := plane.MountAt(dir); m == nil || err != nil {
		t.Errorf("the dry run unmounted it: %v", err)
	}
	stdout, stderr, code = uninstall("--force")
	if code != 0 || !strings.Contains(stdout, foreign) {
		t.Fatalf("exit code %d, printed %s%s", code, stdout, stderr)
	}
	if below, err := plane.MountsBelow(base); len(below) > 0 || err != nil {
		t.Errorf("still mounted: %q, %v", below, err)
	}
	if m, err := plane.MountAt(dir); m != nil || err != nil {
		t.Errorf("still mounted: %v, %v", m, err)
	}
	if left, err := os.ReadDir(root); len(left) != 1 || err != nil {
		t.Errorf("left over: %v, %v", left, err)
	}
	if exists(sockets) {
		t.Error("the directory of sockets is still there")
	}
	if err := os.Remove(foreign); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if stdout, stderr, code = uninstall(); code != 0 {
			t.Errorf("again: exit code %d, %s", code, stderr)
		}
	}
	if !strings.Contains(stdout, "Nothing of sluice node is here.") || exists(root) {
		t.Errorf("the last time it printed %s", stdout)
	}
}
