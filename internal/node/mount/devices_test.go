package mount

import (
	"runtime"
	"testing"
	"weak"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/oci"
)

func TestDevicesAreShared(t *testing.T) {
	m := &Manager{shared: make(devicesByKey)}
	var here, elsewhere tableSource
	here.local.Store(&localTable{Source: blob.FromBytes(nil)})
	table := func(src *tableSource, keys ...string) *artifact.Table {
		var t artifact.Table
		for _, k := range keys {
			t.Devices = append(t.Devices, &artifact.Device{Key: oci.DigestOf([]byte(k))})
		}
		m.shareDevices(&t, src)
		return &t
	}
	large := table(&elsewhere, "base")
	a, b := table(&here, "base", "a"), table(&here, "base", "b", "base")
	if b.Devices[0] != a.Devices[0] || b.Devices[2] != a.Devices[0] || b.Devices[1] == a.Devices[1] || len(m.shared) != 3 {
		t.Errorf("%v and %v; %d known", a.Devices, b.Devices, len(m.shared))
	}
	if c := table(&elsewhere, "base"); large.Devices[0] == a.Devices[0] || c.Devices[0] == a.Devices[0] {
		t.Error("an image whose table is in its registry has another's device, or another has its")
	}
	gone := weak.Make(b.Devices[1])
	for range 10 {
		if runtime.GC(); gone.Value() == nil {
			break
		}
	}
	m.forgetDevices()
	if len(m.shared) != 2 {
		t.Errorf("%d devices are known when one image is gone, of 2", len(m.shared))
	}
	runtime.KeepAlive(a)
}
