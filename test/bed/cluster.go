package bed

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// ClusterConfig says what a cluster is made of.
type ClusterConfig struct {
	Src        string // the checkout
	Dir        string // of its files and logs; must not lie on overlayfs, and be short
	Tools      Tools
	Kubernetes KubernetesTools
	// Sluice is the program whose node daemon containerd and kubelet use; empty:
	// the node is an ordinary one, with overlayfs and a containerd that imports
	// /etc/containerd/conf.d/*.toml.
	Sluice    string
	NodeFlags []string // further ones of `sluice node`
	// Sandbox is the image of pods' own container, as the node names it.
	Sandbox string
	// Kubelet is further configuration of kubelet, as lines of YAML.
	Kubelet string
	// CredentialProvider is a program, a script, that kubelet asks for
	// credentials of the registry ProviderRegistry, with a token of the pod's
	// service account for that audience; empty: there's none.
	CredentialProvider, ProviderRegistry string
}

// Cluster is a real Kubernetes with one node, on a Host: etcd, API server,
// controller manager, scheduler, kubelet and containerd, with RBAC and service
// accounts as clusters have them. Kubernetes' programs and containerd use their
// usual paths on the host. There is no DNS and no kube-proxy: of services only
// the API server's own works.
type Cluster struct {
	*Host
	API *KubeAPI // as an administrator

	Etcd, APIServer, Controllers, Scheduler, Kubelet *Process
	Containerd, Sluice                               *Process

	config  ClusterConfig
	tokens  map[string]string // by user
	mu      sync.Mutex
	names   map[string]string // guarded by mu: addresses of what Serve serves
	cgroups []string
}

// ClusterNode is the name of a cluster's node.
const ClusterNode = "node-1"

// StartCluster starts a cluster, and returns when its node is ready: some ten
// seconds later. What there is of it is returned along with an error, unless
// it's nil.
func StartCluster(ctx context.Context, config ClusterConfig) (*Cluster, error) {
	h, err := StartHost(ctx, config.Src, config.Dir, ClusterNode)
	if err != nil {
		return nil, err
	}
	c := &Cluster{Host: h, config: config, tokens: map[string]string{}, names: map[string]string{}}
	if err := c.writeFiles(); err != nil {
		return c, err
	}
	if err := h.Run(ctx, "ip", "addr", "add", serviceIP+"/32", "dev", "node0"); err != nil {
		return c, err
	}
	c.API = newKubeAPI(h, "https://"+serviceIP, c.tokens[admin])
	node := make(chan error, 1)
	go func() { // received below
		var err error
		if config.Sluice != "" {
			err = c.StartSluice(ctx)
		}
		if err == nil {
			err = c.StartContainerd(ctx)
		}
		node <- err
	}()
	err = c.startControlPlane(ctx)
	if err := errors.Join(err, <-node); err != nil {
		return c, err
	}
	if err := c.StartKubelet(ctx); err != nil {
		return c, err
	}
	return c, c.Kubelet.Await(ctx, func() bool { return c.ready(ctx) })
}

// startControlPlane starts what a cluster has besides nodes.
func (c *Cluster) startControlPlane(ctx context.Context) (err error) {
	if c.Etcd, err = c.Start("etcd", nil, c.config.Kubernetes.Etcd, "--data-dir", "/var/lib/etcd", "--unsafe-no-fsync",
		"--log-level=warn", "--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380"); err != nil {
		return err
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return err
	}
	if c.Controllers, err = c.kubernetes("kube-controller-manager", "--kubeconfig", kubeconfig(controllers), "--leader-elect=false",
		"--use-service-account-credentials", "--service-account-private-key-file", serviceAccountKey,
		"--root-ca-file", apiServerCert, "--cluster-cidr", podSubnet); err != nil {
		return err
	}
	c.Scheduler, err = c.kubernetes("kube-scheduler", "--kubeconfig", kubeconfig(scheduler), "--leader-elect=false")
	return err
}

// kubernetes starts one of the programs.
func (c *Cluster) kubernetes(name string, args ...string) (*Process, error) {
	return c.Start(name, nil, filepath.Join(c.config.Kubernetes.Dir, name), args...)
}

// StartAPIServer starts the API server, again after it was killed. (Kill it, as
// stopping takes it a minute.)
func (c *Cluster) StartAPIServer(ctx context.Context) (err error) {
	// It listens at the address of its own service, which stands in for kube-proxy.
	c.APIServer, err = c.kubernetes("kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--allow-privileged",
		"--secure-port=443", "--advertise-address", hostIP, "--cert-dir", filepath.Dir(apiServerCert),
		"--service-cluster-ip-range", serviceSubnet, "--token-auth-file", tokensFile,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file", serviceAccountKey,
		"--service-account-signing-key-file", serviceAccountKey, "--kubelet-preferred-address-types=InternalIP")
	if err != nil {
		return err
	}
	return c.APIServer.Await(ctx, func() bool {
		return c.API.Do(ctx, http.MethodGet, "/readyz", nil, nil) == nil
	})
}

// StartSluice starts the node daemon, again after it was stopped or killed.
func (c *Cluster) StartSluice(ctx context.Context) (err error) {
	args := append([]string{"node", "--cri-socket", containerdSocket}, c.config.NodeFlags...)
	if c.Sluice, err = c.Start("sluice", nil, c.config.Sluice, args...); err != nil {
		return err
	}
	return c.Sluice.AwaitSocket(ctx, "unix", c.Path(ControlSocket))
}

// ControlSocket is where the node daemon's control socket is on the host.
const ControlSocket = "/run/sluice/control.sock"

// StartContainerd starts containerd, again after it was stopped or killed.
func (c *Cluster) StartContainerd(ctx context.Context) (err error) {
	env := []string{"PATH=" + c.config.Tools.ContainerdDir + ":" + filepath.Dir(c.config.Tools.Runc) + ":" + os.Getenv("PATH")}
	if c.Containerd, err = c.Start("containerd", env, c.config.Tools.Containerd()); err != nil {
		return err
	}
	return c.Containerd.AwaitSocket(ctx, "unix", c.Path(containerdSocket))
}

// StartKubelet starts kubelet, again after it was stopped or killed.
func (c *Cluster) StartKubelet(ctx context.Context) (err error) {
	args := []string{"--config", kubeletConfig, "--config-dir", KubeletDropIns, "--kubeconfig", kubeconfig(kubelet),
		"--hostname-override", ClusterNode, "--node-ip", hostIP, "--v=2"}
	if c.config.CredentialProvider != "" {
		args = append(args, "--image-credential-provider-config", providersConfig, "--image-credential-provider-bin-dir", providersDir)
	}
	c.Kubelet, err = c.kubernetes("kubelet", args...)
	return err
}

// ready reports whether a pod could be started.
func (c *Cluster) ready(ctx context.Context) bool {
	var node struct {
		Spec   struct{ Taints []struct{ Key string } }
		Status struct {
			Conditions []struct{ Type, Status string }
		}
	}
	if c.API.Do(ctx, http.MethodGet, "/api/v1/nodes/"+ClusterNode, nil, &node) != nil || len(node.Spec.Taints) > 0 {
		return false
	}
	for _, condition := range node.Status.Conditions {
		if condition.Type == "Ready" {
			return condition.Status == "True" &&
				c.API.Do(ctx, http.MethodGet, "/api/v1/namespaces/default/serviceaccounts/default", nil, nil) == nil
		}
	}
	return false
}

// Serve makes a registry of this machine, at target, reachable from the node
// over a link, and returns how the node names it, as HOST:PORT: without TLS, as
// its hosts.toml says. Close the link to cut it off; serving the same name anew
// connects it again.
func (c *Cluster) Serve(ctx context.Context, name, target string, rate float64, rtt time.Duration) (*Link, string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	registry := name + ":5000"
	if c.names[name] == "" {
		ip := fmt.Sprintf("10.77.0.%d", 10+len(c.names))
		const script = `ip addr add "$1/24" dev node0; echo "$1 $2" >>/etc/hosts; mkdir -p "/etc/containerd/certs.d/$3"; echo "server = \"http://$3\"" >"/etc/containerd/certs.d/$3/hosts.toml"`
		if err := c.Run(ctx, "sh", "-euc", script, "sh", ip, name, registry); err != nil {
			return nil, "", err
		}
		c.names[name] = ip
	}
	ln, err := c.Listen(c.names[name] + ":5000")
	if err != nil {
		return nil, "", err
	}
	return NewLinkAt(ctx, ln, target, rate, rtt), registry, nil
}

// Diagnosis is what people want to see of a cluster when a test has failed:
// what its pods and events are, and what its programs said last.
func (c *Cluster) Diagnosis(ctx context.Context) string {
	var out strings.Builder
	var pods struct {
		Items []struct {
			Metadata struct{ Namespace, Name string }
			Status   any
		}
	}
	if err := c.API.Do(ctx, http.MethodGet, "/api/v1/pods", nil, &pods); err != nil {
		fmt.Fprintln(&out, err)
	}
	for _, p := range pods.Items {
		fmt.Fprintf(&out, "pod %s/%s: %v\n", p.Metadata.Namespace, p.Metadata.Name, p.Status)
	}
	var events struct {
		Items []struct {
			InvolvedObject        struct{ Kind, Namespace, Name string }
			Type, Reason, Message string
		}
	}
	if err := c.API.Do(ctx, http.MethodGet, "/api/v1/events", nil, &events); err != nil {
		fmt.Fprintln(&out, err)
	}
	for _, e := range events.Items {
		fmt.Fprintf(&out, "event of %s %s/%s: %s %s: %s\n", e.InvolvedObject.Kind, e.InvolvedObject.Namespace, e.InvolvedObject.Name, e.Type, e.Reason, e.Message)
	}
	for _, p := range []*Process{c.Etcd, c.APIServer, c.Controllers, c.Scheduler, c.Kubelet, c.Containerd, c.Sluice} {
		if p != nil {
			fmt.Fprintf(&out, "\n%s, ended: %t, its last words:\n%s\n", p.Name, p.Ended(), p.lastWords())
		}
	}
	return out.String()
}

// Stop ends the cluster and all that runs on its node; its files stay.
func (c *Cluster) Stop() error {
	if c.API != nil {
		c.API.client.CloseIdleConnections()
	}
	c.Host.Stop()
	return c.removeCgroups()
}

// CRI connects to containerd on the node.
func (c *Cluster) CRI() (*Kubelet, error) {
	return newKubelet(c.Path(containerdSocket), c.Path(containerdSocket), filepath.Join(c.Dir, "pods"))
}
