package disks

import (
	"fmt"
	"testing"
	"time"

	"sluice/oci"
)

// benchLayers is how many layers the benchmarks' image has: as many as the demonstration's.
const benchLayers = 28

// many pushes an image of benchLayers layers.
func (n *node) many() oci.Digest {
	var layers [][]file
	for i := range benchLayers {
		var files []file
		for j := range 50 {
			files = append(files, file{name: fmt.Sprintf("layer%d/file%d", i, j), content: noise(uint64(i*100+j), 20_000)})
		}
		layers = append(layers, files)
	}
	return n.push(testRepo, "v1", layers...)
}

// BenchmarkPull is a pull of an image of which nothing is here, its layers mounted,
// from a file server that takes 10 ms for each answer.
func BenchmarkPull(b *testing.B) {
	n := newNode(b)
	manifest := n.many()
	n.files.Delay(10 * time.Millisecond)
	m := n.start()
	m.Settled()
	for b.Loop() {
		img := n.pull(testRepo, "v1", manifest)
		b.StopTimer()
		if err := m.Hold(b.Context(), img.ID, 0, "me"); err != nil {
			b.Fatal(err)
		}
		if err := m.Release(b.Context(), "me"); err != nil {
			b.Fatal(err)
		}
		m.Collect(b.Context())
		n.removed()
		b.StartTimer()
	}
	perLayer(b)
}

// BenchmarkStack mounts the layers of an image that is here.
func BenchmarkStack(b *testing.B) {
	n := newNode(b)
	manifest := n.many()
	m := n.start()
	m.Settled()
	img := n.pull(testRepo, "v1", manifest)
	if err := m.Hold(b.Context(), img.ID, benchLayers-1, "holder"); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		b.StopTimer()
		if err := m.Release(b.Context(), "me"); err != nil {
			b.Fatal(err)
		}
		m.Sweep(b.Context(), time.Now())
		b.StartTimer()
		if _, err := m.Stack(b.Context(), img.ID, "me"); err != nil {
			b.Fatal(err)
		}
	}
	perLayer(b)
}

func perLayer(b *testing.B) {
	b.ReportMetric(b.Elapsed().Seconds()*1000/float64(b.N)/benchLayers, "ms/layer")
}
