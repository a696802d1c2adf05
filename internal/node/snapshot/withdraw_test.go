package snapshot_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"

	"sluice/internal/node/snapshot"
)

// The services of a containerd that has nothing but a namespace, and has lost its
// connection to the snapshotter.
type (
	oneNamespace struct {
		namespacesapi.UnimplementedNamespacesServer
	}
	noContainers struct {
		containersapi.UnimplementedContainersServer
	}
	noContent struct {
		contentapi.UnimplementedContentServer
	}
	noImages struct {
		imagesapi.UnimplementedImagesServer
	}
	lostSnapshots struct {
		snapshotsapi.UnimplementedSnapshotsServer
	}
)

func (oneNamespace) List(context.Context, *namespacesapi.ListNamespacesRequest) (*namespacesapi.ListNamespacesResponse, error) {
	return &namespacesapi.ListNamespacesResponse{Namespaces: []*namespacesapi.Namespace{{Name: "default"}}}, nil
}

func (noContainers) List(context.Context, *containersapi.ListContainersRequest) (*containersapi.ListContainersResponse, error) {
	return &containersapi.ListContainersResponse{}, nil
}

func (noContent) List(*contentapi.ListContentRequest, contentapi.Content_ListServer) error {
	return nil
}

func (noImages) List(context.Context, *imagesapi.ListImagesRequest) (*imagesapi.ListImagesResponse, error) {
	return &imagesapi.ListImagesResponse{}, nil
}

func (lostSnapshots) List(*snapshotsapi.ListSnapshotsRequest, snapshotsapi.Snapshots_ListServer) error {
	return errors.New(`connection error: desc = "transport: Error while dialing: connect: connection refused"`)
}

// TestWithdrawUnavailable: containerd connects to a snapshotter that was away
// again after a while; until then its list of snapshots fails with an error of no
// particular code.
func TestWithdrawUnavailable(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	namespacesapi.RegisterNamespacesServer(server, oneNamespace{})
	containersapi.RegisterContainersServer(server, noContainers{})
	contentapi.RegisterContentServer(server, noContent{})
	imagesapi.RegisterImagesServer(server, noImages{})
	snapshotsapi.RegisterSnapshotsServer(server, lostSnapshots{})
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	_, err = snapshot.Withdraw(t.Context(), socket, "sluice", "", false)
	if !snapshot.Unavailable(err) {
		t.Errorf("%v, want one that says to try again", err)
	}
	server.Stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
