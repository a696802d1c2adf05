package kube

import (
	"strings"
	"testing"
)

// TestPullPolicy has kubelet pull, or not, as with overlayfs.
func TestPullPolicy(t *testing.T) {
	s := theStage(t)
	n := s.newNamespace(t)
	never := s.newToolbox(t, "never:1", 7, 100_000)
	n.apply(t, pod1("absent", never, "imagePullPolicy: Never"))
	eventually(t, patience, "kubelet refuses to pull", func() bool { return n.waits(t, "absent", "ErrImageNeverPull") })
	n.apply(t, pod1("ifnotpresent", never, "imagePullPolicy: IfNotPresent"))
	n.await(t, "ifnotpresent", 1)
	s.streams(t, never)
	n.await(t, "absent", 1) // it's here now

	pulls := s.pullsOf(t, never)
	n.apply(t, pod1("again", never, "imagePullPolicy: IfNotPresent"))
	n.await(t, "again", 1)
	if now := s.pullsOf(t, never); now != pulls {
		t.Errorf("IfNotPresent pulled an image that is here")
	}
	n.apply(t, pod1("always", never, "imagePullPolicy: Always"))
	n.await(t, "always", 1)
	n.pulled(t, "always")
}

// waits reports whether a pod's container waits for a reason that begins so.
func (n namespace) waits(t *testing.T, name string, reasons ...string) bool {
	t.Helper()
	pods := n.pods(t, name)
	if len(pods) == 0 || len(pods[0].Status.ContainerStatuses) == 0 {
		return false
	}
	w := pods[0].Status.ContainerStatuses[0].State.Waiting
	for _, reason := range reasons {
		if w != nil && w.Reason == reason {
			return true
		}
	}
	return false
}

// pullsOf is how often the daemon was asked for an image.
func (s *stage) pullsOf(t *testing.T, ref string) int {
	t.Helper()
	count := 0
	for _, p := range s.status(t).Pulls {
		if p.Reference == ref {
			count++
		}
	}
	return count
}

// pulled fails the test unless kubelet says that it pulled a pod's image.
func (n namespace) pulled(t *testing.T, name string) {
	t.Helper()
	eventually(t, patience, "kubelet says that it pulled the image of "+name, func() bool {
		for _, e := range n.events(t, name) {
			if e.Source.Component == "kubelet" && e.Reason == "Pulled" && strings.HasPrefix(e.Message, "Successfully pulled image") {
				return true
			}
		}
		return false
	})
}
