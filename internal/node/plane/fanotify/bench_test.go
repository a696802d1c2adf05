package fanotify_test

import (
	"context"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fanotify"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/plane/local"
	"sluice/internal/node/plane/planetest"
)

// BenchmarkPlanes compares this plane with FUSE, and both with EROFS on complete
// local files, see docs/decisions/0009. Content is a file in the page cache, as a
// filled chunk cache is. "cold" is the first read of a mount; "again" the same
// read when EROFS has dropped its pages, as under memory pressure; "complete"
// that of a device whose content says that it is complete.
func BenchmarkPlanes(b *testing.B) {
	need(b)
	const size = 256 << 20
	img := benchImage(b, size)
	for _, state := range []string{"cold", "again", "complete"} {
		for _, read := range []struct {
			name string
			run  func(b *testing.B, name string, size int64) []time.Duration
		}{
			{"sequential", readSequential},
			{"random4k", func(b *testing.B, name string, size int64) []time.Duration { return readRandom(b, name, size, 4<<10) }},
			{"random64k", func(b *testing.B, name string, size int64) []time.Duration { return readRandom(b, name, size, 64<<10) }},
		} {
			for _, p := range benchPlanes {
				b.Run(state+"/"+read.name+"/"+p.name, func(b *testing.B) {
					served := p.open(b)
					var all []time.Duration
					for b.Loop() {
						b.StopTimer()
						dir := benchAttach(b, served, img, state, read.run)
						b.StartTimer()
						all = append(all, read.run(b, filepath.Join(dir, "big"), size)...)
						b.StopTimer()
						if err := served.Detach(b.Context(), dir); err != nil {
							b.Fatal(err)
						}
						b.StartTimer()
					}
					if read.name == "sequential" {
						b.SetBytes(size)
					}
					slices.Sort(all)
					b.ReportMetric(float64(all[len(all)/2].Nanoseconds())/1e3, "p50-µs")
					b.ReportMetric(float64(all[len(all)*99/100].Nanoseconds())/1e3, "p99-µs")
				})
			}
		}
	}
}

var benchPlanes = []struct {
	name string
	open func(b *testing.B) plane.Plane
}{
	{"local", func(b *testing.B) plane.Plane { return local.New(b.TempDir()) }},
	{"fuse", func(b *testing.B) plane.Plane {
		p, err := fuse.Open(b.Context(), fuse.Options{
			Dir: filepath.Join(b.TempDir(), fuseName), HolderCommand: planetest.HolderCommand(), Log: slog.New(slog.DiscardHandler),
		})
		return benchServed(b, p, err)
	}},
	{"fanotify", func(b *testing.B) plane.Plane {
		p, err := fanotify.Open(b.Context(), options(b.TempDir(), slog.New(slog.DiscardHandler)))
		return benchServed(b, p, err)
	}},
}

func benchServed(b *testing.B, p planetest.Served, err error) plane.Plane {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := p.Shutdown(context.Background()); err != nil {
			b.Error(err)
		}
	})
	return p
}

// benchImage is one large file on a device whose content is a local file.
func benchImage(b *testing.B, size int64) plane.Image {
	b.Helper()
	name := filepath.Join(b.TempDir(), "content")
	f, err := os.Create(name)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		planetest.Pattern(1).Fill(buf, off)
		if _, err := f.WriteAt(buf, off); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	files := []planetest.File{{Name: "big", Size: size, Pieces: []planetest.Piece{{Pattern: 1, Length: size}}}}
	img := planetest.Attachable(b, b.TempDir(), []planetest.Dev{planetest.NewDev(1, size)}, files)
	img.Devices[0].Content = partial{f}
	return img
}

// partial is the content of a file that doesn't say that it is complete.
type partial struct{ f *os.File }

func (p partial) ReadAt(_ context.Context, b []byte, off int64) (int, error) {
	return p.f.ReadAt(b, off)
}

// benchAttach attaches img and brings it into a state.
func benchAttach(b *testing.B, p plane.Plane, img plane.Image, state string, read func(b *testing.B, name string, size int64) []time.Duration) string {
	b.Helper()
	img.Devices = slices.Clone(img.Devices)
	size := img.Devices[0].Size
	if state == "complete" {
		img.Devices[0].Content = plane.FileContent{File: img.Devices[0].Content.(partial).f}
	}
	dir := b.TempDir()
	if err := p.Attach(b.Context(), img, dir); err != nil {
		b.Fatal(err)
	}
	name := filepath.Join(dir, "big")
	switch state {
	case "again":
		read(b, name, size)
	case "complete":
		readSequential(b, name, size)
	}
	f, err := os.Open(name)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		b.Fatal(err)
	}
	return dir
}

func readSequential(b *testing.B, name string, size int64) (took []time.Duration) {
	f, err := os.Open(name)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for {
		began := time.Now()
		if _, err := f.Read(buf); err == io.EOF {
			return took
		} else if err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
}

// readRandom reads 2,000 random ranges of n bytes.
func readRandom(b *testing.B, name string, size, n int64) (took []time.Duration) {
	f, err := os.Open(name)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		b.Fatal(err)
	}
	random := rand.New(rand.NewPCG(2, 2))
	buf := make([]byte, n)
	for range 2000 {
		began := time.Now()
		if _, err := f.ReadAt(buf, random.Int64N(size/n)*n); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	return took
}
