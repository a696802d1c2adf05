package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// InUseError says which containers still need a snapshotter.
type InUseError struct {
	Containers []string // as NAMESPACE/ID
}

func (e *InUseError) Error() string {
	return fmt.Sprintf("containers still use it: %s; drain the node, or delete them", strings.Join(e.Containers, ", "))
}

// Withdrawn is what Withdraw removed, or would.
type Withdrawn struct {
	Containers []string `json:"containers"` // as NAMESPACE/ID
	Images     []string `json:"images"`     // as NAMESPACE/NAME
	Snapshots  int      `json:"snapshots"`
}

// Withdraw removes from the containerd at socket what only the snapshotter of
// that name can provide: its snapshots, and the images that were pulled for it,
// whose layers containerd may never have downloaded. With another snapshotter
// containerd would take such an image for present and then fail to start it;
// without the image it pulls it again.
//
// While a container uses the snapshotter nothing is removed, and the error is
// an *InUseError; with force such containers are killed and removed first.
// After any other error it may be called again. The snapshotter must answer.
//
// pod, if it isn't empty, is the UID of the Kubernetes pod that asks for it. Its
// own containers don't count: they go on, and containerd forgets that they have
// a snapshot.
func Withdraw(ctx context.Context, socket, snapshotter, pod string, force bool) (Withdrawn, error) {
	return withdraw(socket, snapshotter, pod, func(w *withdrawal) error { return w.run(ctx, force) })
}

// Survey tells which containers use the snapshotter, and which images Withdraw
// would remove. The snapshotter need not answer.
func Survey(ctx context.Context, socket, snapshotter, pod string) (Withdrawn, error) {
	return withdraw(socket, snapshotter, pod, func(w *withdrawal) error {
		_, err := w.survey(ctx)
		return err
	})
}

func withdraw(socket, snapshotter, pod string, do func(*withdrawal) error) (Withdrawn, error) {
	w := withdrawal{snapshotter: snapshotter, pod: pod, done: Withdrawn{Containers: []string{}, Images: []string{}}}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return w.done, fmt.Errorf("containerd at %s: %w", socket, err)
	}
	defer conn.Close()
	w.conn = conn
	if err := do(&w); err != nil {
		return w.done, fmt.Errorf("containerd at %s: %w", socket, errgrpc.ToNative(err))
	}
	return w.done, nil
}

// withdrawal is one call of Withdraw or Survey.
type withdrawal struct {
	conn        *grpc.ClientConn
	snapshotter string
	pod         string // that isn't to be counted; ""
	done        Withdrawn
}

// found is what a namespace has of the snapshotter.
type found struct{ containers, images, spared []string }

// survey looks through all namespaces and notes in done what it finds.
func (w *withdrawal) survey(ctx context.Context) (map[string]found, error) {
	list, err := namespacesapi.NewNamespacesClient(w.conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return nil, fmt.Errorf("list the namespaces: %w", err)
	}
	all := map[string]found{}
	for _, ns := range list.Namespaces {
		nctx := namespaces.WithNamespace(ctx, ns.Name)
		var f found
		if f.containers, f.spared, err = w.containers(nctx); err == nil {
			f.images, err = w.images(nctx)
		}
		if err != nil {
			return nil, fmt.Errorf("namespace %s: %w", ns.Name, err)
		}
		all[ns.Name] = f
		for _, id := range f.containers {
			w.done.Containers = append(w.done.Containers, ns.Name+"/"+id)
		}
		for _, name := range f.images {
			w.done.Images = append(w.done.Images, ns.Name+"/"+name)
		}
	}
	return all, nil
}

func (w *withdrawal) run(ctx context.Context, force bool) error {
	all, err := w.survey(ctx)
	if err != nil {
		return err
	}
	if users := w.done.Containers; len(users) > 0 && !force {
		return &InUseError{Containers: users}
	}
	for ns, f := range all {
		if err := w.remove(namespaces.WithNamespace(ctx, ns), f); err != nil {
			return fmt.Errorf("namespace %s: %w", ns, err)
		}
	}
	return nil
}

// remove removes what was found in a namespace, and the snapshots.
func (w *withdrawal) remove(ctx context.Context, f found) error {
	for _, id := range f.containers {
		if err := w.end(ctx, id); err != nil {
			return err
		}
	}
	for _, id := range f.spared {
		// Without a key containerd removes no snapshot together with it: by then
		// it doesn't know the snapshotter any more.
		_, err := containersapi.NewContainersClient(w.conn).Update(ctx, &containersapi.UpdateContainerRequest{
			Container: &containersapi.Container{ID: id}, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"snapshotkey"}},
		})
		if err != nil && !notFound(err) {
			return fmt.Errorf("container %s: forget its snapshot: %w", id, err)
		}
	}
	if err := w.removeImages(ctx, f.images); err != nil {
		return err
	}
	return w.snapshots(ctx)
}

// removeImages removes images; the snapshots of containers stay.
func (w *withdrawal) removeImages(ctx context.Context, names []string) error {
	images := imagesapi.NewImagesClient(w.conn)
	for _, name := range names {
		if _, err := images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: name}); err != nil && !notFound(err) {
			return fmt.Errorf("remove image %s: %w", name, err)
		}
	}
	return nil
}

// WithdrawImages removes the images that Withdraw would, while containers go on:
// what is pulled from now on is pulled for containerd's default snapshotter.
func WithdrawImages(ctx context.Context, socket, snapshotter string) (Withdrawn, error) {
	return withdraw(socket, snapshotter, "", func(w *withdrawal) error {
		all, err := w.survey(ctx)
		if err != nil {
			return err
		}
		for ns, f := range all {
			if err := w.removeImages(namespaces.WithNamespace(ctx, ns), f.images); err != nil {
				return fmt.Errorf("namespace %s: %w", ns, err)
			}
		}
		return nil
	})
}

// labelPod has the UID of a container's pod.
const labelPod = "io.kubernetes.pod.uid"

// containers returns the containers of a namespace that use the snapshotter;
// spared are those of the pod that isn't to be counted.
func (w *withdrawal) containers(ctx context.Context) (users, spared []string, err error) {
	list, err := containersapi.NewContainersClient(w.conn).List(ctx, &containersapi.ListContainersRequest{})
	if err != nil {
		return nil, nil, fmt.Errorf("list the containers: %w", err)
	}
	for _, c := range list.Containers {
		switch {
		case c.Snapshotter != w.snapshotter:
		case w.pod != "" && c.Labels[labelPod] == w.pod:
			if c.SnapshotKey != "" {
				spared = append(spared, c.ID)
			}
		default:
			users = append(users, c.ID)
		}
	}
	return users, spared, nil
}

// endTimeout bounds how long a container may take to die of SIGKILL.
const endTimeout = 30 * time.Second

// end kills a container's process, if it has one, and removes the container.
func (w *withdrawal) end(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	tasks := tasksapi.NewTasksClient(w.conn)
	_, err := tasks.Kill(ctx, &tasksapi.KillRequest{ContainerID: id, Signal: uint32(syscall.SIGKILL), All: true})
	if err == nil {
		_, err = tasks.Wait(ctx, &tasksapi.WaitRequest{ContainerID: id})
	}
	if err == nil || notFound(err) { // there's none, or it has ended
		_, err = tasks.Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: id})
	}
	if err == nil || notFound(err) {
		_, err = containersapi.NewContainersClient(w.conn).Delete(ctx, &containersapi.DeleteContainerRequest{ID: id})
	}
	if err != nil && !notFound(err) {
		return fmt.Errorf("end container %s: %w", id, err)
	}
	return nil
}

// images returns the images that were unpacked by the snapshotter.
func (w *withdrawal) images(ctx context.Context) ([]string, error) {
	unpacked, err := w.unpacked(ctx)
	if err != nil {
		return nil, err
	}
	list, err := imagesapi.NewImagesClient(w.conn).List(ctx, &imagesapi.ListImagesRequest{})
	if err != nil {
		return nil, fmt.Errorf("list the images: %w", err)
	}
	var names []string
	for _, image := range list.Images {
		if image.Target != nil && unpacked[image.Target.Digest] {
			names = append(names, image.Name)
		}
	}
	return names, nil
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

// collectTime bounds how long containerd may take to collect what nobody
// references.
const collectTime = 15 * time.Second

// snapshots removes the snapshotter's snapshots, children before parents. A
// containerd that wasn't told of the snapshotter has none that matter.
//
// containerd takes a snapshot whose children its garbage collection has removed
// for one that has children still. Such are left to another collection, now that
// nobody references them.
func (w *withdrawal) snapshots(ctx context.Context) error {
	client := snapshotsapi.NewSnapshotsClient(w.conn)
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		parents, err := w.parents(ctx, client)
		if err != nil {
			return err
		}
		var stays error
		for _, name := range leavesFirst(parents) {
			_, err := client.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: w.snapshotter, Key: name})
			switch {
			case err == nil:
				w.done.Snapshots++
			case errdefs.IsFailedPrecondition(errgrpc.ToNative(err)):
				stays = fmt.Errorf("remove snapshot %s: %w", name, err)
			case !notFound(err):
				return fmt.Errorf("remove snapshot %s: %w", name, err)
			}
		}
		if stays == nil || time.Since(begin) > collectTime || ctx.Err() != nil {
			return stays
		}
		if err := w.collect(ctx); err != nil {
			return err
		}
	}
}

// collect has containerd collect its garbage: when a lease ends it does.
func (w *withdrawal) collect(ctx context.Context) error {
	client := leasesapi.NewLeasesClient(w.conn)
	id := fmt.Sprintf("sluice-withdraw-%d", time.Now().UnixNano())
	_, err := client.Create(ctx, &leasesapi.CreateRequest{ID: id})
	if err == nil {
		_, err = client.Delete(ctx, &leasesapi.DeleteRequest{ID: id, Sync: true})
	}
	if err != nil {
		return fmt.Errorf("collect garbage: %w", err)
	}
	return nil
}

// parents lists the snapshotter's snapshots, each with its parent.
func (w *withdrawal) parents(ctx context.Context, client snapshotsapi.SnapshotsClient) (map[string]string, error) {
	stream, err := client.List(ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: w.snapshotter})
	if err != nil {
		return nil, fmt.Errorf("list the snapshots: %w", err)
	}
	parents := map[string]string{}
	for {
		page, err := stream.Recv()
		if errors.Is(err, io.EOF) || errdefs.IsInvalidArgument(errgrpc.ToNative(err)) { // "snapshotter not loaded"
			return parents, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list the snapshots: %w", unavailable(err))
		}
		for _, info := range page.Info {
			parents[info.Name] = info.Parent
		}
	}
}

// unavailable gives an error of a list of snapshots the code that it lost on its
// way: what a proxied snapshotter's connection says containerd passes on as
// Unknown here, and here only.
func unavailable(err error) error {
	if status.Code(err) == codes.Unknown {
		return status.Error(codes.Unavailable, status.Convert(err).Message())
	}
	return err
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

// Unavailable reports whether Withdraw failed because containerd does not reach
// the snapshotter now: it tries to connect again every few seconds.
func Unavailable(err error) bool { return errdefs.IsUnavailable(err) }
