package kube

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/kube"
	"sluice/internal/kube/apiserver"
	"sluice/internal/kube/kubetest"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount/control"
	"sluice/test/bed"
)

// TestReporterConformance holds the reporter's cluster to its promises at a real
// API server, with no more rights than the manifest gives, and shows that these
// are no more than it needs.
func TestReporterConformance(t *testing.T) {
	r := newReporting(t, "")
	// This process isn't on the cluster's network.
	relay, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer relay.Close()
	go serveRelay(relay, func() (net.Conn, error) { return r.Dial(context.Background(), "tcp", "10.96.0.1:443") })
	config := filepath.Join(t.TempDir(), "kubeconfig")
	must(t, writeKubeconfig(config, "https://"+relay.Addr().String(), r.token))
	cluster, err := apiserver.Open(config, "a-test")
	must(t, err)
	defer cluster.Close()
	remove := func(ref kube.PodRef) error {
		return r.API.Do(context.Background(), http.MethodDelete, "/api/v1/namespaces/default/pods/"+ref.Name+"?gracePeriodSeconds=0", nil, nil)
	}
	eventually(t, patience, "another test's admission policy is gone", func() bool {
		return cluster.SetNodeLabel(t.Context(), r.node, "kubetest.example/any", nil) == nil && cluster.SetNodeLabel(t.Context(), r.node, "kubetest.example/any", new(string)) == nil
	})
	kubetest.Run(t, kubetest.Bench{
		Cluster: cluster, Node: r.node,
		AddPod: func(t *testing.T, name, initial, ordinary, ephemeral string) kube.PodRef {
			ref := r.makePod(t, "default", name, initial, ordinary, ephemeral)
			t.Cleanup(func() { _ = remove(ref) }) // it may have been removed
			return ref
		},
		RemovePod: func(t *testing.T, ref kube.PodRef) { must(t, remove(ref)) },
		Event:     r.readEvent,
	}, r.name+"-")
	for _, not := range [][2]string{
		{http.MethodGet, r.path("pods")}, {http.MethodGet, r.path("pods/x")}, {http.MethodGet, r.path("events")}, {http.MethodGet, r.path("events/x")},
		{http.MethodDelete, r.path("events/x")}, {http.MethodPut, r.path("pods/x/status")}, {http.MethodPatch, r.path("pods/x")},
		{http.MethodGet, "/api/v1/nodes"}, {http.MethodPut, "/api/v1/nodes/" + r.node}, {http.MethodPatch, "/api/v1/nodes/" + r.node + "/status"},
		{http.MethodDelete, "/api/v1/nodes/" + r.node}, {http.MethodGet, r.path("secrets")}, {http.MethodGet, "/api/v1/namespaces"},
	} {
		var body any
		if not[0] == http.MethodPatch || not[0] == http.MethodPut {
			body = []byte("{}")
		}
		if err := r.api.Do(t.Context(), not[0], not[1], body, nil); !bed.IsKubeCode(err, http.StatusForbidden) {
			t.Errorf("%s %s isn't forbidden: %v", not[0], not[1], err)
		}
	}
}

// TestReporterOutage kills the API server and the reporter while pods start:
// each start is one Event afterwards, and each pod has its condition.
func TestReporterOutage(t *testing.T) {
	r := newReporting(t, "", policy()...)
	defer r.daemon(t)()
	r.report(t)
	eventually(t, patience, "the node has its label", func() bool { return r.label(t) == "true" })
	const pods = 24
	var all []happening.Pod
	for i := range pods {
		all = append(all, r.pod(t, fmt.Sprintf("web-%02d", i)))
	}
	for i, p := range all {
		r.started(p, "setup")
		r.started(p, "main")
		switch i {
		case pods / 4:
			r.Process.Kill()
			r.report(t)
		case pods / 2:
			eventually(t, patience, "some are told", func() bool { return len(r.ours(t)) > 0 })
			r.APIServer.Kill()
		case pods * 3 / 4:
			r.Process.Kill()
			r.report(t)
		}
	}
	time.Sleep(2 * time.Second)
	must(t, r.StartAPIServer(t.Context()))
	eventually(t, patience, "all are told", func() bool { return len(r.ours(t)) >= 2*pods })
	time.Sleep(time.Second) // one more would come now
	seen := map[string]int{}
	for _, e := range r.ours(t) {
		seen[e.InvolvedObject.Name+" "+e.InvolvedObject.FieldPath]++
		if e.Count != 1 || e.Type != "Normal" || e.Message != `Successfully pulled image "r.test/app:1" (streamed) in 412ms: 100 of 2000 bytes` {
			t.Errorf("an event is %+v", e)
		}
	}
	for _, p := range all {
		for _, field := range []string{"spec.initContainers{setup}", "spec.containers{main}"} {
			if n := seen[p.Name+" "+field]; n != 1 {
				t.Errorf("%d events of %s %s, want one", n, p.Name, field)
			}
		}
		if c := r.condition(t, p.Name); c.Status != "False" || c.Reason != "Streamed" {
			t.Errorf("the condition of %s is %+v", p.Name, c)
		}
	}
	usage(t, "after an outage", r.Pid())
}

// TestReporterRefused has a policy that doesn't let the condition be: that's told
// once, and Events go on.
func TestReporterRefused(t *testing.T) {
	r := newReporting(t, "", policy()...)
	defer r.daemon(t)()
	refusal := fmt.Sprintf(`apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: %[1]s}
spec:
  failurePolicy: Fail
  matchConstraints:
    namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[1]s}}
    resourceRules: [{apiGroups: [""], apiVersions: [v1], operations: [UPDATE], resources: [pods/status]}]
  validations:
  - expression: "!has(object.status.conditions) || !object.status.conditions.exists(c, c.type == 'UpgradeIfStreamableDisabled')"
    message: we like no such conditions
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: %[1]s}
spec: {policyName: %[1]s, validationActions: [Deny]}
`, r.name)
	must(t, r.API.Apply(t.Context(), "", refusal))
	defer func() { must(t, r.API.Delete(context.Background(), "", refusal)) }()
	probe := r.pod(t, "probe")
	eventually(t, patience, "the policy holds", func() bool {
		err := r.API.Patch(t.Context(), r.path("pods/"+probe.Name+"/status"), map[string]any{
			"status": map[string]any{"conditions": []any{map[string]any{"type": kube.ConditionType, "status": "True"}}},
		})
		return bed.IsKubeCode(err, http.StatusUnprocessableEntity) || bed.IsKubeCode(err, http.StatusForbidden)
	})
	r.report(t)
	const pods = 5
	for i := range pods {
		p := r.pod(t, fmt.Sprint("web-", i))
		r.started(p, "main")
	}
	eventually(t, patience, "all are told", func() bool { return len(r.ours(t)) == pods })
	for _, e := range r.ours(t) {
		if e.InvolvedObject.FieldPath != "spec.containers{main}" || e.Reason != "Pulled" {
			t.Errorf("an event is %+v", e)
		}
	}
	if n := r.told(t, "a pod doesn't get its condition"); n != 1 || r.told(t, "we like no such conditions") != 1 {
		t.Errorf("it's told %d times that conditions are refused, want once, with the policy's words", n)
	}
}

// TestReporterPods has real pods say what they are told: by kubelet's and
// containerd's real starts, beside kubelet's own events and conditions.
func TestReporterPods(t *testing.T) {
	r := newReporting(t, bed.ClusterNode, policy()...)
	r.socket = bed.ControlSocket
	for i, name := range []string{"reported:1", "plain/reported:1"} { // with no layers in common
		box, err := bed.NewToolbox(t.Context(), filepath.Join(r.Work, fmt.Sprint(r.name, i)), uint64(77+i), 2_000_000)
		must(t, err)
		must(t, r.Push(t.Context(), box.Layout, name))
	}
	must(t, r.Convert(t.Context(), r.Stage.Ref("reported:1")))
	r.report(t)
	eventually(t, patience, "the node has its label", func() bool { return r.label(t) == "true" })
	image, plain := r.ref("reported:1"), r.ref("plain/reported:1")
	r.apply(t, pod1("streamed", image)+fmt.Sprintf("  initContainers: [{name: setup, image: %q, command: [/bin/sh, -c, exit 0]}]\n", image))
	r.await(t, "streamed", 1)
	r.apply(t, pod1("ordinary", plain))
	r.await(t, "ordinary", 1)
	for _, want := range []struct{ pod, field, kind, reason, message string }{
		{"streamed", "", "Normal", "Pulling", `Pulling image "` + image + `" with artifact streaming`},
		{"streamed", "spec.initContainers{setup}", "Normal", "Pulled", `Successfully pulled image "` + image + `" (streamed) in `},
		{"streamed", "spec.containers{main}", "Normal", "Pulled", `Image "` + image + `" is on this node already (streamed): `},
		{"ordinary", "spec.containers{main}", "Warning", "NotStreamed", `Image "` + plain + `" was not streamed: NoStreamingArtifact: `},
	} {
		eventually(t, patience, fmt.Sprintf("pod %s has the event %q", want.pod, want.message), func() bool {
			return slices.ContainsFunc(r.ours(t), func(e event) bool {
				return e.InvolvedObject.Name == want.pod && e.InvolvedObject.FieldPath == want.field && e.Type == want.kind &&
					e.Reason == want.reason && strings.HasPrefix(e.Message, want.message)
			})
		})
	}
	if n := len(r.ours(t)); n != 4 {
		t.Errorf("there are %d events, want 4", n)
	}
	for name, want := range map[string]condition{
		"streamed": {Status: "False", Reason: "Streamed"}, "ordinary": {Status: "True", Reason: "NoStreamingArtifact"},
	} {
		if c := r.condition(t, name); c.Status != want.Status || c.Reason != want.Reason {
			t.Errorf("the condition of pod %s is %+v", name, c)
		}
	}
	usage(t, "of a node with pods", r.Pid())
}

// TestReporterNode follows the node's labels and the daemon, and measures what a
// reporter that has nothing to do takes.
func TestReporterNode(t *testing.T) {
	r := newReporting(t, "", policy()...)
	stop := r.daemon(t)
	r.report(t)
	eventually(t, patience, "the node has its label", func() bool { return r.label(t) == "true" })
	optOut := func(value any) {
		t.Helper()
		must(t, r.API.Patch(t.Context(), "/api/v1/nodes/"+r.node, map[string]any{
			"metadata": map[string]any{"labels": map[string]any{kube.DefaultOptOutLabel: value}},
		}))
	}
	client := control.NewClient(r.socket)
	off := func() bool {
		st, err := client.Status(t.Context())
		must(t, err)
		return st.Switch.Off
	}
	optOut("false")
	eventually(t, patience, "the daemon is told, and the label gone", func() bool { return off() && r.label(t) == "" })
	stop()
	stop = r.daemon(t) // comes up streaming
	eventually(t, patience, "the next daemon is told", off)
	optOut(nil)
	eventually(t, patience, "the node streams again", func() bool { return !off() && r.label(t) == "true" })
	r.Process.Stop()
	if r.label(t) != "true" {
		t.Error("a reporter that ended took the label with it")
	}
	r.report(t)
	time.Sleep(2 * time.Second)
	usage(t, "idle", r.Pid())
	must(t, r.Run(t.Context(), filepath.Join(r.Work, "sluice-reporter"), "unlabel", "--node", r.node, "--kubeconfig", r.config))
	eventually(t, patience, "a label that was taken away is given again", func() bool { return r.label(t) == "true" })
	stop()
}
