package fuse_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/plane/planetest"
)

// BenchmarkRead compares the ways of reading devices, see docs/decisions/0002.
// "local" content is a file in the page cache, as a filled chunk cache is;
// "remote" is the same with 5 ms for the first touch of each 256 KiB.
func BenchmarkRead(b *testing.B) {
	needRoot(b)
	const size = 256 << 20
	file := filepath.Join(b.TempDir(), "device")
	writeDevice(b, file, size)
	small, big := smallFiles(b, size), bigFile(b, size)
	for _, remote := range []bool{false, true} {
		for _, mode := range benchModes {
			name := fmt.Sprintf("%s/%s", map[bool]string{false: "local", true: "remote"}[remote], mode.name)
			run := func(what string, img planetest.Image, read func(b *testing.B, img planetest.Image, dir string)) {
				b.Run(name+"/"+what, func(b *testing.B) { benchRead(b, file, mode.opts, remote, img, read) })
			}
			run("sequential", big, readSequential)
			run("random4k", big, readRandom)
			run("smallfiles", small, readWhole)
			run("smallfiles4", small, readScattered)
		}
	}
}

var benchModes = []struct {
	name string
	opts fuse.Options
}{
	{"buffered", fuse.Options{}},
	{"buffered-ra128k", fuse.Options{Readahead: 128 << 10}},
	{"buffered-ra1m", fuse.Options{Readahead: 1 << 20}},
	{"direct", fuse.Options{DirectIO: true}},
}

const benchSeed = 77

func writeDevice(b *testing.B, name string, size int64) {
	b.Helper()
	f, err := os.Create(name)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		planetest.Pattern(benchSeed).Fill(buf, off)
		if _, err := f.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
}

func bigFile(b *testing.B, size int64) planetest.Image {
	dev := planetest.NewDev(benchSeed, size)
	files := []planetest.File{{Name: "big", Size: size, Pieces: []planetest.Piece{{Pattern: benchSeed, Length: size}}}}
	return planetest.Image{Plane: planetest.Attachable(b, b.TempDir(), []planetest.Dev{dev}, files), Files: files}
}

// smallFiles are laid out as in a tar: one behind the other, 8 KiB on average.
func smallFiles(b *testing.B, size int64) planetest.Image {
	dev := planetest.NewDev(benchSeed, size)
	random := rand.New(rand.NewPCG(1, 1))
	var files []planetest.File
	for off := int64(512); len(files) < 8000; {
		length := 1 + int64(random.ExpFloat64()*8192)
		files = append(files, planetest.File{
			Name: fmt.Sprintf("f%05d", len(files)), Size: length,
			Pieces: []planetest.Piece{{Pattern: benchSeed, Offset: off, Length: length}},
		})
		off += (length+511)&^511 + 512
	}
	return planetest.Image{Plane: planetest.Attachable(b, b.TempDir(), []planetest.Dev{dev}, files), Files: files}
}

// chunked is a file whose chunks take time when they are first touched.
type chunked struct {
	plane.FileContent
	delay time.Duration
	mu    sync.Mutex
	seen  map[int64]chan struct{}
}

func (c *chunked) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if c.delay > 0 {
		var fetching sync.WaitGroup
		for chunk := off >> 18; chunk <= (off+int64(len(p))-1)>>18; chunk++ {
			c.mu.Lock()
			ready, ok := c.seen[chunk]
			if !ok {
				ready = make(chan struct{})
				c.seen[chunk] = ready
				fetching.Go(func() { time.Sleep(c.delay); close(ready) })
			}
			c.mu.Unlock()
			defer func() { <-ready }()
			fetching.Go(func() { <-ready })
		}
		fetching.Wait()
	}
	return c.FileContent.ReadAt(ctx, p, off)
}

func benchRead(b *testing.B, file string, opts fuse.Options, remote bool, img planetest.Image, read func(b *testing.B, img planetest.Image, dir string)) {
	f, err := os.Open(file)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	opts.Dir, opts.HolderCommand, opts.Log = b.TempDir(), planetest.HolderCommand(), slog.New(slog.DiscardHandler)
	p, err := fuse.Open(b.Context(), opts)
	if err != nil {
		b.Fatal(err)
	}
	defer p.Shutdown(context.Background())
	dir := b.TempDir()
	var cpu time.Duration
	for b.Loop() {
		b.StopTimer()
		content := &chunked{FileContent: plane.FileContent{File: f}, seen: map[int64]chan struct{}{}}
		if remote {
			content.delay = 5 * time.Millisecond
		}
		img.Plane.Devices[0].Content = content
		if err := p.Attach(b.Context(), img.Plane, dir); err != nil {
			b.Fatal(err)
		}
		runtime.GC()
		before := cpuTime()
		b.StartTimer()
		read(b, img, dir)
		b.StopTimer()
		cpu += cpuTime() - before
		if err := p.Detach(b.Context(), dir); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(p.Stats().Reads)/float64(b.N), "requests/op")
	b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms/op")
}

func cpuTime() time.Duration {
	var u unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func readSequential(b *testing.B, img planetest.Image, dir string) {
	readWhole(b, img, dir)
	b.SetBytes(img.Files[0].Size)
}

func readWhole(b *testing.B, img planetest.Image, dir string) {
	buf := make([]byte, 1<<20)
	for _, f := range img.Files {
		readFile(b, filepath.Join(dir, f.Name), buf)
	}
}

func readFile(b *testing.B, name string, buf []byte) {
	r, err := os.Open(name)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	for {
		if _, err := r.Read(buf); err == io.EOF {
			return
		} else if err != nil {
			b.Fatal(err)
		}
	}
}

// readScattered reads a tenth of the files, as a program's start does: runs of
// a few neighbours here and there.
func readScattered(b *testing.B, img planetest.Image, dir string) {
	buf := make([]byte, 1<<20)
	random := rand.New(rand.NewPCG(3, 3))
	for range 200 {
		at := random.IntN(len(img.Files) - 4)
		for _, f := range img.Files[at : at+4] {
			readFile(b, filepath.Join(dir, f.Name), buf)
		}
	}
}

// readRandom reads 2,000 random pages.
func readRandom(b *testing.B, img planetest.Image, dir string) {
	r, err := os.Open(filepath.Join(dir, img.Files[0].Name))
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	if err := unix.Fadvise(int(r.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		b.Fatal(err)
	}
	random := rand.New(rand.NewPCG(2, 2))
	buf := make([]byte, 4096)
	for range 2000 {
		if _, err := r.ReadAt(buf, random.Int64N(img.Files[0].Size/4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
}
