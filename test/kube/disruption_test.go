package kube

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestDaemonUpgrade ends the node daemon under running pods, as an upgrade does:
// they run and read on, none is restarted, and new ones start afterwards.
func TestDaemonUpgrade(t *testing.T) {
	s := theStage(t)
	n := s.newNamespace(t)
	n.apply(t, deployment("web", s.ref("app:1"), 2))
	before := n.await(t, "web", 2)
	s.Cluster.Sluice.Stop()
	must(t, s.StartSluice(t.Context()))
	for _, p := range before {
		s.readsRight(t, p)
	}
	s.Cluster.Sluice.Kill()
	must(t, s.StartSluice(t.Context()))
	n.apply(t, deployment("web", s.ref("app:1"), 3))
	unharmed(t, before, n.await(t, "web", 3))
	for _, p := range before {
		s.readsRight(t, p)
	}
}

// TestKubeletRestart ends kubelet under running pods: the next one finds them.
func TestKubeletRestart(t *testing.T) {
	s := theStage(t)
	n := s.newNamespace(t)
	n.apply(t, deployment("web", s.ref("app:1"), 2))
	before := n.await(t, "web", 2)
	s.Kubelet.Kill()
	must(t, s.StartKubelet(t.Context()))
	n.apply(t, deployment("web", s.ref("app:1"), 3))
	unharmed(t, before, n.await(t, "web", 3))
	for _, p := range before {
		s.readsRight(t, p)
	}
}

// unharmed fails the test unless all pods of before are among those after, with
// the same containers.
func unharmed(t *testing.T, before, after []pod) {
	t.Helper()
	containers := map[string]bool{}
	for _, p := range after {
		containers[p.Status.ContainerStatuses[0].ContainerID] = true
	}
	for _, p := range before {
		if c := p.Status.ContainerStatuses[0]; !containers[c.ContainerID] {
			t.Errorf("pod %s lost its container %s", p.Metadata.Name, c.ContainerID)
		}
	}
}

// TestDrain drains the node as `kubectl drain` does, and lets pods come back.
func TestDrain(t *testing.T) {
	s := theStage(t)
	n := s.newNamespace(t)
	n.apply(t, deployment("web", s.ref("app:1"), 3))
	before := n.await(t, "web", 3)
	node := "/api/v1/nodes/node-1"
	must(t, n.API.Patch(t.Context(), node, map[string]any{"spec": map[string]any{"unschedulable": true}}))
	defer func() {
		must(t, n.API.Patch(t.Context(), node, map[string]any{"spec": map[string]any{"unschedulable": nil}}))
	}()
	for _, p := range before {
		must(t, n.API.Do(t.Context(), http.MethodPost, n.path("pods/"+p.Metadata.Name+"/eviction"),
			fmt.Appendf(nil, `{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": %q}}`, p.Metadata.Name), nil))
	}
	eventually(t, patience, "the evicted pods are gone", func() bool {
		for _, p := range n.pods(t, "web") {
			for _, old := range before {
				if p.Metadata.UID == old.Metadata.UID {
					return false
				}
			}
		}
		return true
	})
	must(t, n.API.Patch(t.Context(), node, map[string]any{"spec": map[string]any{"unschedulable": nil}}))
	for _, p := range n.await(t, "web", 3) {
		s.readsRight(t, p)
	}
}

// TestRegistryOutage cuts the registry off while a pod reads what isn't here
// yet; the pod recovers when the registry is back, whether it was pulling or
// reading.
func TestRegistryOutage(t *testing.T) {
	s := theStage(t)
	n := s.newNamespace(t)
	must(t, s.Push(t.Context(), s.late.Layout, "late:1"))
	must(t, s.Convert(t.Context(), s.Stage.Ref("late:1")))
	s.cut(t)
	n.apply(t, pod1("late", s.ref("late:1"), `command: [/bin/sh, -c, "sha256sum /data/0; sleep 100000"]`))
	eventually(t, patience, "the pull fails", func() bool {
		pods := n.pods(t, "late")
		if len(pods) == 0 || len(pods[0].Status.ContainerStatuses) == 0 {
			return false
		}
		w := pods[0].Status.ContainerStatuses[0].State.Waiting
		return w != nil && (w.Reason == "ErrImagePull" || w.Reason == "ImagePullBackOff")
	})
	s.connect(t)
	n.await(t, "late", 1)
	eventually(t, patience, "the container has read its file", func() bool {
		var log string
		must(t, n.API.Do(t.Context(), http.MethodGet, n.path("pods/late/log"), nil, &log))
		return log == s.late.Sums["/data/0"]+"  /data/0\n"
	})
	s.streams(t, s.ref("late:1"))

	// Now while a container reads.
	n.apply(t, pod1("reader", s.newToolbox(t, "slow:1", 12, 30_000_000), `command: [/bin/sh, -c, "sha256sum /data/0 && echo read; sleep 100000"]`))
	n.await(t, "reader", 1)
	s.cut(t)
	time.Sleep(2 * time.Second)
	s.connect(t)
	eventually(t, patience, "the container has read on", func() bool {
		var log string
		must(t, n.API.Do(t.Context(), http.MethodGet, n.path("pods/reader/log"), nil, &log))
		return strings.HasSuffix(log, "\nread\n")
	})
}

// cut closes the link to the registry, until connect or the end of the test.
func (s *stage) cut(t *testing.T) {
	t.Helper()
	must(t, s.link.Close())
	s.link = nil
	t.Cleanup(func() {
		if s.link == nil {
			s.connect(t)
		}
	})
}

// connect serves the registry again after its link was closed, to later tests
// as well.
func (s *stage) connect(t *testing.T) {
	t.Helper()
	link, _, err := s.Serve(context.Background(), "registry.test", s.Registry.Addr, linkRate, linkRTT)
	must(t, err)
	s.link = link
}
