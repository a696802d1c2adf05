package flows

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"sluice/test/bed"
)

// rounds is how often the quick ways are measured; the traditional pull is, once.
const rounds = 3

// TestFlows starts the images in all ways. What it holds depends on no machine's
// speed, but for one generous bound; the times are figures.
func TestFlows(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting images and running containers needs root")
	}
	s := newStage(t)
	images, err := Debian(t.Context(), func(s string) { t.Log(s) }, "python3", "-c", `print("hi")`)
	if err != nil {
		t.Fatal(err)
	}
	starts := map[Way]map[int][]bed.ColdStart{Traditional: {}, Teleport: {}, Streamed: {}} // by layers
	for _, i := range images {
		if err := s.Publish(t.Context(), i); err != nil {
			t.Fatal(err)
		}
	}
	for round := range rounds {
		for _, i := range images {
			for w, by := range starts {
				if w == Traditional && round > 0 {
					continue
				}
				c, err := s.Start(t.Context(), i, w)
				if err != nil {
					t.Fatal(err)
				}
				by[i.Layers] = append(by[i.Layers], c)
				t.Logf("FIGURE %s, %s: %.2f s (pull %.2f, run %.2f), %.1f MB, %d connections, %d mounts", i.Name, w.Name,
					c.Total().Seconds(), c.Pull.Seconds(), c.FirstOutput.Seconds(), float64(c.Bytes)/1e6, c.Connections, c.Mounts)
			}
		}
	}
	for w, by := range starts {
		for _, i := range images {
			for _, c := range by[i.Layers] {
				check(t, w, i, c, starts[Traditional][i.Layers][0])
			}
		}
	}
	for _, w := range []Way{Teleport, Streamed} {
		one, many := fastest(starts[w][1]), fastest(starts[w][bed.ManyLayers])
		cost := (many - one) / (bed.ManyLayers - 1)
		t.Logf("FIGURE %s: %.2f s with 1 layer, %.2f s with %d, the fastest of %d: ratio %.2f, %.1f ms for each layer more", w.Name,
			one.Seconds(), many.Seconds(), bed.ManyLayers, rounds, many.Seconds()/one.Seconds(), 1e3*cost.Seconds())
		if cost > 100*time.Millisecond { // the goal of Teleport's is 25 ms
			t.Errorf("%s: each layer more costs %v", w.Name, cost)
		}
	}
}

// check holds what is so of every start, beside that by the traditional pull.
func check(t *testing.T, w Way, i Image, c, pulled bed.ColdStart) {
	t.Helper()
	if c.Output != "hi\n" {
		t.Errorf("%s, %s: printed %q", i.Name, w.Name, c.Output)
	}
	mounts := pulled.Mounts // the container's own overlayfs
	switch w {
	case Teleport:
		mounts += i.Disks
	case Streamed:
		mounts++ // however many layers
	default:
		return
	}
	if c.Mounts != mounts {
		t.Errorf("%s, %s: %d mounts, want %d", i.Name, w.Name, c.Mounts, mounts)
	}
	if c.Bytes > pulled.Bytes/4 {
		t.Errorf("%s, %s: %d bytes, which isn't much less than the %d of all of it", i.Name, w.Name, c.Bytes, pulled.Bytes)
	}
}

// fastest is what a shared machine disturbs least.
func fastest(all []bed.ColdStart) time.Duration {
	return slices.MinFunc(all, func(a, b bed.ColdStart) int { return cmp.Compare(a.Total(), b.Total()) }).Total()
}

func newStage(t *testing.T) *Stage {
	t.Helper()
	src, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	work, err := os.MkdirTemp("", "sluice-flows-") // with a name that is short, as overlayfs wants it
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), Options{
		Src: src, Work: work, Ways: []Way{Traditional, Teleport, Streamed}, Rate: 200e6, RTT: 10 * time.Millisecond,
		Say: func(s string) { t.Log(s) },
	})
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err) // what is still mounted must not be removed
			return
		}
		if err := os.RemoveAll(work); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}
