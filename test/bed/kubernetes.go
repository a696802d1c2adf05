package bed

import (
	"context"
	"path/filepath"
)

// KubernetesTools are the programs of a cluster.
type KubernetesTools struct {
	Dir  string // holds kube-apiserver, kube-controller-manager, kube-scheduler and kubelet
	Etcd string
	CNI  string // directory of the network plugins
}

// kubernetesVersion is what test/tools/kubernetes pins. A binary that Go builds
// from a module doesn't know its version, so it is told.
const kubernetesVersion = "v1.36.3"

var kubernetesTool = tool{
	module: "kubernetes",
	packages: []string{
		"k8s.io/kubernetes/cmd/kube-apiserver",
		"k8s.io/kubernetes/cmd/kube-controller-manager",
		"k8s.io/kubernetes/cmd/kube-scheduler",
		"k8s.io/kubernetes/cmd/kubelet",
	},
	env: []string{"CGO_ENABLED=0"},
	flags: []string{"-ldflags=-s -w" +
		" -X k8s.io/component-base/version.gitVersion=" + kubernetesVersion +
		" -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36"},
}

var etcdTool = tool{
	module:   "etcd",
	packages: []string{"go.etcd.io/etcd/server/v3"},
	env:      []string{"CGO_ENABLED=0"},
}

// BuildKubernetes returns the programs of a cluster, built from their modules
// unless they are cached: about ten minutes of one core. src is the checkout of
// Sluice; say tells a person what takes long.
func BuildKubernetes(ctx context.Context, src string, say func(string)) (KubernetesTools, error) {
	if err := Install(ctx, "containernetworking-plugins"); err != nil {
		return KubernetesTools{}, err
	}
	etcd, err := etcdTool.build(ctx, src, say)
	if err != nil {
		return KubernetesTools{}, err
	}
	dir, err := kubernetesTool.build(ctx, src, say)
	return KubernetesTools{Dir: dir, Etcd: filepath.Join(etcd, "server"), CNI: "/usr/lib/cni"}, err
}
