package snapshot

import (
	"context"
	"fmt"
	"slices"
	"strings"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Registered reports whether the containerd at socket knows the snapshotter: it
// was started with a configuration that names it.
func Registered(ctx context.Context, socket, snapshotter string) (bool, error) {
	var known bool
	err := ask(socket, func(conn *grpc.ClientConn) error {
		list, err := introspectionapi.NewIntrospectionClient(conn).Plugins(ctx, &introspectionapi.PluginsRequest{})
		known = slices.ContainsFunc(list.GetPlugins(), func(p *introspectionapi.Plugin) bool {
			return p.Type == "io.containerd.snapshotter.v1" && p.ID == snapshotter && p.InitErr == nil
		})
		return err
	})
	return known, err
}

// PodOf returns the UID of the Kubernetes pod of a container whose ID occurs in
// text, such as in the name of a control group: "" if none does.
func PodOf(ctx context.Context, socket, text string) (string, error) {
	var pod string
	err := ask(socket, func(conn *grpc.ClientConn) error {
		list, err := containersapi.NewContainersClient(conn).List(namespaces.WithNamespace(ctx, "k8s.io"), &containersapi.ListContainersRequest{})
		for _, c := range list.GetContainers() {
			if c.ID != "" && strings.Contains(text, c.ID) {
				pod = c.Labels[labelPod]
			}
		}
		return err
	})
	return pod, err
}

// ask asks a containerd something.
func ask(socket string, do func(*grpc.ClientConn) error) error {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err == nil {
		defer conn.Close()
		err = errgrpc.ToNative(do(conn))
	}
	if err != nil {
		return fmt.Errorf("containerd at %s: %w", socket, err)
	}
	return nil
}
