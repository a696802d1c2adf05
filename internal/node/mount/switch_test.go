package mount_test

import (
	"strings"
	"testing"

	"sluice/internal/node/mount"
)

// While the switch is off nothing that's pulled streams, also what would without
// the registry; what was answered before isn't the answer when it's on again.
func TestSwitch(t *testing.T) {
	n, manifest := prepared(t)
	m := n.start()
	if s := m.Status(t.Context()).Switch; s != (mount.Switch{}) {
		t.Errorf("at the start the switch is %+v", s)
	}
	m.SetSwitch(mount.Switch{Off: true, Why: "the node is drained"})
	for range 2 {
		if _, err := m.Pull(t.Context(), testRef, manifest); mount.ReasonOf(err) != mount.Disabled || !strings.Contains(err.Error(), "the node is drained") {
			t.Errorf("a pull while it's off: %v", err)
		}
	}
	m.SetSwitch(mount.Switch{})
	img, err := m.Pull(t.Context(), testRef, manifest)
	if err != nil {
		t.Fatalf("a pull when it's on again: %v", err)
	}
	m.SetSwitch(mount.Switch{Off: true})
	if _, err := m.Pull(t.Context(), testRef, manifest); mount.ReasonOf(err) != mount.Disabled {
		t.Errorf("a pull of what is here, while it's off: %v", err)
	}
	if _, err := m.Attach(t.Context(), img.ID, mount.Merged, "container"); err != nil {
		t.Errorf("what streams doesn't go on: %v", err)
	}
	if got := len(m.Status(t.Context()).Pulls); got != 3 {
		t.Errorf("the status has %d pulls, want 3: the second was answered like the first", got)
	}
}

// Who starts the daemon has the last word.
func TestSwitchOfADisabledNode(t *testing.T) {
	n, manifest := prepared(t)
	n.opts.Disabled = true
	m := n.start()
	m.SetSwitch(mount.Switch{})
	if _, err := m.Pull(t.Context(), testRef, manifest); mount.ReasonOf(err) != mount.Disabled {
		t.Errorf("a pull: %v", err)
	}
	if !m.Status(t.Context()).Switch.Off {
		t.Error("the status says that images stream")
	}
}
