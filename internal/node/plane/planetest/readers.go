package planetest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// readersSpec is what the process of the readers reads.
type readersSpec struct {
	Dir   string
	Files []File
}

// Readings are what readers found.
type Readings struct {
	Good, Wrong, Refused, Faults int64
	Longest                      time.Duration
	First                        string // what first went wrong
}

// Readers is a running process that reads: not the one that starts daemons. A
// fault in a mapping may wait for a daemon with the memory of its process
// locked, and then that process can't start one.
type Readers struct {
	cmd   *exec.Cmd
	stdin io.Closer
	out   bytes.Buffer
}

// StartReaders starts a process that reads files in dir, in all ways, and checks
// every byte.
func StartReaders(t *testing.T, dir string, files []File) *Readers {
	t.Helper()
	text, err := json.Marshal(readersSpec{dir, files})
	if err != nil {
		t.Fatal(err)
	}
	r := &Readers{cmd: exec.Command(self())}
	r.cmd.Env = append(os.Environ(), roleVariable+"=readers", specVariable+"="+string(text))
	r.cmd.Stdout, r.cmd.Stderr = &r.out, os.Stderr
	if r.stdin, err = r.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.cmd.Process.Kill() })
	return r
}

// Stop ends the process and returns what it found.
func (r *Readers) Stop(t *testing.T) (found Readings) {
	t.Helper()
	r.stdin.Close()
	if err := r.cmd.Wait(); err != nil {
		t.Fatalf("readers: %v", err)
	}
	if err := json.Unmarshal(r.out.Bytes(), &found); err != nil {
		t.Fatalf("readers said %q: %v", r.out.Bytes(), err)
	}
	return found
}

// readSpec is the process of the readers: it reads until its standard input
// ends, and writes what it found to standard output.
func readSpec() error {
	var spec readersSpec
	if err := json.Unmarshal([]byte(os.Getenv(specVariable)), &spec); err != nil {
		return err
	}
	r := &killReaders{dir: spec.Dir, files: spec.Files, until: make(chan struct{})}
	r.start()
	io.Copy(io.Discard, os.Stdin)
	close(r.until)
	r.running.Wait()
	first, _ := r.first.Load().(string)
	return json.NewEncoder(os.Stdout).Encode(Readings{
		Good: r.good.Load(), Wrong: r.wrong.Load(), Refused: r.refused.Load(), Faults: r.faults.Load(),
		Longest: time.Duration(r.longest.Load()), First: first,
	})
}

// killReaders read until told to stop.
type killReaders struct {
	dir     string
	files   []File
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

func (r *killReaders) open(f File) *os.File {
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
func (r *killReaders) one(f File, p []byte, off int64, start time.Time, err error) {
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

func (r *killReaders) random(f File) {
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
		unix.Fadvise(int(file.Fd()), off, int64(len(p)), unix.FADV_DONTNEED) // so that there's always something to ask for
	}
}

func (r *killReaders) sequential(f File) {
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
func (r *killReaders) mapped(f File) {
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
