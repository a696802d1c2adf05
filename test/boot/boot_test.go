package boot

import (
	"bytes"
	"context"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"sluice/internal/artifact"
	"sluice/internal/erofs"
)

// What a boot pack may be worth in percent before the test fails: well beside what
// is measured, because timing decides a little of what is touched.
const (
	leastCovered = 70
	mostInVain   = 45
)

// TestBootPacks measures each image: which chunks the kernel asked for up to
// readiness, and which of them the boot pack had brought or was about to bring.
// What it has beyond those is in vain. SLUICE_BOOT_IMAGE names a single image.
func TestBootPacks(t *testing.T) {
	s := newStage(t)
	only := os.Getenv("SLUICE_BOOT_IMAGE")
	var touchedAll, coveredAll, packAll, vainAll int64
	for _, r := range recipes() {
		if only != "" && only != r.name {
			continue
		}
		t.Run(r.name, func(t *testing.T) {
			im := s.push(t, r.name, false)
			with := s.start(t, im, r.ready)
			without := s.start(t, s.push(t, r.name, true), r.ready)
			if t.Failed() {
				return
			}
			w := worthOf(t, im, with.reads)
			t.Logf("FIGURE boot pack of %s: covers %.1f %% of the %.2f MB that start-up touched, brings %.1f %% of its own %.2f MB in vain; ready after %.2f s and %.1f MB, without it %.2f s and %.1f MB",
				r.name, percent(w.covered, w.touched), mb(w.touched), percent(w.pack-w.covered, w.pack), mb(w.pack), with.took.Seconds(), mb(with.bytes), without.took.Seconds(), mb(without.bytes))
			if percent(w.covered, w.touched) < leastCovered {
				t.Errorf("the boot pack covers only %.1f %% of what start-up touches", percent(w.covered, w.touched))
			}
			if percent(w.pack-w.covered, w.pack) > mostInVain {
				t.Errorf("%.1f %% of the boot pack is of no use", percent(w.pack-w.covered, w.pack))
			}
			touchedAll, coveredAll, packAll, vainAll = touchedAll+w.touched, coveredAll+w.covered, packAll+w.pack, vainAll+w.pack-w.covered
			s.explain(t, im, w)
		})
	}
	t.Logf("FIGURE boot packs together: cover %.1f %% of %.1f MB, bring %.1f %% of %.1f MB in vain",
		percent(coveredAll, touchedAll), mb(touchedAll), percent(vainAll, packAll), mb(packAll))
	if only == "" && (percent(coveredAll, touchedAll) < 85 || percent(vainAll, packAll) > 20) {
		t.Error("boot packs are worth less than they were: 90 % and more covered, 10 % and less in vain")
	}
}

func percent(part, whole int64) float64 { return 100 * float64(part) / float64(max(whole, 1)) }

func mb(n int64) float64 { return float64(n) / 1e6 }

// worth is what a boot pack was worth to a start, in bytes of frames: as they
// cross the network.
type worth struct {
	touched, covered, pack int64
	missed, vain           []artifact.ChunkRef // in the order of reading
}

func worthOf(t *testing.T, im streamable, reads []read) worth {
	t.Helper()
	size := func(ref artifact.ChunkRef) int64 {
		c, err := im.table.Devices[ref.Device].Chunk(t.Context(), ref.Index)
		must(t, err)
		return int64(c.BlobLength)
	}
	var w worth
	brought := make(map[artifact.ChunkRef]bool)
	for _, ref := range im.pack {
		brought[ref] = true
		w.pack += size(ref)
	}
	touched := make(map[artifact.ChunkRef]bool)
	for _, r := range reads {
		number := slices.IndexFunc(im.table.Devices, func(d *artifact.Device) bool {
			return r.device == d.Key.Algorithm().String()+"-"+d.Key.Encoded()
		})
		if number < 0 {
			t.Fatalf("a read of %s, which the image doesn't have", r.device)
		}
		d := im.table.Devices[number]
		for at := r.off; at < min(r.off+r.n, d.ContentSize); {
			i, err := d.Find(t.Context(), at)
			must(t, err)
			c, err := d.Chunk(t.Context(), i)
			must(t, err)
			at = c.Offset + int64(c.Length)
			ref := artifact.ChunkRef{Device: number, Index: i}
			if touched[ref] {
				continue
			}
			touched[ref] = true
			w.touched += size(ref)
			if brought[ref] {
				w.covered += size(ref)
			} else {
				w.missed = append(w.missed, ref)
			}
		}
	}
	for _, ref := range im.pack {
		if !touched[ref] {
			w.vain = append(w.vain, ref)
		}
	}
	return w
}

// explain logs which files were missed and which were brought in vain.
func (s *stage) explain(t *testing.T, im streamable, w worth) {
	t.Helper()
	if !testing.Verbose() {
		return
	}
	zr, err := zstd.NewReader(bytes.NewReader(s.blob(t, "boot", im.manifest.Metadata.Blob)))
	must(t, err)
	defer zr.Close()
	var meta bytes.Buffer
	_, err = zr.WriteTo(&meta)
	must(t, err)
	fs, err := erofs.Open(bytes.NewReader(meta.Bytes()), int64(meta.Len()))
	must(t, err)
	names := make(map[artifact.ChunkRef][]string)
	must(t, fs.Walk(context.Background(), func(path string, info erofs.Info) error {
		if info.Mode&0o170000 != 0o100000 {
			return nil
		}
		extents, err := fs.Extents(info.NID)
		if err != nil {
			return err
		}
		for _, e := range extents {
			d := im.table.Devices[e.Device]
			for at := e.Offset; at < min(e.Offset+e.Length, d.ContentSize); {
				i, err := d.Find(t.Context(), at)
				if err != nil {
					return err
				}
				c, err := d.Chunk(t.Context(), i)
				if err != nil {
					return err
				}
				ref := artifact.ChunkRef{Device: e.Device, Index: i}
				if n := len(names[ref]); n < 100 {
					names[ref] = append(names[ref], path)
				}
				at = c.Offset + int64(c.Length)
			}
		}
		return nil
	}))
	for what, refs := range map[string][]artifact.ChunkRef{"missed": w.missed, "in vain": w.vain} {
		for _, ref := range refs {
			t.Logf("%s: chunk %d of device %d: %s", what, ref.Index, ref.Device, strings.Join(names[ref][:min(len(names[ref]), 6)], " "))
		}
	}
}
