package kube

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// pod is what the tests look at of a pod.
type pod struct {
	Metadata struct{ Namespace, Name, UID string }
	Status   struct {
		Phase      string
		Conditions []condition

		InitContainerStatuses, ContainerStatuses, EphemeralContainerStatuses []containerStatus
	}
}

type condition struct{ Type, Status, Reason, Message string }

type containerStatus struct {
	Name, ContainerID, ImageID string
	RestartCount               int
	State                      struct {
		Running *struct{ StartedAt time.Time }
		Waiting *struct{ Reason, Message string }
	}
}

// condition returns a condition of the pod, the zero value if there is none.
func (p pod) condition(kind string) condition {
	for _, c := range p.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return condition{}
}

func (p pod) ready() bool { return p.condition("Ready").Status == "True" }

// event is what the tests look at of an event.
type event struct {
	InvolvedObject        struct{ Kind, Namespace, Name, UID, FieldPath string }
	Source                struct{ Component string }
	Type, Reason, Message string
	Count                 int
}

// namespace is where the objects of one test are.
type namespace struct {
	*stage
	name string
}

// newNamespace makes a namespace that the end of the test takes away with all
// that is in it.
func (s *stage) newNamespace(t *testing.T) namespace {
	t.Helper()
	n := namespace{s, fmt.Sprintf("t%d", time.Now().UnixNano())}
	object := fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s}\n", n.name)
	must(t, s.API.Apply(t.Context(), "", object))
	t.Cleanup(func() {
		if err := s.API.Delete(context.Background(), "", object); err != nil {
			t.Error(err)
		}
	})
	eventually(t, patience, "the namespace has a service account", func() bool {
		return s.API.Do(t.Context(), http.MethodGet, n.path("serviceaccounts/default"), nil, nil) == nil
	})
	return n
}

// path is that of something in the namespace.
func (n namespace) path(rest string) string { return "/api/v1/namespaces/" + n.name + "/" + rest }

// apply creates or updates objects.
func (n namespace) apply(t *testing.T, text string) {
	t.Helper()
	must(t, n.API.Apply(t.Context(), n.name, text))
}

// pods returns those with the label app=name.
func (n namespace) pods(t *testing.T, name string) []pod {
	t.Helper()
	var list struct{ Items []pod }
	must(t, n.API.Do(t.Context(), http.MethodGet, n.path("pods?labelSelector=app%3D"+name), nil, &list))
	return list.Items
}

// await waits until there are count pods with the label app=name, all ready.
func (n namespace) await(t *testing.T, name string, count int) []pod {
	t.Helper()
	var pods []pod
	eventually(t, patience, fmt.Sprintf("%d pods of %s are ready", count, name), func() bool {
		pods = n.pods(t, name)
		return len(pods) == count && !slices.ContainsFunc(pods, func(p pod) bool { return !p.ready() })
	})
	return pods
}

// remove deletes a pod at once and waits until nothing of it runs.
func (n namespace) remove(t *testing.T, name string) {
	t.Helper()
	must(t, n.API.Do(t.Context(), http.MethodDelete, n.path("pods/"+name+"?gracePeriodSeconds=0"), nil, nil))
	eventually(t, patience, "nothing of the pod runs", func() bool {
		list, err := n.cri.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{
			Filter: &runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}, LabelSelector: map[string]string{"io.kubernetes.pod.namespace": n.name, "io.kubernetes.pod.name": name}},
		})
		return err == nil && len(list.Items) == 0
	})
}

// events returns those of an object.
func (n namespace) events(t *testing.T, object string) []event {
	t.Helper()
	var list struct{ Items []event }
	must(t, n.API.Do(t.Context(), http.MethodGet, n.path("events?fieldSelector=involvedObject.name%3D"+object), nil, &list))
	return list.Items
}

// exec runs a command in a container and returns what it printed.
func (s *stage) exec(t *testing.T, containerID string, command ...string) string {
	t.Helper()
	got, err := s.cri.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
		ContainerId: strings.TrimPrefix(containerID, "containerd://"), Cmd: command, Timeout: 60,
	})
	must(t, err)
	return string(got.Stdout) + string(got.Stderr)
}

// readsRight fails the test unless all files of app:1 are right in a container.
func (s *stage) readsRight(t *testing.T, p pod) {
	t.Helper()
	var want strings.Builder
	for _, name := range slices.Sorted(maps.Keys(s.app.Sums)) {
		fmt.Fprintf(&want, "%s  %s\n", s.app.Sums[name], name)
	}
	if got := s.exec(t, p.Status.ContainerStatuses[0].ContainerID, "/bin/sh", "-c", "sha256sum /data/*"); got != want.String() {
		t.Errorf("in pod %s the files are\n%swant\n%s", p.Metadata.Name, got, want.String())
	}
}

// deployment is one whose pods have the label app=name and one container, with
// further lines of the pod's specification.
func deployment(name, image string, replicas int, spec ...string) string {
	return fmt.Sprintf(`apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s}
spec:
  replicas: %[3]d
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      terminationGracePeriodSeconds: 0
      %[4]s
      containers: [{name: main, image: %[2]q}]
`, name, image, replicas, strings.Join(spec, "\n      "))
}
