package lifecycle

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"sluice/test/bed"
)

// startWaiter starts a container of app:1, named waiter, that reads its files
// when it is let.
func (s *stage) startWaiter(t *testing.T, n *bed.Node) {
	t.Helper()
	_, err := n.Ctr(t.Context(), "run", "--detach", "--net-host", "--snapshotter", bed.Sluice, s.Ref("app:1"), "waiter",
		"/bin/sh", "-c", "while ! test -e /go; do sleep 0.1; done; sha256sum /data/* >/sums; sync; sleep 1000000")
	must(t, err)
}

// letWaiterRead has the container begin.
func letWaiterRead(ctx context.Context, n *bed.Node) error {
	_, err := n.Exec(ctx, "waiter", "/bin/touch", "/go")
	return err
}

// waiterReads waits until the container has read what its files are.
func (s *stage) waiterReads(t *testing.T, n *bed.Node) {
	t.Helper()
	sums := filepath.Join(n.Dir, "sluice", "snapshots", "*", "fs", "sums")
	eventually(t, patience, "the container reads what its files are", func() bool {
		all, _ := filepath.Glob(sums)
		if len(all) != 1 {
			return false
		}
		got, err := os.ReadFile(all[0])
		return err == nil && string(got) == sumsOf(s.app)
	})
}

// removeWaiter kills and removes the container.
func removeWaiter(t *testing.T, n *bed.Node) {
	t.Helper()
	_, err := n.Ctr(t.Context(), "tasks", "rm", "--force", "waiter")
	must(t, err)
	_, err = n.Ctr(t.Context(), "containers", "rm", "waiter")
	must(t, err)
}
