package snapshot

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"
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

// Process returns which process the containerd at socket is: another text after
// each start.
func Process(ctx context.Context, socket string) (string, error) {
	var id string
	err := ask(socket, func(conn *grpc.ClientConn) error {
		s, err := introspectionapi.NewIntrospectionClient(conn).Server(ctx, &emptypb.Empty{})
		if err != nil {
			return err
		}
		id = strconv.FormatUint(s.Pid, 10)
		// Numbers are used again, also soon where processes are few. In another
		// PID namespace there's nothing of that number, or something else.
		stat, _ := os.ReadFile("/proc/" + id + "/stat")
		if _, rest, ok := strings.Cut(string(stat), ") "); ok {
			if fields := strings.Fields(rest); len(fields) > 19 {
				id += " since " + fields[19]
			}
		}
		return nil
	})
	return id, err
}

// Pod is a Kubernetes pod as containerd knows it.
type Pod struct {
	UID        string   // "": none
	Containers []string // IDs, that of its sandbox among them
}

// PodOf returns the pod of a container whose ID occurs in text, such as in the
// name of a control group.
func PodOf(ctx context.Context, socket, text string) (Pod, error) {
	var pod Pod
	err := ask(socket, func(conn *grpc.ClientConn) error {
		list, err := containersapi.NewContainersClient(conn).List(namespaces.WithNamespace(ctx, "k8s.io"), &containersapi.ListContainersRequest{})
		for _, c := range list.GetContainers() {
			if c.ID != "" && strings.Contains(text, c.ID) {
				pod.UID = c.Labels[labelPod]
			}
		}
		for _, c := range list.GetContainers() {
			if pod.UID != "" && c.Labels[labelPod] == pod.UID {
				pod.Containers = append(pod.Containers, c.ID)
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
