package lifecycle

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sluice/test/bed"
)

// TestEveryContainerd runs pods with each version of containerd, pulled by the
// transfer service and by the CRI plugin itself.
func TestEveryContainerd(t *testing.T) {
	s := theStage(t)
	versions, err := bed.BuildOlderAndNewer(t.Context(), s.Tools, s.Src, func(s string) { t.Log(s) })
	must(t, err)
	versions["2.3"] = s.Tools
	for _, v := range slices.Sorted(maps.Keys(versions)) {
		for _, local := range []bool{false, true} {
			name := v + "/transfer"
			if local {
				name = v + "/local"
			}
			t.Run(name, func(t *testing.T) { s.podLife(t, versions[v], local) })
		}
	}
}

// podLife is the life of a pod: pulled, run, looked at, outliving both daemons,
// and removed with its image.
func (s *stage) podLife(t *testing.T, tools bed.Tools, local bool) {
	n := s.newNode(t, tools)
	must(t, n.EnableCRI(bed.CRI{LocalPull: local, Sandbox: s.Ref("plain:1")}, s.Registry.Addr))
	start(t, n)
	k, err := n.Kubelet("")
	must(t, err)
	defer k.Close()
	must(t, k.Pull(t.Context(), s.Ref("app:1"), nil))
	streams(t, n, s.Ref("app:1"))
	if big := layerBlobs(t, n); len(big) > 0 {
		t.Errorf("containerd downloaded layers of an image that streams: %q", big)
	}
	pod, err := k.RunPod(t.Context(), s.Ref("app:1"), false, "/bin/sh", "-c", "sha256sum /data/*; echo ready; sleep 1000000")
	must(t, err)
	eventually(t, patience, "the container printed what its files are", func() bool { return podPrinted(pod, sumsOf(s.app)+"ready\n") })
	s.figures(t, n, k)

	n.Sluice.Kill()
	n.Containerd.Kill()
	must(t, n.StartContainerd(t.Context())) // before the snapshotter that it needs
	must(t, n.StartSluice(t.Context()))
	got, err := k.Runtime.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: pod.Container})
	must(t, err)
	if got.Status.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after restarts of both daemons the container is %v", got.Status.State)
	}
	exec, err := k.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: pod.Container, Cmd: checkSums(), Timeout: 60})
	must(t, err)
	if string(exec.Stdout) != sumsOf(s.app) {
		t.Errorf("after restarts of both daemons: %s%s", exec.Stdout, exec.Stderr)
	}

	connected(t, n)
	// A containerd that started without its snapshotter doesn't tell kubelet of
	// the images that it has, and kubelet pulls them again.
	must(t, k.Pull(t.Context(), s.Ref("app:1"), nil))
	must(t, k.RemovePod(t.Context(), pod))
	_, err = k.Images.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: s.Ref("app:1")}})
	must(t, err)
	isFreed(t, n)
}

// figures checks what kubelet asks of images and containers.
func (s *stage) figures(t *testing.T, n *bed.Node, k *bed.Kubelet) {
	t.Helper()
	fs, err := k.Images.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{})
	must(t, err)
	if len(fs.ImageFilesystems) != 1 || fs.ImageFilesystems[0].GetFsId().GetMountpoint() != filepath.Join(n.Dir, "sluice") {
		t.Errorf("image file systems: %v, want that of %s", fs.ImageFilesystems, filepath.Join(n.Dir, "sluice"))
	}
	// containerd counts what snapshots use every ten seconds; it may not have yet.
	images, err := k.Images.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	must(t, err)
	for _, i := range images.Images {
		if i.Size == 0 {
			t.Errorf("image %v has size 0, which kubelet takes for broken", i.RepoTags)
		}
	}
	_, err = k.Runtime.ListContainerStats(t.Context(), &runtimeapi.ListContainerStatsRequest{})
	must(t, err)
}

// layerBlobs lists the blobs in containerd's content store that are larger than
// any manifest or config of the stage.
func layerBlobs(t *testing.T, n *bed.Node) []string {
	t.Helper()
	var big []string
	dir := filepath.Join(n.Dir, "containerd", "io.containerd.content.v1.content", "blobs", "sha256")
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		if fi, err := e.Info(); err == nil && fi.Size() > 8<<10 {
			big = append(big, fmt.Sprintf("%s of %d bytes", e.Name(), fi.Size()))
		}
	}
	return big
}

// sharedLayers is how many layers plain:1 has in common with app:1. When it
// came second they go with it, not with app:1.
const sharedLayers = 2

// isFreed waits until app:1, which was removed, has given back its content.
func isFreed(t *testing.T, n *bed.Node) {
	t.Helper()
	defer func() {
		if t.Failed() {
			snapshots, _ := n.Ctr(t.Context(), "--namespace", "k8s.io", "snapshots", "--snapshotter", bed.Sluice, "ls")
			t.Logf("%d layers, images %+v, snapshots\n%s", cachedLayers(t, n), status(t, n).Images, snapshots)
		}
	}()
	collected(t, n, "the removed image's content is gone", func() bool { return cachedLayers(t, n) == sharedLayers })
}

// cachedLayers counts the layers in the node's cache.
func cachedLayers(t *testing.T, n *bed.Node) int {
	t.Helper()
	entries, err := filepath.Glob(filepath.Join(n.Dir, "sluice", "cache", "sha256-*"))
	must(t, err)
	return len(entries)
}

// podPrinted reports whether a pod's log has exactly that text.
func podPrinted(p bed.Pod, want string) bool {
	b, err := os.ReadFile(p.Log)
	if err != nil {
		return false
	}
	var text strings.Builder
	for line := range strings.Lines(string(b)) {
		// time, stream, tag, text
		if f := strings.SplitN(line, " ", 4); len(f) == 4 {
			text.WriteString(f[3])
		}
	}
	return text.String() == want
}
