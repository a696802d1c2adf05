package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fuse"
)

// The table stays narrow; why an image doesn't stream and what to do is said
// beneath it.
func TestStatusSaysWhatIsWrongAndWhatToDo(t *testing.T) {
	why := "NoStreamingArtifact: " + strings.Repeat("x", 100)
	var out bytes.Buffer
	err := printStatus(&out, control.Status{Status: mount.Status{
		Images: []mount.ImageStatus{
			{Reference: "host/here:1", State: mount.StateComplete, Plane: "files", Percent: 100},
			{Reference: "host/bad:1", State: mount.StateQuarantined, Percent: 12, Problem: "the layer lies\nabout itself", Remedy: mount.StateQuarantined.Remedy()},
		},
		Pulls: []mount.Outcome{
			{Time: time.Now(), Reference: "host/never:1", Reason: mount.NoStreamingArtifact, Message: why},
			{Time: time.Now(), Reference: "host/later:1"},
		},
		NotStreaming: []mount.NotStreamed{{
			Reference: "host/never:1", Message: why, Reason: mount.NoStreamingArtifact,
			Meaning: mount.NoStreamingArtifact.Meaning(), Remedy: mount.NoStreamingArtifact.Remedy(),
		}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	text := out.String()
	for _, want := range []string{
		"host/bad:1 is quarantined, with a problem:\n  the layer lies\n  about itself\n  convert",
		"\nhost/never:1 doesn't stream: nobody has converted the image\n  " + why + "\n  What to do: convert it",
		"no: NoStreamingArtifact\n",
	} {
		if strings.Count(text, want) != 1 {
			t.Errorf("%q isn't there once", want)
		}
	}
	table, _, _ := strings.Cut(text, "\nhost/bad:1 is")
	for line := range strings.Lines(table) {
		if len(line) > 80 {
			t.Errorf("a line of %d characters: %s", len(line), line)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
}

// The status says which plane runs, and why not a better one.
func TestStatusSaysWhichPlane(t *testing.T) {
	for name, c := range map[string]struct {
		plane control.Plane
		want  string
	}{
		"the best": {
			describeFUSE(plane.Support{Kernel: "6.18.1", Mode: plane.FileBacked}, fuse.Start{Resends: true}),
			"plane    file-backed EROFS over FUSE; complete layers are read directly (Linux 6.18.1)\ncache",
		},
		"an old kernel": {
			describeFUSE(plane.Support{Kernel: "6.6.1", Mode: plane.Loop, Reasons: []string{"no file-backed EROFS"}}, fuse.Start{}),
			"plane    EROFS on loop devices over FUSE; complete layers by loop devices, too (Linux 6.6.1)\n         no file-backed EROFS\n         reads that are under way when the daemon dies fail",
		},
	} {
		var out bytes.Buffer
		if err := printStatus(&out, control.Status{Daemon: control.Info{Plane: c.plane}}); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), c.want) {
			t.Errorf("%s: got\n%s\nwant\n%s", name, out.String(), c.want)
		}
	}
}
