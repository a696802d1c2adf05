package kube

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"sluice/test/bed"
)

// manifest returns one of deploy/manifests, of objects of these kinds, or of all
// if there are none.
func (s *stage) manifest(t *testing.T, name string, kinds ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(s.Src, "deploy/manifests", name))
	must(t, err)
	var some []string
	for doc := range strings.SplitSeq(string(text), "\n---\n") {
		var o struct{ Kind string }
		must(t, yaml.Unmarshal([]byte(doc), &o))
		if len(kinds) == 0 || slices.Contains(kinds, o.Kind) {
			some = append(some, doc)
		}
	}
	return strings.Join(some, "\n---\n")
}

// applyFor applies objects until the end of the test. Namespaces stay: while one
// goes away nothing can be made in the next of its name.
func (s *stage) applyFor(t *testing.T, text string) {
	t.Helper()
	must(t, s.API.Apply(t.Context(), "default", text))
	if strings.Contains(text, "kind: Namespace\n") {
		return
	}
	t.Cleanup(func() {
		if err := s.API.Delete(context.Background(), "default", text); err != nil {
			t.Error(err)
		}
	})
}

// TestManifestsAreValid has the API server judge every plain manifest, and the
// pods that would come of it.
func TestManifestsAreValid(t *testing.T) {
	s := theStage(t)
	for _, name := range []string{"sluice-node.yaml", "registry-pvc.yaml"} {
		s.applyFor(t, s.manifest(t, name, "Namespace"))
		s.applyFor(t, s.manifest(t, name, "ServiceAccount"))
	}
	for _, name := range []string{"sluice-node.yaml", "uninstall.yaml", "registry-pvc.yaml", "registry-objectstore.yaml"} {
		text := s.manifest(t, name)
		if err := s.API.Check(t.Context(), "default", text); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		pods := 0
		for d := yaml.NewDecoder(strings.NewReader(text)); ; {
			var o struct {
				Kind     string
				Metadata struct{ Name, Namespace string }
				Spec     struct {
					Template struct{ Spec map[string]any }
				}
			}
			if d.Decode(&o) != nil {
				break
			}
			if o.Kind != "DaemonSet" && o.Kind != "Deployment" {
				continue
			}
			pods++
			p := map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": o.Metadata.Name}, "spec": o.Spec.Template.Spec}
			err := s.API.Do(t.Context(), http.MethodPost, "/api/v1/namespaces/"+o.Metadata.Namespace+"/pods?dryRun=All&fieldValidation=Strict", p, nil)
			if err != nil {
				t.Errorf("%s: the pods of %s: %v", name, o.Metadata.Name, err)
			}
		}
		if pods == 0 {
			t.Errorf("%s has no pods", name)
		}
	}
	h, err := bed.NewHelm(t.Context(), s.Src, func(text string) { t.Log(text) })
	must(t, err)
	for what, set := range map[string]string{ // what no plain manifest has
		"around the registry": "registry.enabled=true,registry.existingSecret=s,registry.ingress.enabled=true,registry.ingress.host=r.example.com,registry.ingress.tlsSecret=t," +
			"registry.networkPolicy.enabled=true,registry.metrics.enabled=true,registry.networkPolicy.metricsFrom[0].podSelector.matchLabels.app=p," +
			"registry.service.type=NodePort,registry.service.nodePort=30500,registry.tls.existingSecret=t",
		"Azure": "registry.enabled=true,registry.replicas=2,registry.storage.kind=azure,registry.storage.azure.container=images,registry.config=[soft_delete]," +
			"registry.secrets.adminPassword=p,registry.secrets.azureConnectionString=c,registry.secrets.databaseURL=postgres://u:p@h/d",
		"nodes": "imagePullSecrets={a,b},node.registries={r.example.com},node.extraArgs={--no-fill},node.nodeSelector.a=b,node.maxUnavailable=1,node.podAnnotations.a=b,node.podLabels.c=d",
	} {
		text, err := h.Render(t.Context(), "--namespace", "sluice", "--set", "image.repository=r.example.com/sluice,"+set)
		must(t, err)
		if err := s.API.Check(t.Context(), "default", string(text)); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// asReporter returns the API server as the reporter of a node sees it.
func (s *stage) asReporter(t *testing.T, node string) *bed.KubeAPI {
	t.Helper()
	return s.API.As(s.reporterToken(t, node))
}

// reporterToken returns the token of a reporter's pod on a node. Without a node
// the token is of no pod.
func (s *stage) reporterToken(t *testing.T, node string) string {
	t.Helper()
	spec := map[string]any{}
	if node != "" {
		name := "reporter-of-" + node
		s.applyFor(t, boundPod("sluice", name, node, s.ref("app:1"))+"  serviceAccountName: sluice-reporter\n")
		var p pod
		must(t, s.API.Do(t.Context(), http.MethodGet, "/api/v1/namespaces/sluice/pods/"+name, nil, &p))
		spec["boundObjectRef"] = map[string]any{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": p.Metadata.UID}
	}
	var answer struct{ Status struct{ Token string } }
	must(t, s.API.Do(t.Context(), http.MethodPost, "/api/v1/namespaces/sluice/serviceaccounts/sluice-reporter/token",
		map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}, &answer))
	return answer.Status.Token
}

// boundPod is a pod that needs no scheduler.
func boundPod(namespace, name, node, image string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {a: b}}
spec:
  terminationGracePeriodSeconds: 0
  nodeName: %s
  containers: [{name: main, image: %q}]
`, name, namespace, node, image)
}

// TestReporterMayWriteWhatIsItsOwn holds the role and the admission policy of
// sluice-node.yaml: a reporter may say what it has to say of its own node and
// the pods there, and nothing else.
func TestReporterMayWriteWhatIsItsOwn(t *testing.T) {
	s := theStage(t)
	s.applyFor(t, s.manifest(t, "sluice-node.yaml", "Namespace"))
	s.applyFor(t, s.manifest(t, "sluice-node.yaml", "ServiceAccount", "ClusterRole", "ClusterRoleBinding",
		"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"))
	s.applyFor(t, "apiVersion: v1\nkind: Node\nmetadata: {name: node-2, labels: {a: b}}\n")
	n := s.newNamespace(t)
	n.apply(t, boundPod(n.name, "here", bed.ClusterNode, s.ref("app:1")))
	n.apply(t, boundPod(n.name, "there", "node-2", s.ref("app:1")))
	n.await1(t, "here")
	own, free := s.asReporter(t, bed.ClusterNode), s.asReporter(t, "")

	label := artifactLabel
	labels := func(key string) map[string]any {
		return map[string]any{"metadata": map[string]any{"labels": map[string]any{key: "true"}}}
	}
	type try struct {
		what string
		as   *bed.KubeAPI
		do   func(*bed.KubeAPI) error
		told string // part of the refusal; "": it's allowed
	}
	patch := func(path string, body any) func(*bed.KubeAPI) error {
		return func(k *bed.KubeAPI) error { return k.Patch(t.Context(), path, body) }
	}
	condition := func(pod, kind string) func(*bed.KubeAPI) error {
		return func(k *bed.KubeAPI) error {
			var now struct{ Status struct{ Conditions []any } }
			must(t, s.API.Do(t.Context(), http.MethodGet, n.path("pods/"+pod), nil, &now))
			all := append(now.Status.Conditions, map[string]any{"type": kind, "status": "True", "reason": "NoStreamingArtifact"})
			return k.Patch(t.Context(), n.path("pods/"+pod+"/status"), map[string]any{"status": map[string]any{"conditions": all}})
		}
	}
	event := func(name, component, host, kind string) func(*bed.KubeAPI) error {
		return func(k *bed.KubeAPI) error {
			return k.Do(t.Context(), http.MethodPost, n.path("events"), map[string]any{
				"apiVersion": "v1", "kind": "Event", "metadata": map[string]any{"name": name}, "reason": "Pulled", "type": "Normal", "message": "m",
				"involvedObject": map[string]any{"kind": kind, "namespace": n.name, "name": "here"},
				"source":         map[string]any{"component": component, "host": host},
			}, nil)
		}
	}
	node, other := "/api/v1/nodes/"+bed.ClusterNode, "/api/v1/nodes/node-2"
	must(t, event("alien", "kubelet", bed.ClusterNode, "Pod")(s.API))
	tries := []try{
		{"its label", own, patch(node, labels(label)), ""},
		{"its label, taken away", own, patch(node, map[string]any{"metadata": map[string]any{"labels": map[string]any{label: nil}}}), ""},
		{"another label", own, patch(node, labels("node-role.kubernetes.io/control-plane")), "no other"},
		{"another label, taken away", own, patch(node, map[string]any{"metadata": map[string]any{"labels": map[string]any{"kubernetes.io/os": nil}}}), "no other"},
		{"an annotation of its node", own, patch(node, map[string]any{"metadata": map[string]any{"annotations": map[string]any{"a": "b"}}}), "annotations"},
		{"a taint", own, patch(node, map[string]any{"spec": map[string]any{"unschedulable": true}}), "spec"},
		{"the label of another node", own, patch(other, labels(label)), "no other node"},
		{"the status of its node", own, patch(node+"/status", map[string]any{"status": map[string]any{"phase": "x"}}), "forbidden"},
		{"a look at a pod", own, patch(n.path("pods/here/status"), map[string]any{}), ""},
		{"its condition", own, condition("here", "UpgradeIfStreamableDisabled"), ""},
		{"another condition", own, condition("here", "example.com/mine"), "no other"},
		{"its condition on a pod of another node", own, condition("there", "UpgradeIfStreamableDisabled"), "other nodes"},
		{"a pod's phase", own, patch(n.path("pods/here/status"), map[string]any{"status": map[string]any{"reason": "Evicted"}}), "nothing else"},
		{"a pod's label", own, patch(n.path("pods/here/status"), map[string]any{"metadata": map[string]any{"labels": map[string]any{"a": "c"}}}), "labels"},
		{"a pod", own, patch(n.path("pods/here"), labels("a")), "forbidden"},
		{"to read a pod", own, func(k *bed.KubeAPI) error { return k.Do(t.Context(), http.MethodGet, n.path("pods/here"), nil, nil) }, "forbidden"},
		{"secrets", own, func(k *bed.KubeAPI) error { return k.Do(t.Context(), http.MethodGet, n.path("secrets"), nil, nil) }, "forbidden"},
		{"to read nodes", own, func(k *bed.KubeAPI) error { return k.Do(t.Context(), http.MethodGet, node, nil, nil) }, ""},
		{"an event", own, event("e1", "sluice", bed.ClusterNode, "Pod"), ""},
		{"an event again", own, patch(n.path("events/e1"), map[string]any{"count": 2}), ""},
		{"an event of kubelet", own, event("e2", "kubelet", bed.ClusterNode, "Pod"), "component sluice"},
		{"an event of another node", own, event("e3", "sluice", "node-2", "Pod"), "component sluice"},
		{"an event on something else", own, event("e4", "sluice", bed.ClusterNode, "Service"), "on pods"},
		{"somebody else's event", own, patch(n.path("events/alien"), map[string]any{"source": map[string]any{"component": "sluice"}}), "component sluice"},
		{"its label, without a node", free, patch(node, labels(label)), "bound to a node"},
	}
	// A policy is in force some time after it was made.
	eventually(t, patience, "the policy is in force", func() bool {
		return bed.IsKubeCode(free.Patch(t.Context(), node, labels(label)), http.StatusUnprocessableEntity)
	})
	for _, try := range tries {
		err := try.do(try.as)
		if try.told == "" && err != nil {
			t.Errorf("%s is refused: %v", try.what, err)
		} else if try.told != "" && (err == nil || !strings.Contains(err.Error(), try.told)) {
			t.Errorf("%s isn't refused with %q: %v", try.what, try.told, err)
		}
	}
	var policy struct {
		Status struct {
			ObservedGeneration int
			TypeChecking       struct {
				ExpressionWarnings []struct{ FieldRef, Warning string }
			}
		}
	}
	eventually(t, patience, "the policy's types are checked", func() bool {
		must(t, s.API.Do(t.Context(), http.MethodGet, "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/sluice-reporter", nil, &policy))
		return policy.Status.ObservedGeneration > 0
	})
	for _, w := range policy.Status.TypeChecking.ExpressionWarnings {
		t.Errorf("the API server warns of %s: %s", w.FieldRef, w.Warning)
	}
}

// await1 waits until a pod is ready.
func (n namespace) await1(t *testing.T, name string) {
	t.Helper()
	eventually(t, patience, name+" is ready", func() bool {
		var p pod
		return n.API.Do(t.Context(), http.MethodGet, n.path("pods/"+name), nil, &p) == nil && p.ready()
	})
}
