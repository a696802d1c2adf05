package mount_test

import (
	"sync/atomic"
	"testing"

	"sluice/internal/node/mount"
)

// A refusal is remembered as long as this node has no other credentials.
func TestRefusedUntilOtherCredentials(t *testing.T) {
	n, manifest := prepared(t)
	var identity atomic.Value
	identity.Store("nobody")
	n.opts.Identity = func(registry, repository string) string {
		if registry != testHost || repository != testRepo {
			t.Errorf("asked who this node is to %s/%s", registry, repository)
		}
		return identity.Load().(string)
	}
	n.reg.denied.Store(true)
	m := n.start()
	refused := func(want int64) {
		t.Helper()
		for range 3 {
			if _, err := m.Pull(t.Context(), testRef, manifest); mount.ReasonOf(err) != mount.Unauthorized {
				t.Errorf("%v, want Unauthorized", err)
			}
		}
		if got := n.reg.listings.Load(); got != want {
			t.Errorf("the registry was asked %d times, want %d", got, want)
		}
	}
	refused(1)
	identity.Store("somebody")
	refused(2) // by others, too
	n.reg.denied.Store(false)
	identity.Store("the right one")
	if _, err := m.Pull(t.Context(), testRef, manifest); err != nil {
		t.Error(err)
	}
}
