package mount

import (
	"weak"

	"sluice/internal/artifact"
	"sluice/oci"
)

// shareDevices lets images that have a layer in common have its part of their
// chunk tables in memory once: a device's key says that two are the same. A table
// of which only the root is here needs its own image's registry, and shares none:
// one image's tables being forgotten mustn't have another's asked for there. So
// does a device that isn't loaded, because the disk has damaged it.
func (m *Manager) shareDevices(t *artifact.Table, src *tableSource) {
	if src.local.Load() == nil {
		return
	}
	m.sharing.Lock()
	defer m.sharing.Unlock()
	for i, d := range t.Devices {
		if !d.Loaded() {
			continue
		}
		if same := m.shared[d.Key].Value(); same != nil {
			t.Devices[i] = same
		} else {
			m.shared[d.Key] = weak.Make(d)
		}
	}
}

// forgetDevices forgets the devices that no image has any more.
func (m *Manager) forgetDevices() {
	m.sharing.Lock()
	defer m.sharing.Unlock()
	for key, d := range m.shared {
		if d.Value() == nil {
			delete(m.shared, key)
		}
	}
}

// devicesByKey is the devices of all images' tables, by key, for as long as a table
// has them.
type devicesByKey map[oci.Digest]weak.Pointer[artifact.Device]
