package fuse_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/planetest"
)

// TestKill kills daemons with SIGKILL while readers check every byte that they
// get: none may be wrong, none may be refused, and none may come late.
//
// SLUICE_KILLS sets the number of kills (50; 1,000 was done by hand). Devices
// are so large that random reads never hit a cache.
func TestKill(t *testing.T) {
	needRoot(t)
	kills := 50
	if s := os.Getenv("SLUICE_KILLS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		kills = n
	} else if testing.Short() {
		kills = 5
	}
	t.Run("buffered", func(t *testing.T) { killStress(t, kills, daemonSpec{}) })
	t.Run("direct", func(t *testing.T) { killStress(t, max(kills/5, 2), daemonSpec{DirectIO: true}) })
	t.Run("loop", func(t *testing.T) { killStress(t, max(kills/5, 2), daemonSpec{Mode: plane.Loop}) })
	t.Run("loop without resend", func(t *testing.T) {
		killStress(t, max(kills/5, 2), daemonSpec{Mode: plane.Loop, NoResend: true})
	})
}

const (
	killDevices    = 6
	killDeviceSize = 8 << 30
)

func killStress(t *testing.T, kills int, spec daemonSpec) {
	files := killImage(t, &spec)
	d := startDaemon(t, spec)
	defer func() { d.kill(); cleanSpec(t, spec) }()
	d.ready(t)
	r := &killReaders{dir: spec.Images[0].Dir, files: files, until: make(chan struct{})}
	r.start()
	began := time.Now()
	var slowest time.Duration
	for i := range kills {
		if i%5 == 4 { // while it starts
			time.Sleep(rand.N(60 * time.Millisecond))
		} else {
			time.Sleep(20*time.Millisecond + rand.N(300*time.Millisecond))
		}
		d.kill()
		start := time.Now()
		d = startDaemon(t, spec)
		if i%5 != 3 {
			if s := d.ready(t); !s.Resumed {
				t.Fatalf("kill %d: the daemon did not resume: %+v", i, s)
			}
			slowest = max(slowest, time.Since(start))
		}
	}
	took := time.Since(began)
	close(r.until)
	r.running.Wait()
	t.Logf("%d kills in %v: %d reads verified, %d wrong, %d refused, %d faults through mappings; longest read %v, slowest restart %v",
		kills, took.Round(time.Millisecond), r.good.Load(), r.wrong.Load(), r.refused.Load(), r.faults.Load(),
		time.Duration(r.longest.Load()).Round(time.Millisecond), slowest.Round(time.Millisecond))
	if r.wrong.Load() > 0 || r.refused.Load() > 0 && !spec.NoResend {
		t.Errorf("%d reads gave wrong bytes, %d failed; the first: %v", r.wrong.Load(), r.refused.Load(), r.first.Load())
	}
	if l := time.Duration(r.longest.Load()); l > 5*time.Second {
		t.Errorf("a read took %v", l)
	}
	if r.good.Load() < int64(kills)*10 {
		t.Errorf("only %d reads: the test did not test much", r.good.Load())
	}
}

// killImage makes spec's only image.
func killImage(t *testing.T, spec *daemonSpec) []planetest.File {
	t.Helper()
	var devs []planetest.Dev
	var files []planetest.File
	img := daemonImage{Dir: t.TempDir()}
	for i := range killDevices {
		dev := planetest.NewDev(uint64(i+1), killDeviceSize)
		devs = append(devs, dev)
		files = append(files, planetest.File{
			Name: fmt.Sprintf("file%d", i), Size: killDeviceSize,
			Pieces: []planetest.Piece{{Pattern: dev.Content.Pattern, Dev: i, Length: killDeviceSize}},
		})
		img.Seeds, img.Sizes = append(img.Seeds, uint64(i+1)), append(img.Sizes, killDeviceSize)
	}
	img.Metadata = planetest.Attachable(t, t.TempDir(), devs, files).Metadata
	spec.Dir, spec.Images, spec.MaxDelay = t.TempDir(), []daemonImage{img}, 6*time.Millisecond
	return files
}

// killReaders read until told to stop.
type killReaders struct {
	dir     string
	files   []planetest.File
	until   chan struct{}
	running sync.WaitGroup

	good, wrong, refused, faults, longest atomic.Int64
	first                                 atomic.Value // what first went wrong
}

func (r *killReaders) start() {
	for i := range 12 {
		f := r.files[i%len(r.files)]
		switch {
		case i < 8:
			r.running.Go(func() { r.random(f) })
		case i < 10:
			r.running.Go(func() { r.sequential(f) })
		default:
			r.running.Go(func() { r.mapped(f) })
		}
	}
}

func (r *killReaders) open(f planetest.File) *os.File {
	file, err := os.Open(filepath.Join(r.dir, f.Name))
	if err != nil {
		r.report(err)
		return nil
	}
	return file
}

func (r *killReaders) report(err error) {
	r.refused.Add(1)
	r.first.CompareAndSwap(nil, err.Error())
}

// one counts a read of p at off which took since start.
func (r *killReaders) one(f planetest.File, p []byte, off int64, start time.Time, err error) {
	took := time.Since(start)
	for old := r.longest.Load(); int64(took) > old && !r.longest.CompareAndSwap(old, int64(took)); old = r.longest.Load() {
	}
	if err != nil {
		r.report(fmt.Errorf("%s at %d, %d bytes: %w", f.Name, off, len(p), err))
		return
	}
	if i := f.Pieces[0].Pattern.Differs(p, off); i >= 0 {
		r.wrong.Add(1)
		r.first.CompareAndSwap(nil, fmt.Sprintf("%s: wrong byte at %d", f.Name, off+int64(i)))
		return
	}
	r.good.Add(1)
}

func (r *killReaders) done() bool {
	select {
	case <-r.until:
		return true
	default:
		return false
	}
}

func (r *killReaders) random(f planetest.File) {
	file := r.open(f)
	if file == nil {
		return
	}
	defer file.Close()
	unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_RANDOM)
	buf := make([]byte, 128<<10)
	for !r.done() {
		p := buf[:1+rand.IntN(len(buf))]
		off := rand.Int64N(f.Size - int64(len(p)))
		start := time.Now()
		_, err := file.ReadAt(p, off)
		r.one(f, p, off, start, err)
	}
}

func (r *killReaders) sequential(f planetest.File) {
	file := r.open(f)
	if file == nil {
		return
	}
	defer file.Close()
	buf := make([]byte, 64<<10)
	for !r.done() {
		at := rand.Int64N(f.Size - 8<<20)
		for off := at; off < at+4<<20 && !r.done(); off += int64(len(buf)) {
			start := time.Now()
			_, err := file.ReadAt(buf, off)
			r.one(f, buf, off, start, err)
		}
	}
}

// mapped reads through a mapping. This process serves nothing, so it may.
func (r *killReaders) mapped(f planetest.File) {
	file := r.open(f)
	if file == nil {
		return
	}
	defer file.Close()
	mem, err := unix.MemfdCreate("pages", unix.MFD_CLOEXEC)
	if err != nil {
		r.report(err)
		return
	}
	defer unix.Close(mem)
	buf := make([]byte, 16<<10)
	for !r.done() {
		off := rand.Int64N((f.Size-1<<20)/4096) * 4096
		m, err := unix.Mmap(int(file.Fd()), off, len(buf), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			r.report(err)
			return
		}
		start := time.Now()
		n, err := unix.Pwrite(mem, m, 0)
		if err == nil && n < len(m) {
			err = errors.New("a page of the mapping is missing")
		}
		if err == nil {
			_, err = unix.Pread(mem, buf, 0)
		}
		r.faults.Add(1)
		r.one(f, buf, off, start, err)
		unix.Munmap(m)
	}
}
