package kubemem_test

import (
	"fmt"
	"testing"

	"sluice/internal/kube"
	"sluice/internal/kube/kubemem"
	"sluice/internal/kube/kubetest"
)

func TestCluster(t *testing.T) {
	var c kubemem.Cluster
	c.AddNode("node-a", nil)
	made := 0
	kubetest.Run(t, kubetest.Bench{
		Cluster: &c, Node: "node-a",
		AddPod: func(_ *testing.T, name, initial, ordinary, ephemeral string) kube.PodRef {
			made++
			ref := kube.PodRef{Namespace: "default", Name: name, UID: fmt.Sprint("uid-", made)}
			c.AddPod(ref, map[string]string{
				initial: "spec.initContainers{" + initial + "}", ordinary: "spec.containers{" + ordinary + "}",
				ephemeral: "spec.ephemeralContainers{" + ephemeral + "}",
			})
			return ref
		},
		RemovePod: func(_ *testing.T, ref kube.PodRef) { c.RemovePod(ref) },
		Event: func(t *testing.T, namespace, name string) (kube.Event, kube.Repeat) {
			e, ok := c.Events()[namespace+"/"+name]
			if !ok {
				t.Fatalf("there's no event %s", name)
			}
			return e.Event, e.Repeat
		},
	}, "")
}
