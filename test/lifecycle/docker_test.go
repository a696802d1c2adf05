package lifecycle

import (
	"testing"

	"sluice/test/bed"
)

// TestDocker runs an image with Docker, whose containerd image store uses the
// snapshotter.
func TestDocker(t *testing.T) {
	s := theStage(t)
	dockerd, err := bed.BuildDockerd(t.Context(), s.Src, func(s string) { t.Log(s) })
	must(t, err)
	n := s.newNode(t, s.Tools)
	start(t, n)
	d, err := n.StartDocker(t.Context(), dockerd)
	must(t, err)
	t.Cleanup(d.Stop)
	must(t, d.Pull(t.Context(), s.Ref("app:1")))
	streams(t, n, s.Ref("app:1"))
	if big := layerBlobs(t, n); len(big) > 0 {
		t.Errorf("Docker downloaded layers of an image that streams: %q", big)
	}
	out, err := d.Run(t.Context(), s.Ref("app:1"), checkSums()...)
	must(t, err)
	if out != sumsOf(s.app) {
		t.Errorf("printed %s, want %s", out, sumsOf(s.app))
	}
	must(t, d.Pull(t.Context(), s.Ref("plain:1")))
	out, err = d.Run(t.Context(), s.Ref("plain:1"), checkSums()...)
	must(t, err)
	if out != sumsOf(s.plain) {
		t.Errorf("an image that doesn't stream printed %s, want %s", out, sumsOf(s.plain))
	}
	must(t, d.RemoveImage(t.Context(), s.Ref("app:1")))
	isFreed(t, n)
}
