package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// InUseError says which containers still need a snapshotter.
type InUseError struct {
	Containers []string // as NAMESPACE/ID
}

func (e *InUseError) Error() string {
	return fmt.Sprintf("%d containers still use it: %s; drain the node, or delete them", len(e.Containers), strings.Join(e.Containers, ", "))
}

// Withdrawn is what Withdraw removed.
type Withdrawn struct {
	Images    []string `json:"images"` // as NAMESPACE/NAME
	Snapshots int      `json:"snapshots"`
}

// Withdraw removes from the containerd at socket what only the snapshotter of
// that name can provide: its snapshots, and the images that were pulled for it,
// whose layers containerd may never have downloaded. With another snapshotter
// containerd would take such an image for present and then fail to start it;
// without the image it pulls it again.
//
// While a container uses the snapshotter nothing is removed, and the error is
// an *InUseError. After any other error it may be called again.
func Withdraw(ctx context.Context, socket, snapshotter string) (Withdrawn, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return Withdrawn{}, fmt.Errorf("containerd at %s: %w", socket, err)
	}
	defer conn.Close()
	w := withdrawal{conn: conn, snapshotter: snapshotter}
	if err := w.run(ctx); err != nil {
		return w.done, fmt.Errorf("containerd at %s: %w", socket, errgrpc.ToNative(err))
	}
	return w.done, nil
}

// withdrawal is one call of Withdraw.
type withdrawal struct {
	conn        *grpc.ClientConn
	snapshotter string
	done        Withdrawn
}

func (w *withdrawal) run(ctx context.Context) error {
	all, err := namespacesapi.NewNamespacesClient(w.conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return fmt.Errorf("list the namespaces: %w", err)
	}
	var users []string
	for _, ns := range all.Namespaces {
		found, err := w.containers(namespaces.WithNamespace(ctx, ns.Name), ns.Name)
		if err != nil {
			return err
		}
		users = append(users, found...)
	}
	if len(users) > 0 {
		return &InUseError{Containers: users}
	}
	for _, ns := range all.Namespaces {
		nctx := namespaces.WithNamespace(ctx, ns.Name)
		if err := errors.Join(w.images(nctx, ns.Name), w.snapshots(nctx)); err != nil {
			return fmt.Errorf("namespace %s: %w", ns.Name, err)
		}
	}
	return nil
}

// containers returns the containers of a namespace that use the snapshotter.
func (w *withdrawal) containers(ctx context.Context, ns string) ([]string, error) {
	list, err := containersapi.NewContainersClient(w.conn).List(ctx, &containersapi.ListContainersRequest{})
	if err != nil {
		return nil, fmt.Errorf("list the containers of namespace %s: %w", ns, err)
	}
	var users []string
	for _, c := range list.Containers {
		if c.Snapshotter == w.snapshotter {
			users = append(users, ns+"/"+c.ID)
		}
	}
	return users, nil
}

// images removes the images that were unpacked by the snapshotter.
func (w *withdrawal) images(ctx context.Context, ns string) error {
	unpacked, err := w.unpacked(ctx)
	if err != nil {
		return err
	}
	client := imagesapi.NewImagesClient(w.conn)
	list, err := client.List(ctx, &imagesapi.ListImagesRequest{})
	if err != nil {
		return fmt.Errorf("list the images: %w", err)
	}
	for _, image := range list.Images {
		if image.Target == nil || !unpacked[image.Target.Digest] {
			continue
		}
		if _, err := client.Delete(ctx, &imagesapi.DeleteImageRequest{Name: image.Name}); err != nil && !notFound(err) {
			return fmt.Errorf("remove image %s: %w", image.Name, err)
		}
		w.done.Images = append(w.done.Images, ns+"/"+image.Name)
	}
	return nil
}

// Labels of containerd's content store, by which its garbage collection goes
// from an image's index to its manifests, their configs, and the snapshots.
const (
	labelContentRef  = "containerd.io/gc.ref.content"
	labelSnapshotRef = "containerd.io/gc.ref.snapshot."
)

// unpacked returns the digests of all content from which a config can be
// reached that the snapshotter has a snapshot for.
func (w *withdrawal) unpacked(ctx context.Context) (map[string]bool, error) {
	stream, err := contentapi.NewContentClient(w.conn).List(ctx, &contentapi.ListContentRequest{})
	if err != nil {
		return nil, fmt.Errorf("list the content: %w", err)
	}
	parents := map[string][]string{}
	var reached []string
	for {
		page, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("list the content: %w", err)
		}
		for _, info := range page.Info {
			for key, value := range info.Labels {
				switch {
				case key == labelSnapshotRef+w.snapshotter:
					reached = append(reached, info.Digest)
				case strings.HasPrefix(key, labelContentRef):
					parents[value] = append(parents[value], info.Digest)
				}
			}
		}
	}
	found := map[string]bool{}
	for len(reached) > 0 {
		digest := reached[0]
		reached = reached[1:]
		if !found[digest] {
			found[digest] = true
			reached = append(reached, parents[digest]...)
		}
	}
	return found, nil
}

// snapshots removes the snapshotter's snapshots, children before parents.
func (w *withdrawal) snapshots(ctx context.Context) error {
	client := snapshotsapi.NewSnapshotsClient(w.conn)
	stream, err := client.List(ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: w.snapshotter})
	if err != nil {
		return fmt.Errorf("list the snapshots: %w", err)
	}
	parents := map[string]string{}
	for {
		page, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("list the snapshots: %w", err)
		}
		for _, info := range page.Info {
			parents[info.Name] = info.Parent
		}
	}
	for _, name := range leavesFirst(parents) {
		_, err := client.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: w.snapshotter, Key: name})
		if err != nil && !notFound(err) {
			return fmt.Errorf("remove snapshot %s: %w", name, err)
		}
		w.done.Snapshots++
	}
	return nil
}

// leavesFirst orders the names of snapshots, given with their parents, so that
// each comes before its parent.
func leavesFirst(parents map[string]string) []string {
	depth := func(name string) (n int) {
		for p, ok := parents[name]; ok && p != "" && n < len(parents); p, ok = parents[p] {
			n++
		}
		return n
	}
	names := make([]string, 0, len(parents))
	for name := range parents {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return depth(b) - depth(a) })
	return names
}

func notFound(err error) bool { return errdefs.IsNotFound(errgrpc.ToNative(err)) }
