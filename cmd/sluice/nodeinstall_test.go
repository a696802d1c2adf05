package main

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// TestInstallFlags: what is wrong is told before anything happens.
func TestInstallFlags(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("installing needs root")
	}
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"--from", "x", "y"}, "come behind --"},
		{[]string{"--", "--no-such"}, "unknown flag"},
		{[]string{"--", "--no-fill", "x"}, `unexpected "x"`},
		{[]string{"--registry", "a/b"}, "isn't the name of a host"},
		{[]string{"--init", "upstart"}, "use auto, systemd or none"},
		{[]string{"--output", "yaml"}, "table or json"},
	} {
		_, stderr, code := runProgram(t, append([]string{"node", "install", "--host", t.TempDir()}, c.args...)...)
		if code == 0 || !strings.Contains(stderr, c.says) {
			t.Errorf("%q: exit code %d, %s", c.args, code, stderr)
		}
	}
}

func TestWithoutHost(t *testing.T) {
	for in, want := range map[string]string{
		"node install --host /host --supervise -- --host x": "node install --supervise -- --host x",
		"node uninstall --host=/host --wait":                "node uninstall --wait",
		"node install":                                      "node install",
	} {
		if got := withoutHost(strings.Fields(in)); !slices.Equal(got, strings.Fields(want)) {
			t.Errorf("%s became %q", in, got)
		}
	}
}
