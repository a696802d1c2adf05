package teleport

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"sluice/internal/blob"
	"sluice/internal/blob/blobtest"
	"sluice/internal/node/smb"
	"sluice/oci"
)

// Figures of docs/performance.md: how fast a share is read, by readers of blocks and
// of large ranges, and how that compares to smbclient's get of the same file from the
// same server.
func TestShareSpeed(t *testing.T) {
	if testing.Short() {
		t.Skip("measures")
	}
	s := newShareServer(t, time.Hour)
	content := blobtest.Content(256 << 20)
	s.Put("disk", content)
	login := s.Login()
	get := func() float64 {
		copied := filepath.Join(t.TempDir(), "copy")
		began := time.Now()
		if _, err := s.samba.Do(t.Context(), login.Share, login.Username, login.Password, "get disk "+copied); err != nil {
			t.Fatal(err)
		}
		took := time.Since(began)
		if info, err := os.Stat(copied); err != nil || info.Size() != int64(len(content)) {
			t.Fatalf("smbclient: %v", err)
		}
		return rate(len(content), took)
	}
	get()
	share := s.Share(smb.Options{Login: always(s)})
	defer share.Close()
	another := s.Share(smb.Options{Login: always(s)})
	defer another.Close()
	open := func(share smb.Share) blob.Source {
		return share.Open("disk", int64(len(content)), oci.DigestOf(content))
	}
	source, second := open(share), open(another)
	rng := rand.New(rand.NewPCG(1, 1))
	once := func(size int) time.Duration {
		off := rng.Int64N(int64(len(content)-size)/4096) * 4096
		got := make([]byte, size)
		began := time.Now()
		if err := blob.ReadFull(t.Context(), source, got, off); err != nil || !bytes.Equal(got, content[off:off+int64(size)]) {
			t.Errorf("%d bytes at %d: %v", size, off, err)
		}
		return time.Since(began)
	}
	began := time.Now()
	once(1)
	t.Logf("connecting, opening, the first byte: %v", time.Since(began).Round(time.Microsecond))
	for _, size := range []int{4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20} {
		var took []time.Duration
		total := time.Duration(0)
		for range max(20, min(400, 64<<20/size)) {
			took = append(took, once(size))
			total += took[len(took)-1]
		}
		slices.Sort(took)
		t.Logf("%5d KiB, one reader: median %7v, %6.0f MB/s", size>>10, took[len(took)/2].Round(time.Microsecond), rate(size*len(took), total))
	}
	const readers, size = 8, 4 << 20
	for run := range 3 {
		theirs := get()
		together := func(sources ...blob.Source) float64 {
			began := time.Now()
			var wg sync.WaitGroup
			for r := range readers {
				wg.Go(func() {
					got := make([]byte, size)
					for off := r * size; off < len(content); off += readers * size {
						if err := blob.ReadFull(t.Context(), sources[r%len(sources)], got, int64(off)); err != nil || !bytes.Equal(got, content[off:off+size]) {
							t.Errorf("%d bytes at %d: %v", size, off, err)
						}
					}
				})
			}
			wg.Wait()
			return rate(len(content), time.Since(began))
		}
		ours, two := together(source), together(source, second)
		began := time.Now()
		one := make([]byte, len(content))
		if err := blob.ReadFull(t.Context(), source, one, 0); err != nil {
			t.Fatal(err)
		}
		whole := rate(len(content), time.Since(began))
		if !bytes.Equal(one, content) {
			t.Error("one reader of all: wrong bytes")
		}
		t.Logf("run %d: 4 MiB × %d readers %6.0f MB/s, over two connections %6.0f MB/s, one reader of all %6.0f MB/s, smbclient get %6.0f MB/s: %s, %s", run, readers, ours, two,
			whole, theirs, times(ours, theirs), times(whole, theirs))
	}
}

func rate(bytes int, d time.Duration) float64 { return float64(bytes) / 1e6 / d.Seconds() }

func times(a, b float64) string { return fmt.Sprintf("%.2f×", a/b) }
