package whole

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/oci"
	"sluice/test/bed"
)

// member is a regular file of the image and where its content lies in the
// layer's tar: the truth that reads are compared with.
type member struct {
	name         string
	offset, size int64
}

// truth decompresses the layer of the one-layer image into a file and lists
// its regular files.
func truth(t *testing.T, s *stage) (*os.File, []member) {
	t.Helper()
	blob := func(d oci.Digest) string {
		return filepath.Join(s.images.OneLayer, "blobs", string(d.Algorithm()), d.Encoded())
	}
	var index oci.Index
	var manifest oci.ImageManifest
	readJSON(t, filepath.Join(s.images.OneLayer, "index.json"), &index)
	readJSON(t, blob(index.Manifests[0].Digest), &manifest)
	in, err := os.Open(blob(manifest.Layers[0].Digest))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	zr, err := gzip.NewReader(in)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "layer.tar"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := io.Copy(f, zr); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	var members []member
	tr := tar.NewReader(f) // seeks over content, and reads headers exactly
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return f, members
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg && h.Size > 0 {
			at, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				t.Fatal(err)
			}
			members = append(members, member{path.Clean(h.Name), at, h.Size})
		}
	}
}

func readJSON(t *testing.T, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// reads is what the readers of a stress saw.
type reads struct {
	ok, failed, wrong atomic.Int64
	slowest           atomic.Int64 // nanoseconds
	first             atomic.Value // string: what went wrong first
}

// one reads a random piece of a random file and compares it.
func (r *reads) one(rng *rand.Rand, root string, members []member, truth *os.File) {
	m := members[rng.IntN(len(members))]
	off := rng.Int64N(m.size)
	got := make([]byte, min(m.size-off, 1+rng.Int64N(128<<10)))
	want := make([]byte, len(got))
	if _, err := truth.ReadAt(want, m.offset+off); err != nil {
		r.first.CompareAndSwap(nil, "the truth: "+err.Error())
		r.failed.Add(1)
		return
	}
	start := time.Now()
	f, err := os.Open(filepath.Join(root, m.name))
	if err == nil {
		_, err = f.ReadAt(got, off)
		f.Close()
	}
	for took := int64(time.Since(start)); ; {
		old := r.slowest.Load()
		if took <= old || r.slowest.CompareAndSwap(old, took) {
			break
		}
	}
	switch {
	case err != nil:
		r.first.CompareAndSwap(nil, err.Error())
		r.failed.Add(1)
	case !bytes.Equal(got, want):
		r.first.CompareAndSwap(nil, m.name+" at "+strconv.FormatInt(off, 10))
		r.wrong.Add(1)
	default:
		r.ok.Add(1)
	}
}

// TestKillsAreInvisible kills the node daemon again and again under concurrent
// reads of a mounted image. SLUICE_KILLS says how often (default 50).
func TestKillsAreInvisible(t *testing.T) {
	s := theStage(t)
	kills := 50
	if v := os.Getenv("SLUICE_KILLS"); v != "" {
		var err error
		if kills, err = strconv.Atoi(v); err != nil {
			t.Fatalf("SLUICE_KILLS: %v", err)
		}
	}
	content, members := truth(t, s)
	link, err := bed.NewLink(t.Context(), s.Registry.Addr, 200e6, 10*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	n := s.node(t)
	pull(t, n, bed.Sluice, link.Addr()+"/debian:1")
	root := erofsMount(t, n)

	var r reads
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			for {
				select {
				case <-stop:
					return
				default:
					r.one(rng, root, members, content)
				}
			}
		})
	}
	wg.Go(func() { // so that reads reach the daemon again and again
		for {
			select {
			case <-stop:
				return
			case <-time.After(300 * time.Millisecond):
				_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("1\n"), 0o200)
			}
		}
	})
	rng := rand.New(rand.NewPCG(2, 2))
	for range kills {
		time.Sleep(time.Duration(rng.IntN(200)) * time.Millisecond)
		n.Sluice.Kill()
		if err := n.StartSluice(t.Context()); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	wg.Wait()
	slowest := time.Duration(r.slowest.Load())
	t.Logf("FIGURE %d kills of the node daemon under %d verified reads: %d wrong, %d failed, slowest read %.2f s",
		kills, r.ok.Load(), r.wrong.Load(), r.failed.Load(), slowest.Seconds())
	if r.wrong.Load() > 0 || r.failed.Load() > 0 {
		t.Errorf("%d reads were wrong and %d failed; the first: %v", r.wrong.Load(), r.failed.Load(), r.first.Load())
	}
	if slowest > time.Minute/2 { // it takes as long as the daemon's start, on a machine that is slow or not
		t.Errorf("a read took %v", slowest)
	}
	if r.ok.Load() < int64(kills) {
		t.Errorf("only %d reads: nothing was tested", r.ok.Load())
	}
}

// erofsMount returns where the node's only image is mounted.
func erofsMount(t *testing.T, n *bed.Node) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); strings.Contains(line, " - erofs ") && strings.HasPrefix(f[4], n.Dir+"/") {
			return f[4]
		}
	}
	t.Fatal("no image is mounted")
	return ""
}

// gunzippedSize reads a gzip stream to its end.
func gunzippedSize(r io.Reader) (int64, error) {
	zr, err := gzip.NewReader(r)
	if err != nil {
		return 0, err
	}
	return io.Copy(io.Discard, zr)
}
