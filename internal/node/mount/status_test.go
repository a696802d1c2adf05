package mount_test

import (
	"testing"
	"time"

	"sluice/internal/node/mount"
)

// What reading an image cost is known of the image, and goes with it.
func TestStatusOfAnImage(t *testing.T) {
	n, manifest := prepared(t)
	m := n.start()
	m.Settled()
	_, dir := n.pulled(manifest, "a")
	checkImage(t, dir)
	var s mount.Status
	eventually(t, "the image's traffic is all there was", func() bool { // when nothing is under way
		s = m.Status(t.Context())
		return len(s.Images) == 1 && s.Images[0].Traffic == s.Traffic
	})
	if len(s.NotStreaming) != 0 {
		t.Errorf("status is %+v", s)
	}
	i := s.Images[0]
	if i.State != mount.StateStreaming || i.Plane != "fuse" || i.Percent <= 0 || i.Remedy != "" {
		t.Errorf("image is %+v", i)
	}
	r := i.Reads
	if r.Faults == 0 || r.Failures != 0 || r.Wait <= 0 || r.Bytes["fault"] == 0 || r.Bytes["background"] != 0 {
		t.Errorf("reads are %+v", r)
	}
	var faults int64
	for _, n := range r.Latency {
		faults += n
	}
	if faults != r.Faults {
		t.Errorf("the histogram has %d faults, there were %d", faults, r.Faults)
	}
	if i.Traffic.Requests == 0 || i.Traffic.Bytes < r.Bytes["fault"] {
		t.Errorf("traffic is %+v", i.Traffic)
	}
	if len(s.Counts) != 1 || s.Counts[0].Reason != "" || s.Counts[0].Pulls != 1 || s.Counts[0].Time <= 0 {
		t.Errorf("pulls are %+v", s.Counts)
	}

	if err := m.Release(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	m.Sweep(t.Context(), time.Now().Add(time.Hour))
	if s = m.Status(t.Context()); len(s.Images) != 0 {
		t.Errorf("a removed image has a status: %+v", s.Images)
	}
}

// Once all content is here, a new mount needs nobody who supplies it.
func TestStatusOfACompleteImage(t *testing.T) {
	n, manifest := prepared(t)
	n.opts.NoFill = false
	m := n.start()
	n.pulled(manifest, "")
	eventually(t, "the image is complete", func() bool { return m.Status(t.Context()).Images[0].State == mount.StateComplete })
	n.reboot()
	m = n.start()
	n.pulled(manifest, "")
	eventually(t, "it's complete after a reboot", func() bool {
		i := m.Status(t.Context()).Images[0]
		return i.State == mount.StateComplete && i.Percent == 100 && i.Plane == "files"
	})
}
