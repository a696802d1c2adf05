package cri

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sluice/internal/node/happening"
)

// pods is a containerd that has some containers.
type pods struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	containers []*runtimeapi.Container
	sandboxes  []*runtimeapi.PodSandbox
	images     map[string]string // of containers, as their status has it
}

func (p *pods) ListContainers(context.Context, *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: p.containers}, nil // a filter may be ignored
}

func (p *pods) ListPodSandbox(context.Context, *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{Items: p.sandboxes}, nil
}

func (p *pods) PodSandboxStatus(_ context.Context, r *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	for _, s := range p.sandboxes {
		if s.Id == r.PodSandboxId {
			return &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{Metadata: s.Metadata}}, nil
		}
	}
	return nil, status.Error(codes.NotFound, "no such pod")
}

func (p *pods) ContainerStatus(_ context.Context, r *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{Image: &runtimeapi.ImageSpec{Image: p.images[r.ContainerId]}}}, nil
}

func TestFind(t *testing.T) {
	labels := map[string]string{labelPodNamespace: "team", labelPodName: "web-0", labelPodUID: "1-2"}
	web := happening.Pod{Namespace: "team", Name: "web-0", UID: "1-2"}
	p := &pods{
		containers: []*runtimeapi.Container{
			{Id: "kubelet", Metadata: &runtimeapi.ContainerMetadata{Name: "main", Attempt: 3}, Labels: labels, PodSandboxId: "pod",
				Image: &runtimeapi.ImageSpec{Image: "sha256:00", UserSpecifiedImage: "app:1"}},
			{Id: "old-kubelet", Metadata: &runtimeapi.ContainerMetadata{Name: "main"}, Labels: labels, Image: &runtimeapi.ImageSpec{Image: "sha256:00"}},
			{Id: "crictl", Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, PodSandboxId: "pod", Image: &runtimeapi.ImageSpec{Image: "app:2"}},
			{Id: "orphan", PodSandboxId: "gone", Image: &runtimeapi.ImageSpec{Image: "app:2"}},
			{Id: "nothing"},
		},
		sandboxes: []*runtimeapi.PodSandbox{
			{Id: "pod", Metadata: &runtimeapi.PodSandboxMetadata{Namespace: "team", Name: "web-1", Uid: "3-4"}},
			{Id: "bare"},
		},
		images: map[string]string{"old-kubelet": "docker.io/library/app:1"},
	}
	socket := filepath.Join(t.TempDir(), "c.sock")
	s := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(s, p)
	stop := serveOn(t, s, socket)
	r, err := NewRuntime(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, c := range []struct {
		id   string
		want Container
		err  error
	}{
		{"kubelet", Container{Pod: web, Name: "main", Attempt: 3, Image: "app:1"}, nil},
		{"old-kubelet", Container{Pod: web, Name: "main", Image: "docker.io/library/app:1"}, nil},
		{"crictl", Container{Pod: happening.Pod{Namespace: "team", Name: "web-1", UID: "3-4"}, Name: "c", Image: "app:2"}, nil},
		{"pod", Container{Sandbox: true, Pod: happening.Pod{Namespace: "team", Name: "web-1", UID: "3-4"}}, nil},
		{"bare", Container{Sandbox: true}, nil},
		{"orphan", Container{}, ErrUnknown},
		{"nothing", Container{}, ErrUnknown},
		{"po", Container{}, ErrUnknown},
		{"", Container{}, ErrUnknown},
	} {
		if got, err := r.Find(t.Context(), c.id); got != c.want || !errors.Is(err, c.err) {
			t.Errorf("%q is %+v, %v; want %+v, %v", c.id, got, err, c.want, c.err)
		}
	}
	stop()
	if _, err := r.Find(t.Context(), "kubelet"); err == nil || errors.Is(err, ErrUnknown) {
		t.Errorf("without containerd: %v", err)
	}
}

// kubelet says for which pod it pulls, and what that one is annotated with.
func TestPullsPod(t *testing.T) {
	socket, p, c := filepath.Join(t.TempDir(), "c.sock"), new(passed), new(containerd)
	c.pull = func(context.Context, *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
		return &runtimeapi.PullImageResponse{}, nil
	}
	c.serveAt(t, socket)
	conn, _ := serveProxy(t, socket, p, nil)
	request := pullRequest("a.io/app:1", &runtimeapi.AuthConfig{Auth: "%"}) // that can't be used
	request.SandboxConfig = &runtimeapi.PodSandboxConfig{
		Metadata:    &runtimeapi.PodSandboxMetadata{Namespace: "team", Name: "web-0", Uid: "1-2"},
		Annotations: map[string]string{"key": "value"},
	}
	if _, err := runtimeapi.NewImageServiceClient(conn).PullImage(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	if len(p.told) != 1 {
		t.Fatalf("told of %v", p.told)
	}
	if got := p.told[0]; got.Image != "a.io/app:1" || got.Pod != (happening.Pod{Namespace: "team", Name: "web-0", UID: "1-2"}) || got.Annotations["key"] != "value" || len(got.Annotations) != 1 {
		t.Errorf("told of %+v", got)
	}
}
