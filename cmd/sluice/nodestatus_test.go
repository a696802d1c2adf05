package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
)

// The table stays narrow; why an image doesn't stream is said beneath it, once,
// and not of an image that streams by now.
func TestStatusSaysWhyImagesDoNotStream(t *testing.T) {
	why := "NoStreamingArtifact: " + strings.Repeat("x", 100)
	no := func(ref string) mount.Outcome {
		return mount.Outcome{Time: time.Now(), Reference: ref, Reason: mount.NoStreamingArtifact, Message: why}
	}
	var out bytes.Buffer
	err := printStatus(&out, control.Status{Status: mount.Status{Pulls: []mount.Outcome{
		no("host/never:1"), no("host/later:1"), no("host/never:1"), {Time: time.Now(), Reference: "host/later:1"},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	text := out.String()
	if strings.Count(text, why) != 1 || !strings.Contains(text, "\nhost/never:1 doesn't stream:\n") || strings.Count(text, "no: NoStreamingArtifact\n") != 3 {
		t.Errorf("got\n%s", text)
	}
	for line := range strings.Lines(text) {
		if len(line) > 80 && !strings.Contains(line, why) {
			t.Errorf("a line of %d characters: %s", len(line), line)
		}
	}
}
