package bed

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// criPlugins are those of containerd that a node without the CRI does without,
// as they stand in a list.
const criPlugins = `"io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri", `

// CRI is how a node's containerd answers kubelet, with streaming as its
// snapshotter. The zero value pulls as docs/containerd.md has it.
type CRI struct {
	// LocalPull has the CRI plugin pull by itself, as before containerd 2.1,
	// instead of through the transfer service.
	LocalPull bool
	// RemapIDs maps the IDs of pods with user namespaces at the mounts.
	RemapIDs bool
	// Sandbox is the image of pods' own container.
	Sandbox string
	// Hosts has a directory per registry with a hosts.toml; made if missing.
	Hosts string
}

// capabilities of the proxy plugin.
func (c *CRI) capabilities() string {
	if c.RemapIDs {
		return `capabilities = ["remap-ids"]`
	}
	return ""
}

// config is the CRI's part of containerd's configuration.
func (c *CRI) config(n *Node) string {
	return fmt.Sprintf(`[plugins."io.containerd.cri.v1.images"]
  snapshotter = %[1]q
  disable_snapshot_annotations = %[2]t
  use_local_image_pull = %[3]t
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = %[4]q
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = %[5]q
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri"]
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
`, n.snapshotter(), !c.LocalPull, c.LocalPull, c.Sandbox, c.hosts(n))
}

func (c *CRI) hosts(n *Node) string {
	if c.Hosts != "" {
		return c.Hosts
	}
	return filepath.Join(n.Dir, "certs.d")
}

// EnableCRI has containerd answer kubelet from its next start on. registries
// are those, as HOST:PORT, that are spoken to without TLS.
func (n *Node) EnableCRI(c CRI, registries ...string) error {
	n.cri = &c
	for _, r := range registries {
		dir := filepath.Join(c.hosts(n), r)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), fmt.Appendf(nil, "server = \"http://%s\"\n", r), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// answersKubelet reports whether containerd's CRI does what it is asked for.
func (n *Node) answersKubelet(ctx context.Context) bool {
	k, err := n.Kubelet("")
	if err != nil {
		return false
	}
	defer k.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err = k.Runtime.Version(ctx, &runtimeapi.VersionRequest{})
	return err == nil
}

// Kubelet is the part of kubelet that talks to a container runtime.
type Kubelet struct {
	Runtime runtimeapi.RuntimeServiceClient
	Images  runtimeapi.ImageServiceClient
	conns   []*grpc.ClientConn
	logs    string
	pods    int
}

// Kubelet connects to containerd's CRI; images is the socket of the image
// service, containerd's too if it's empty.
func (n *Node) Kubelet(images string) (*Kubelet, error) {
	if images == "" {
		images = n.containerdSocket()
	}
	return newKubelet(n.containerdSocket(), images, filepath.Join(n.Dir, "pods"))
}

// newKubelet connects to the sockets of a runtime and an image service; what
// pods print goes to the directory logs.
func newKubelet(runtime, images, logs string) (*Kubelet, error) {
	k := &Kubelet{logs: logs}
	for _, socket := range []string{runtime, images} {
		c, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			k.Close()
			return nil, err
		}
		k.conns = append(k.conns, c)
	}
	k.Runtime = runtimeapi.NewRuntimeServiceClient(k.conns[0])
	k.Images = runtimeapi.NewImageServiceClient(k.conns[1])
	return k, os.MkdirAll(k.logs, 0o755)
}

// Close ends the connections; pods go on.
func (k *Kubelet) Close() {
	for _, c := range k.conns {
		c.Close()
	}
}

// Pull pulls an image, with credentials unless auth is nil.
func (k *Kubelet) Pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig) error {
	_, err := k.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref, UserSpecifiedImage: ref}, Auth: auth})
	return err
}

// Pod is a pod with one container.
type Pod struct {
	Sandbox   string
	Container string
	Log       string // path of what the container prints, as CRI logs are
}

// Sandbox is a pod that has no container of its own yet.
type Sandbox struct {
	ID     string
	config *runtimeapi.PodSandboxConfig
}

// Metadata is the pod's namespace, name and UID.
func (s Sandbox) Metadata() *runtimeapi.PodSandboxMetadata { return s.config.Metadata }

// StartSandbox starts a pod on the host's network, without containers. With userns
// their root is user 100000 of this machine.
func (k *Kubelet) StartSandbox(ctx context.Context, userns bool, annotations map[string]string) (Sandbox, error) {
	k.pods++
	name := fmt.Sprintf("pod-%d-%d", time.Now().UnixNano(), k.pods)
	namespaces := &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE}
	if userns {
		ids := []*runtimeapi.IDMapping{{HostId: 100000, ContainerId: 0, Length: 65536}}
		namespaces.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: ids, Gids: ids}
	}
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name},
		LogDirectory: k.logs,
		Annotations:  annotations,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: namespaces},
		},
	}
	sandbox, err := k.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	return Sandbox{sandbox.GetPodSandboxId(), config}, err
}

// PullFor pulls an image for a pod, and returns its ID.
func (k *Kubelet) PullFor(ctx context.Context, s Sandbox, ref string) (string, error) {
	answer, err := k.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}, SandboxConfig: s.config})
	return answer.GetImageRef(), err
}

// StartContainer starts a container in a pod, the nth attempt from 0 of the one
// of that name, on an image that was pulled. The pod has it as ref; id is the
// image's ID, or "" to have the runtime resolve ref.
func (k *Kubelet) StartContainer(ctx context.Context, s Sandbox, name string, attempt uint32, ref, id string, command ...string) (string, error) {
	image := &runtimeapi.ImageSpec{Image: ref}
	if id != "" {
		image = &runtimeapi.ImageSpec{Image: id, UserSpecifiedImage: ref}
	}
	container, err := k.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  s.ID,
		SandboxConfig: s.config,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: name, Attempt: attempt},
			Image:    image,
			Command:  command,
			LogPath:  s.logName(name, attempt),
			Labels: map[string]string{
				"io.kubernetes.pod.namespace": s.config.Metadata.Namespace, "io.kubernetes.pod.name": s.config.Metadata.Name,
				"io.kubernetes.pod.uid": s.config.Metadata.Uid, "io.kubernetes.container.name": name,
			},
			Linux: &runtimeapi.LinuxContainerConfig{
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: s.config.Linux.SecurityContext.NamespaceOptions},
			},
		},
	})
	if err != nil {
		return "", err
	}
	_, err = k.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: container.ContainerId})
	return container.ContainerId, err
}

func (s Sandbox) logName(container string, attempt uint32) string {
	return fmt.Sprintf("%s-%s-%d.log", s.config.Metadata.Name, container, attempt)
}

// RunPod starts a pod on the host's network that runs command in a container
// of an image that was pulled. With userns its root is user 100000 of this
// machine.
func (k *Kubelet) RunPod(ctx context.Context, ref string, userns bool, command ...string) (Pod, error) {
	sandbox, err := k.StartSandbox(ctx, userns, nil)
	if err != nil {
		return Pod{}, err
	}
	pod := Pod{Sandbox: sandbox.ID, Log: filepath.Join(k.logs, sandbox.logName("main", 0))}
	pod.Container, err = k.StartContainer(ctx, sandbox, "main", 0, ref, "", command...)
	return pod, err
}

// RemovePod ends and removes a pod.
func (k *Kubelet) RemovePod(ctx context.Context, p Pod) error {
	if _, err := k.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.Sandbox}); err != nil {
		return err
	}
	_, err := k.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.Sandbox})
	return err
}
