// Program stargz-node is stargz-snapshotter's library behind a socket, which is
// what its own daemon is: that one isn't where Go modules come from.
//
//	stargz-node SOCKET ROOT REGISTRY
//
// It speaks plain HTTP with REGISTRY (HOST:PORT), and otherwise runs with the
// defaults of an empty configuration file.
package main

import (
	"context"
	"fmt"
	"net"
	"os"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/containerd/stargz-snapshotter/service/resolver"
	"google.golang.org/grpc"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: stargz-node SOCKET ROOT REGISTRY")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(socket, root, registry string) error {
	config := &service.Config{ResolverConfig: service.ResolverConfig{Host: map[string]resolver.HostConfig{
		registry: {Mirrors: []resolver.MirrorConfig{{Host: registry, Insecure: true}}},
	}}}
	sn, err := service.NewStargzSnapshotterService(context.Background(), root, config)
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	return server.Serve(l)
}
