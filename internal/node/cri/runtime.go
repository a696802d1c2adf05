package cri

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sluice/internal/node/happening"
)

// ErrUnknown: containerd's CRI has nothing of that ID. Of what it's making now it
// knows only when it's made.
var ErrUnknown = errors.New("containerd's CRI doesn't know it")

// Labels by which kubelet says whose a container is.
const (
	labelPodNamespace = "io.kubernetes.pod.namespace"
	labelPodName      = "io.kubernetes.pod.name"
	labelPodUID       = "io.kubernetes.pod.uid"
)

// Container is what containerd's CRI says of an ID.
type Container struct {
	// Sandbox: it's a pod's own container, which has nothing of what follows.
	Sandbox bool

	Pod     happening.Pod
	Name    string // in the pod
	Attempt uint32
	Image   string // as the pod names it; "" if nobody says
}

// Runtime asks containerd's CRI about containers. Its methods may be called
// concurrently.
type Runtime struct {
	conn   *grpc.ClientConn
	client runtimeapi.RuntimeServiceClient
}

// NewRuntime returns a Runtime of the containerd at socket, which need not be
// there yet. The caller closes it.
func NewRuntime(socket string) (*Runtime, error) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("containerd's CRI at %s: %w", socket, err)
	}
	return &Runtime{conn, runtimeapi.NewRuntimeServiceClient(conn)}, nil
}

// Close ends the connection, and calls that are under way.
func (r *Runtime) Close() error { return r.conn.Close() }

// Find returns what an ID stands for. Errors: ErrUnknown.
func (r *Runtime) Find(ctx context.Context, id string) (Container, error) {
	list, err := r.client.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: id}})
	if err != nil {
		return Container{}, fmt.Errorf("ask containerd's CRI for container %s: %w", id, err)
	}
	for _, c := range list.Containers {
		if c.GetId() == id {
			return r.describe(ctx, c)
		}
	}
	pods, err := r.client.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: id}})
	if err != nil {
		return Container{}, fmt.Errorf("ask containerd's CRI for pod %s: %w", id, err)
	}
	for _, p := range pods.Items {
		if p.GetId() == id {
			return Container{Sandbox: true, Pod: podOf(p.Metadata)}, nil
		}
	}
	return Container{}, fmt.Errorf("container %s: %w", id, ErrUnknown)
}

// describe makes a Container, and asks for what isn't said.
func (r *Runtime) describe(ctx context.Context, c *runtimeapi.Container) (Container, error) {
	labels := c.GetLabels()
	found := Container{
		Pod:  happening.Pod{Namespace: labels[labelPodNamespace], Name: labels[labelPodName], UID: labels[labelPodUID]},
		Name: c.GetMetadata().GetName(), Attempt: c.GetMetadata().GetAttempt(),
		Image: imageName(c.GetImage()),
	}
	if found.Pod.Namespace == "" || found.Pod.Name == "" || found.Pod.UID == "" { // another client than kubelet made it
		answer, err := r.client.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: c.GetPodSandboxId()})
		if err != nil {
			return Container{}, unlessGone(fmt.Errorf("ask containerd's CRI for pod %s: %w", c.GetPodSandboxId(), err))
		}
		found.Pod = podOf(answer.GetStatus().GetMetadata())
	}
	if found.Image == "" {
		answer, err := r.client.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.GetId()})
		if err != nil {
			return Container{}, unlessGone(fmt.Errorf("ask containerd's CRI for container %s: %w", c.GetId(), err))
		}
		found.Image = imageName(answer.GetStatus().GetImage())
	}
	return found, nil
}

// unlessGone makes ErrUnknown of an error that means it: what was listed is gone.
func unlessGone(err error) error {
	if status.Code(err) == codes.NotFound {
		return errors.Join(ErrUnknown, err)
	}
	return err
}

// imageName returns the name in an image's specification: kubelet, which has
// resolved it, creates containers by ID, and says beside it what the pod has.
func imageName(s *runtimeapi.ImageSpec) string {
	if name := s.GetUserSpecifiedImage(); name != "" {
		return name
	}
	if name := s.GetImage(); !strings.HasPrefix(name, "sha256:") {
		return name
	}
	return ""
}

// podOf returns the pod of a sandbox's metadata, which may be nil.
func podOf(m *runtimeapi.PodSandboxMetadata) happening.Pod {
	return happening.Pod{Namespace: m.GetNamespace(), Name: m.GetName(), UID: m.GetUid()}
}
