package snapshot_test

import (
	"context"
	"net"
	"path/filepath"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"sluice/internal/node/snapshot"
)

// TestServe talks to the snapshotter as containerd does: through its proxy.
func TestServe(t *testing.T) {
	images := newDirImages(t)
	ids := diffs("a", 2)
	images.add(t, "r/a", ids...)
	s := open(t, t.TempDir(), images)
	socket := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- snapshot.Serve(ctx, l, s) }()

	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "sluice")
	calls := namespaces.WithNamespace(t.Context(), "default")
	chain := chains(ids)
	parent := ""
	for i, name := range chain {
		labels := map[string]string{snapshots.LabelSnapshotRef: name, snapshotters.TargetRefLabel: "r/a"}
		_, err := client.Prepare(calls, "extract "+name, parent, snapshots.WithLabels(labels))
		if !errdefs.IsAlreadyExists(err) {
			t.Fatalf("layer %d: %v, want already exists", i, err)
		}
		parent = name
	}
	if mounts, err := client.Prepare(calls, "c", parent); err != nil || len(mounts) != 1 {
		t.Errorf("mounts %v, %v", mounts, err)
	}
	if u, err := client.Usage(calls, parent); err != nil || u.Size != 1001 {
		t.Errorf("usage %+v, %v", u, err)
	}
	if err := client.Remove(calls, "nothing"); !errdefs.IsNotFound(err) {
		t.Errorf("removing what isn't there: %v", err)
	}
	if c, ok := client.(snapshots.Cleaner); !ok || c.Cleanup(calls) != nil {
		t.Error("no clean-up through the socket")
	}
	stop()
	if err := <-served; err != nil {
		t.Errorf("serving ended with %v", err)
	}
}

func TestUserNamespaces(t *testing.T) {
	needRoot(t)
	images := newDirImages(t)
	ids := diffs("a", 1)
	images.add(t, "r/a", ids...)
	s, err := snapshot.Open(t.Context(), snapshot.Options{Root: t.TempDir(), Images: images, RemapIDs: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	top, _ := pull(t, s, "r/a", ids)
	mapped := func(uid, gid string) snapshots.Opt {
		return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotUIDMapping: uid, snapshots.LabelSnapshotGIDMapping: gid})
	}
	mounts, err := s.Prepare(t.Context(), "c", top, mapped("0:100000:65536", "0:200000:65536"))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{"uidmap=0:100000:65536": true, "gidmap=0:200000:65536": true}
	for _, o := range mounts[0].Options {
		delete(want, o)
	}
	if len(want) > 0 {
		t.Errorf("mount options %q lack %v", mounts[0].Options, want)
	}
	for _, bad := range []string{"", "0:1", "a:b:c", "1:100000:65536", "0:-1:5", "0:99999999999:1"} {
		if _, err := s.Prepare(t.Context(), "bad "+bad, top, mapped(bad, "0:0:1")); !errdefs.IsInvalidArgument(err) {
			t.Errorf("mapping %q: %v, want an invalid argument", bad, err)
		}
	}
}
