package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/cmd/internal/program"
	"sluice/internal/node/disks/control"
	"sluice/internal/node/mount"
	"sluice/internal/node/pulled"
	"sluice/oci"
)

func TestVariablesAfterTheImage(t *testing.T) {
	for args, want := range map[string][2]string{
		"":                           {},
		"sh -e":                      {"", "sh -e"},
		"-e A=1 -e B=2 sh -e C":      {"A=1 B=2", "sh -e C"},
		"--env=A=1 --env B sh":       {"A=1 B", "sh"},
		"-e A=1":                     {"A=1", ""},
		"-- -e A=1":                  {"", "-e A=1"},
		"-e A=1 -- -x --":            {"A=1", "-x --"},
		"-export":                    {"", "-export"},
		"--environment=x -e A=1 run": {"", "--environment=x -e A=1 run"},
	} {
		env, command, err := leadingEnv(strings.Fields(args))
		if err != nil || strings.Join(env, " ") != want[0] || strings.Join(command, " ") != want[1] {
			t.Errorf("%q: variables %q, command %q, %v", args, env, command, err)
		}
	}
	if _, _, err := leadingEnv([]string{"-e"}); err == nil {
		t.Error("a variable that isn't there was taken")
	}
	t.Setenv("ORCA_TEST", "here")
	if diff := cmp.Diff([]string{"A=", "ORCA_TEST=here", "ORCA_NONE="}, variables([]string{"A=", "ORCA_TEST", "ORCA_NONE"})); diff != "" {
		t.Error(diff)
	}
}

const digest = oci.Digest("sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef")

// What is told of a start is what scripts wait for.
func TestStages(t *testing.T) {
	progress := func(p pulled.Progress) control.Line {
		p.Layers, p.Size, p.Total = 2, 3000, 1500
		return control.Line{Stage: control.StagePulling, Progress: &p}
	}
	for want, lines := range map[string][]control.Line{
		"requesting manifest\n" +
			"teleporting linux/amd64 " + string(digest) + " using the loopback snapshotter...\n" +
			"Successfully teleported!\n": {
			{Stage: control.StageManifest}, {Stage: control.StageTeleporting, Platform: "linux/amd64", Manifest: digest, Layers: 2}, {Stage: control.StageTeleported},
		},
		"requesting manifest\n" +
			"r/app can't be teleported (it isn't enabled): pulling it the ordinary way\n" +
			"r/app: pulling 2 layers, 3.0 kB\n" +
			"pulled linux/amd64 " + string(digest) + ", 2 layers\n": {
			{Stage: control.StageManifest}, {Stage: control.StageOrdinary, Why: "it isn't enabled", Reason: mount.NoStreamingArtifact},
			progress(pulled.Progress{Layer: -1}), progress(pulled.Progress{Layer: 1, Done: 700}),
			progress(pulled.Progress{Layer: 1, Done: 1500, Finished: true}), progress(pulled.Progress{Done: 1500, Finished: true, Here: true}),
			{Stage: control.StagePulled, Platform: "linux/amd64", Manifest: digest, Layers: 2},
		},
		"requesting manifest\n" +
			"the registry doesn't answer (connection refused): using linux/amd64 " + string(digest) + " as it was pulled before\n": {
			{Stage: control.StageManifest}, {Stage: control.StageKept, Platform: "linux/amd64", Manifest: digest, Why: "connection refused"},
		},
	} {
		for _, debug := range []bool{false, true} {
			var out bytes.Buffer
			s := newStages("r/app", &out, debug)
			for _, l := range lines {
				s.show(l)
			}
			s.end()
			got := out.String()
			if debug {
				if !regexp.MustCompile(`debug: requesting the manifest, and what mounting takes, took \d+\.\d\d\d s\n`).MatchString(got) || !strings.Contains(got, "debug: all that took") {
					t.Errorf("--debug tells %s", got)
				}
				got = regexp.MustCompile(`(?m)^debug: .*\n`).ReplaceAllString(got, "")
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("debug %v (-want +got): %s", debug, diff)
			}
		}
	}
}

func TestImagesAreListed(t *testing.T) {
	var out bytes.Buffer
	err := printImages(&out, []control.Kept{
		{Reference: "r/app:v1", Manifest: digest, Platform: "linux/amd64", Teleported: true, Layers: 28, Size: 1_500_000, Pulled: time.Now()},
		{Reference: "r/other:latest", Manifest: digest, Platform: "linux/amd64", Layers: 1, Size: 600, Pulled: time.Now()},
	})
	lines := strings.Split(out.String(), "\n")
	if err != nil || len(lines) != 4 || !strings.HasPrefix(lines[1], "r/app:v1        0123456789ab  linux/amd64  28      1.5 MB  teleported  20") {
		t.Errorf("%v:\n%s", err, &out)
	}
	out.Reset()
	if err := printImages(&out, nil); err != nil || !strings.Contains(out.String(), "orca pull") {
		t.Errorf("%v: %s", err, &out)
	}
}

func TestCommandLine(t *testing.T) {
	for args, want := range map[string]string{
		"run":                             "usage: orca run [OPTION]... IMAGE [-e KEY=VALUE]... [COMMAND [ARGUMENT]...]",
		"pull":                            "arguments are missing",
		"pull a b":                        "too many arguments: b",
		"images -o yaml":                  "use table or json",
		"pull -o table a":                 "use none or json",
		"run --socket /x --root /y image": "none of the others can be",
		"run image -e":                    "lacks its KEY=VALUE",
		"fly":                             "unknown command",
	} {
		cmd := newCommand()
		cmd.SetArgs(strings.Fields(args))
		cmd.SetOut(new(bytes.Buffer))
		cmd.SetErr(new(bytes.Buffer))
		if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("orca %s: %v; want %q", args, err, want)
		}
	}
}

// A daemon that isn't there is said so, and which.
func TestNoDaemon(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may ask")
	}
	socket := filepath.Join(t.TempDir(), "none.sock")
	f := daemonFlags{socket: socket}
	if _, err := f.connect(t.Context()); !errors.Is(err, control.ErrNoDaemon) || !strings.Contains(err.Error(), socket) {
		t.Errorf("%v", err)
	}
	cmd := newCommand()
	cmd.SetArgs([]string{"run", "--socket", socket, "r/app"})
	var coded *program.CodedError
	if err := cmd.ExecuteContext(t.Context()); !errors.As(err, &coded) || coded.Code != 125 {
		t.Errorf("orca run: %v", err)
	}
	// With neither a daemon nor its program, what to do is said.
	t.Setenv("PATH", t.TempDir())
	f = daemonFlags{root: t.TempDir()}
	if _, err := f.connect(t.Context()); err == nil || !strings.Contains(err.Error(), "no teleportd in") {
		t.Errorf("%v", err)
	}
}
