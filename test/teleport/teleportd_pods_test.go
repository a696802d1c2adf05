package teleport

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/node/disks/control"
	"sluice/internal/node/happening"
	"sluice/internal/node/happening/feed"
	"sluice/test/bed"
)

// Pods are told whose images are teleported, and why others aren't.
func TestTeleportdTellsPods(t *testing.T) {
	s := newNodeStage(t)
	socket := filepath.Join(t.TempDir(), "containerd.sock")
	n := s.newNode("--cri-socket", socket)
	must(t, os.Symlink(n.ContainerdSocket(), socket))
	other, err := bed.NewToolbox(t.Context(), filepath.Join(t.TempDir(), "other"), 30, 50_000)
	must(t, err)
	teleported, plain := s.push(s.box, "team/app:v1"), s.pushPlain(other, "other/app:v1")
	must(t, n.EnableCRI(bed.CRI{Sandbox: plain}, s.registry.Addr))
	s.startNode(n)
	kubelet, err := n.Kubelet(filepath.Join(n.Dir, "run", "cri.sock"))
	must(t, err)
	t.Cleanup(kubelet.Close)
	told := make(chan feed.Line, 100)
	ctx, cancel := context.WithCancel(context.Background())
	followed := make(chan error, 1)
	go func() {
		followed <- control.NewClient(filepath.Join(n.Dir, "run", "control.sock")).Events(ctx, "", true, func(l feed.Line) error { told <- l; return nil })
	}()
	t.Cleanup(func() { cancel(); <-followed })
	next := func() feed.Line {
		t.Helper()
		select {
		case l := <-told:
			return l
		case <-time.After(time.Minute):
			t.Fatal("nothing is told")
			return feed.Line{}
		}
	}
	pod := func(ref string) happening.Pod {
		t.Helper()
		sandbox, err := kubelet.StartSandbox(t.Context(), false, nil)
		must(t, err)
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := kubelet.RemovePod(ctx, bed.Pod{Sandbox: sandbox.ID}); err != nil {
				t.Error(err)
			}
		})
		id, err := kubelet.PullFor(t.Context(), sandbox, ref)
		must(t, err)
		_, err = kubelet.StartContainer(t.Context(), sandbox, "main", 0, ref, id, "/bin/sh", "-c", "exit")
		must(t, err)
		m := sandbox.Metadata()
		return happening.Pod{Namespace: m.Namespace, Name: m.Name, UID: m.Uid}
	}
	who := pod(teleported)
	if l := next(); l.Kind != happening.Pulling || l.Pod != who || l.Image != teleported || !l.Streamed {
		t.Errorf("while it's pulled: %+v", l)
	}
	if l := next(); l.Kind != happening.Started || l.Pod != who || l.Container != "main" || l.Image != teleported || !l.Streamed || l.Present || l.Duration <= 0 || l.BytesTotal < 3<<20 {
		t.Errorf("its container: %+v", l)
	}
	who = pod(plain)
	if l := next(); l.Kind != happening.Started || l.Pod != who || l.Streamed || l.Reason != "NoStreamingArtifact" || !strings.Contains(l.Remedy, "sluice teleport edit-attribute") {
		t.Errorf("one of an image that isn't teleported: %+v", l)
	}
}
