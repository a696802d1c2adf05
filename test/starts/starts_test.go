package starts

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"testing"
	"time"

	"sluice/test/bed"
)

// rounds is how often each is measured.
const rounds = 3

// contender is a snapshotter with an image.
type contender struct{ snapshotter, image string }

func (c contender) String() string { return c.snapshotter + " " + c.image }

// TestColdStartsBesideStargz measures cold starts to the first output on two
// links.
func TestColdStartsBesideStargz(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting images and running containers needs root")
	}
	s := newStage(t)
	for _, l := range []struct {
		name string
		rate float64
		rtt  time.Duration
	}{
		{"200 Mbit/s, 10 ms", 200e6, 10 * time.Millisecond},
		{"1 Gbit/s, 1 ms", 1e9, time.Millisecond},
	} {
		t.Run(l.name, func(t *testing.T) {
			link, err := bed.NewLink(t.Context(), s.Registry.Addr, l.rate, l.rtt)
			if err != nil {
				t.Fatal(err)
			}
			defer link.Close()
			starts := map[contender][]bed.ColdStart{}
			for range rounds {
				for _, c := range []contender{{bed.Sluice, "debian:1"}, {bed.Stargz, "debian:1"}, {bed.Sluice, "debian:28"}, {bed.Stargz, "debian:28"}} {
					starts[c] = append(starts[c], s.cold(t, link, c))
				}
			}
			report(t, l.name, starts)
		})
	}
}

// report prints medians and ratios.
func report(t *testing.T, link string, starts map[contender][]bed.ColdStart) {
	t.Helper()
	medians := map[contender]float64{}
	for _, c := range slices.SortedFunc(maps.Keys(starts), func(a, b contender) int { return compare(a.String(), b.String()) }) {
		all := starts[c]
		slices.SortFunc(all, func(a, b bed.ColdStart) int { return compare(a.Total(), b.Total()) })
		m := all[len(all)/2]
		medians[c] = m.Total().Seconds()
		t.Logf("FIGURE %s, %s: %.3f s (pull %.3f, run %.3f), %.1f MB, %d connections, %d mounts", link, c,
			m.Total().Seconds(), m.Pull.Seconds(), m.FirstOutput.Seconds(), float64(m.Bytes)/1e6, m.Connections, m.Mounts)
	}
	for _, image := range []string{"debian:1", "debian:28"} {
		t.Logf("FIGURE %s, %s: sluice takes %.2f of the time of stargz at its best", link, image,
			medians[contender{bed.Sluice, image}]/medians[contender{bed.Stargz, image}])
	}
}

func compare[T ~int64 | ~string](a, b T) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// stage is a registry with the images in both forms.
type stage struct {
	*bed.Stage
	stargz bed.StargzTools
}

func newStage(t *testing.T) *stage {
	t.Helper()
	say := func(s string) { t.Log(s) }
	s := &stage{Stage: setUp(t)}
	var plain, optimized bed.Images
	for _, step := range []func() error{
		func() (err error) { s.stargz, err = bed.BuildStargz(t.Context(), s.Src, say); return },
		func() (err error) { plain, err = bed.Debian(t.Context(), say); return },
		func() (err error) { optimized, err = bed.DebianStargz(t.Context(), s.stargz, plain, say); return },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	for name, layout := range map[string]string{
		"sluice/debian:1": plain.OneLayer, "sluice/debian:28": plain.ManyLayers,
		"stargz/debian:1": optimized.OneLayer, "stargz/debian:28": optimized.ManyLayers,
	} {
		if err := s.Push(t.Context(), layout, name); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"sluice/debian:1", "sluice/debian:28"} {
		if err := s.Convert(t.Context(), s.Ref(name)); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// setUp makes the ground on which a test stands, and takes it away at the end.
func setUp(t *testing.T) *bed.Stage {
	t.Helper()
	s, err := bed.NewStage(t.Context(), "starts", func(s string) { t.Log(s) })
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// cold measures one cold start.
func (s *stage) cold(t *testing.T, link *bed.Link, c contender) bed.ColdStart {
	t.Helper()
	ref := fmt.Sprintf("%s/%s/%s", link.Addr(), c.snapshotter, c.image)
	var got bed.ColdStart
	var err error
	if c.snapshotter == bed.Stargz {
		got, err = bed.ColdStargz(t.Context(), s.Tools, s.stargz, s.Work, link, ref, bed.StargzCommand()...)
	} else {
		got, err = bed.Cold(t.Context(), s.Tools, s.Sluice, s.Work, link, c.snapshotter, ref, bed.StargzCommand()...)
	}
	if err != nil {
		t.Fatalf("%s: %v", c, err)
	}
	if got.Output != "hi\n" {
		t.Fatalf("%s printed %q", c, got.Output)
	}
	return got
}
