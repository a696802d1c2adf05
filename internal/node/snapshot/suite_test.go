package snapshot_test

import (
	"context"
	"os"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"sluice/internal/node/snapshot"
)

// TestContainerdSuite runs containerd's own suite, as the proxy plugin uses the
// snapshotter (the suite leaves out renames of lower directories for the name
// "overlayfs", because the kernel's default forbids them) and with the option
// that allows them.
func TestContainerdSuite(t *testing.T) {
	needRoot(t)
	t.Run("default", func(t *testing.T) {
		testsuite.SnapshotterSuite(t, "overlayfs", opener(nil))
	})
	t.Run("redirect", func(t *testing.T) {
		testsuite.SnapshotterSuite(t, "sluice", opener([]string{"redirect_dir=on"}))
	})
}

func opener(options []string) testsuite.SnapshotterFunc {
	return func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := snapshot.Open(ctx, snapshot.Options{Root: root, MountOptions: options})
		if err != nil {
			return nil, nil, err
		}
		return s, s.Close, nil
	}
}

// needRoot skips a test that mounts where that isn't allowed.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting overlayfs needs root")
	}
}
