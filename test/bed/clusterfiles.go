package bed

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Addresses of a cluster.
const (
	serviceSubnet = "10.96.0.0/24"
	serviceIP     = "10.96.0.1" // the API server's service has the first
	podSubnet     = "10.88.0.0/24"
)

// Files on a cluster's node.
const (
	kubernetesDir     = "/etc/kubernetes"
	tokensFile        = kubernetesDir + "/tokens.csv"
	serviceAccountKey = kubernetesDir + "/service-accounts.key"
	kubeletConfig     = kubernetesDir + "/kubelet.yaml"
	providersDir      = kubernetesDir + "/credential-providers"
	providersConfig   = kubernetesDir + "/credential-providers.yaml"
	apiServerCert     = "/var/lib/kube-apiserver/apiserver.crt" // made by the API server, its CA too
	containerdSocket  = "/run/containerd/containerd.sock"
)

// KubeletDropIns is the directory of kubelet's further configuration files on a
// cluster's node, whose names end with .conf.
const KubeletDropIns = kubernetesDir + "/kubelet.conf.d"

// Users of a cluster, by the names of their files.
const (
	admin       = "admin"
	controllers = "controllers"
	scheduler   = "scheduler"
	kubelet     = "kubelet"
)

// clusterUsers are their names and groups to the API server.
var clusterUsers = map[string][2]string{
	admin:       {"admin", "system:masters"},
	controllers: {"system:kube-controller-manager", ""},
	scheduler:   {"system:kube-scheduler", ""},
	kubelet:     {"system:node:" + ClusterNode, "system:nodes"},
}

func kubeconfig(user string) string { return filepath.Join(kubernetesDir, user+".kubeconfig") }

// writeFiles writes what the programs read.
func (c *Cluster) writeFiles() error {
	files := map[string]string{
		"/etc/containerd/config.toml":       c.containerdConfig(),
		"/etc/cni/net.d/10-bridge.conflist": cniConfig,
		kubeletConfig:                       c.kubeletConfig(),
		providersConfig:                     fmt.Sprintf(credentialProviders, c.config.ProviderRegistry),
	}
	if c.config.Sluice != "" {
		files["/etc/containerd/conf.d/sluice.toml"] = sluiceDropIn
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	files[serviceAccountKey] = string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
	var tokens strings.Builder
	for user, names := range clusterUsers {
		c.tokens[user] = rand.Text()
		fmt.Fprintf(&tokens, "%s,%s,%s,%q\n", c.tokens[user], names[0], user, names[1])
		files[kubeconfig(user)] = fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://%s", certificate-authority: %s}}]
users: [{name: u, user: {token: %s}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, serviceIP, apiServerCert, c.tokens[user])
	}
	files[tokensFile] = tokens.String()
	for name, content := range files {
		if err := os.MkdirAll(c.Path(filepath.Dir(name)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(c.Path(name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(c.Path(KubeletDropIns), 0o755); err != nil {
		return err
	}
	if c.config.CredentialProvider != "" {
		program := c.Path(providersDir + "/bed")
		if err := os.Mkdir(filepath.Dir(program), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(program, []byte(c.config.CredentialProvider), 0o700); err != nil {
			return err
		}
	}
	return c.makeCgroups()
}

// containerdConfig is that of an ordinary node. Pods of the runtime class
// "plain" use overlayfs whatever the default is.
func (c *Cluster) containerdConfig() string {
	return fmt.Sprintf(`version = 3
imports = ["/etc/containerd/conf.d/*.toml"]
disabled_plugins = ["io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp", "io.containerd.nri.v1.nri"]
[plugins."io.containerd.cri.v1.images"]
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = %q
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "/etc/containerd/certs.d"
  [plugins."io.containerd.cri.v1.images".runtime_platforms.plain]
    platform = "linux"
    snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [%q]
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.plain]
    runtime_type = "io.containerd.runc.v2"
    snapshotter = "overlayfs"
`, c.config.Sandbox, c.config.Kubernetes.CNI)
}

// sluiceDropIn is what docs/containerd.md tells people to write.
const sluiceDropIn = `version = 3
[proxy_plugins.sluice]
  type = "snapshot"
  address = "/run/sluice/snapshotter.sock"
  [proxy_plugins.sluice.exports]
    root = "/var/lib/sluice"
    enable_remote_snapshot_annotations = "true"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "overlayfs"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "sluice"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "sluice"
  disable_snapshot_annotations = false
`

// cniConfig connects pods to a bridge on which the host is the gateway.
const cniConfig = `{"cniVersion": "1.0.0", "name": "bridge", "plugins": [{
	"type": "bridge", "bridge": "cni0", "isGateway": true,
	"ipam": {"type": "host-local", "ranges": [[{"subnet": "` + podSubnet + `"}]], "routes": [{"dst": "0.0.0.0/0"}]}
}]}
`

// kubeletConfig is that of an ordinary node, but for what the machines of
// developers and CI lack: cgroup v2, and the right to lower oom_score_adj.
func (c *Cluster) kubeletConfig() string {
	images := ""
	if c.config.Sluice != "" {
		images = "imageServiceEndpoint: unix:///run/sluice/cri.sock"
	}
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: %s
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix://%s
%s
cgroupDriver: cgroupfs
cgroupRoot: %s
failCgroupV1: false
enforceNodeAllocatable: []
oomScoreAdj: 0
maxOpenFiles: 4096
failSwapOn: false
makeIPTablesUtilChains: false
serializeImagePulls: false
nodeStatusUpdateFrequency: 2s
%s
`, hostIP, containerdSocket, images, c.cgroup(), c.config.Kubelet)
}

// credentialProviders has kubelet ask the program "bed" about a registry.
const credentialProviders = `apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: bed
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: [%[1]q]
  defaultCacheDuration: 0s
  tokenAttributes: {serviceAccountTokenAudience: %[1]q, cacheType: Token, requireServiceAccount: true}
`

// cgroup is below which kubelet has its own.
func (c *Cluster) cgroup() string {
	return "/" + filepath.Base(filepath.Dir(c.Dir)) + "-" + filepath.Base(c.Dir)
}

// makeCgroups makes the node's cgroup in every hierarchy.
func (c *Cluster) makeCgroups() error {
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil {
		return err
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.procs"); err == nil {
		hierarchies = []string{"/sys/fs/cgroup/cgroup.procs"} // cgroup v2
	}
	for _, h := range hierarchies {
		dir := filepath.Join(filepath.Dir(h), c.cgroup())
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		c.cgroups = append(c.cgroups, dir)
		for _, name := range []string{"cpuset.cpus", "cpuset.mems"} { // empty at first, and then nothing may enter
			all, err := os.ReadFile(filepath.Join(filepath.Dir(h), name))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, name), bytes.TrimSpace(all), 0o644)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// removeCgroups removes the node's cgroups, those of its pods too, when their
// last processes have gone.
func (c *Cluster) removeCgroups() error {
	var last error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		last = nil
		for _, top := range c.cgroups {
			var dirs []string
			err := filepath.WalkDir(top, func(name string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, name)
				}
				return err
			})
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				last = err
			}
			for _, dir := range slices.Backward(dirs) {
				if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
					last = err
				}
			}
		}
		if last == nil {
			return nil
		}
	}
	return last
}
