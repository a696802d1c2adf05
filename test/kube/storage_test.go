package kube

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestImageGarbageCollection fills the node's disk until kubelet removes images
// that no pod uses: those that stream go, and their content with them; the one
// that is used stays, and is read right. It's the last test of this package by the
// name of its file: kubelet's view of the disk lags, and it may refuse pods for a
// while after.
func TestImageGarbageCollection(t *testing.T) {
	s := theStage(t)
	n := s.newNamespace(t)
	// Kubelet's view of the disk is older than its removal of images, so it evicts
	// pods, too, but no critical ones.
	n.apply(t, strings.Replace(pod1("used", s.ref("app:1")), "spec:", "spec:\n  priorityClassName: system-node-critical", 1))
	used := n.await(t, "used", 1)[0]
	const size = 60 << 20
	unused := s.newToolbox(t, "unused:1", 8, size)
	n.apply(t, pod1("unused", unused, `command: [/bin/sh, -c, "cat /data/0 >/dev/null; sleep 100000"]`))
	n.await(t, "unused", 1)
	s.streams(t, unused)
	eventually(t, 2*patience, "all of the image is here", func() bool { return s.complete(t, unused) })
	n.end(t, "unused") // with its records: an image of an ended container counts as used

	s.removeUnused(t, unused)     // kubelet would begin with those, and be content with less
	const want = lowDisk - 20<<20 // so kubelet acts, and is content when the image has gone
	ballast, err := os.Create(s.Path("/var/lib/ballast"))
	must(t, err)
	defer func() {
		ballast.Close()
		must(t, os.Remove(s.Path("/var/lib/ballast")))
	}()
	before := s.free(t)
	must(t, unix.Fallocate(int(ballast.Fd()), 0, 0, before-want))
	eventually(t, 2*patience, "kubelet removed the image that nobody uses", func() bool { return !s.has(t, unused) })
	eventually(t, patience, "its content is gone", func() bool { return s.free(t) > want+size*9/10 })
	if !s.has(t, s.ref("app:1")) {
		t.Error("kubelet removed an image that is used")
	}
	s.readsRight(t, used)
	t.Logf("FIGURE kubelet's garbage collection freed %d MB of a streamed image of %d MB", (s.free(t)-want)>>20, size>>20)
}

// removeUnused removes what earlier tests left: all images but one that no
// container has.
func (s *stage) removeUnused(t *testing.T, but string) {
	t.Helper()
	used := map[string]bool{}
	containers, err := s.cri.Runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
	must(t, err)
	for _, c := range containers.Containers {
		used[c.ImageRef], used[c.ImageId] = true, true
	}
	images, err := s.cri.Images.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	must(t, err)
	for _, image := range images.Images {
		if used[image.Id] || image.Pinned || slices.Contains(image.RepoTags, but) {
			continue
		}
		_, err := s.cri.Images.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: image.Id}})
		must(t, err)
	}
}

// complete reports whether all of an image is on the node.
func (s *stage) complete(t *testing.T, ref string) bool {
	t.Helper()
	for _, image := range s.status(t).Images {
		if image.Reference == ref {
			return image.Complete
		}
	}
	return false
}

// free is how many bytes of the node's disk are.
func (s *stage) free(t *testing.T) int64 {
	t.Helper()
	var disk unix.Statfs_t
	must(t, unix.Statfs(s.Path("/var/lib"), &disk))
	return int64(disk.Bavail) * disk.Bsize
}

// has reports whether kubelet has an image.
func (s *stage) has(t *testing.T, ref string) bool {
	t.Helper()
	got, err := s.cri.Images.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	must(t, err)
	return got.Image != nil
}
