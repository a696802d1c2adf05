package cache

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/artifact"
)

// recordedRead is a read of a recorded start. One that began after another
// had ended may have depended on it.
type recordedRead struct {
	off, n       int64
	began, ended int64 // µs
}

// recording is a layer's chunks, with content made up, and starts from it.
type recording struct {
	fixture
	random []byte
	raw    []int // by chunk: bytes that don't compress
	starts map[string][]recordedRead
}

func openRecording(tb testing.TB, name string) *recording {
	tb.Helper()
	file, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		tb.Fatal(err)
	}
	defer file.Close()
	zr, err := gzip.NewReader(file)
	if err != nil {
		tb.Fatal(err)
	}
	r := &recording{random: make([]byte, artifact.MaxFrameLength), starts: map[string][]recordedRead{}}
	rand.NewChaCha8([32]byte{1}).Read(r.random)
	start := ""
	var off, blobOff int64
	lines := bufio.NewScanner(zr)
	for lines.Scan() {
		var length, blobLength uint32
		var read recordedRead
		if _, err := fmt.Sscanf(lines.Text(), "chunk %d %d", &length, &blobLength); err == nil {
			c := artifact.Chunk{Offset: off, Length: length, BlobOffset: blobOff, BlobLength: blobLength}
			r.raw = append(r.raw, min(max(int(blobLength)-40, 8), int(length)))
			frame := r.makeFrame(len(r.chunks), length)
			c.BlobLength, c.Digest = uint32(len(frame)), sha256.Sum256(frame)
			r.chunks = append(r.chunks, c)
			off, blobOff = off+int64(length), blobOff+int64(len(frame))
		} else if _, err := fmt.Sscanf(lines.Text(), "read %d %d %d %d", &read.off, &read.n, &read.began, &read.ended); err == nil {
			r.starts[start] = append(r.starts[start], read)
		} else if _, err := fmt.Sscanf(lines.Text(), "start %s", &start); err != nil {
			tb.Fatalf("%s: %q", name, lines.Text())
		}
	}
	if err := lines.Err(); err != nil {
		tb.Fatal(err)
	}
	r.encodeTable([32]byte{1}, [32]byte{2})
	// What decoders share must not belong to a bubble.
	if _, err := r.chunks[0].Decode(nil, r.makeFrame(0, r.chunks[0].Length)); err != nil {
		tb.Fatal(err)
	}
	return r
}

// makeFrame returns chunk i's zstd frame: raw blocks of random bytes, then
// blocks of a repeated one. See RFC 8878, section 3.1.1.
func (r *recording) makeFrame(i int, length uint32) []byte {
	const rawBlock, repeated, maxBlock = 0, 1, 128 << 10
	b := binary.LittleEndian.AppendUint32(nil, 0xfd2fb528)
	b = append(b, 0xa0) // a single segment, content size in 4 bytes
	b = binary.LittleEndian.AppendUint32(b, length)
	raw := r.raw[i]
	for left := int(length); left > 0; {
		n, kind := min(left, maxBlock), repeated
		if raw > 0 {
			n, kind = min(raw, maxBlock), rawBlock
			raw -= n
		}
		left -= n
		header := uint32(n<<3 | kind<<1)
		if left == 0 {
			header |= 1
		}
		b = append(b, byte(header), byte(header>>8), byte(header>>16))
		if kind == repeated {
			b = append(b, 0)
			continue
		}
		at := len(b)
		b = append(b, r.random[:n]...)
		binary.LittleEndian.PutUint32(b[at:], uint32(i))
	}
	return b
}

// link is a source at the end of a way with a round-trip time and a bandwidth
// that all requests share. Time is that of a synctest bubble.
type link struct {
	*recording
	trip time.Duration
	rate float64 // bytes per second

	mu       sync.Mutex
	free     time.Time // when the wire has sent what it took on
	requests int64
	bytes    int64
}

func (l *link) Size() int64 {
	last := l.chunks[len(l.chunks)-1]
	return last.BlobOffset + int64(last.BlobLength)
}

func (l *link) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	l.mu.Lock()
	l.requests++
	l.mu.Unlock()
	first, _ := slices.BinarySearchFunc(l.chunks, off, func(c artifact.Chunk, off int64) int { return int(c.BlobOffset - off) })
	if err := sleep(ctx, l.trip); err != nil {
		return nil, err
	}
	return &linkReader{l: l, given: ctx.Err, next: first, end: off + n}, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

type linkReader struct {
	l     *link
	given func() error // up
	next  int
	end   int64
	rest  []byte
}

func (r *linkReader) Read(p []byte) (int, error) {
	const packet = 16 << 10
	if err := r.given(); err != nil {
		return 0, err
	}
	if len(r.rest) == 0 {
		if r.next == len(r.l.chunks) || r.l.chunks[r.next].BlobOffset >= r.end {
			return 0, io.EOF
		}
		r.rest = r.l.makeFrame(r.next, r.l.chunks[r.next].Length)
		r.next++
	}
	n := copy(p[:min(len(p), packet)], r.rest)
	r.rest = r.rest[n:]
	time.Sleep(time.Until(r.l.send(n)))
	return n, nil
}

// send books n bytes on the wire and returns when they have arrived.
func (l *link) send(n int) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bytes += int64(n)
	if now := time.Now(); l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(float64(n) / l.rate * float64(time.Second)))
	return l.free
}

func (r *linkReader) Close() error { return nil }

// replay reads as a recorded start did, each read as soon as those that had
// ended before it began have ended now. No time but the link's passes.
func replay(t *testing.T, l *Layer, reads []recordedRead) time.Duration {
	began := time.Now()
	byEnd := make([]int, len(reads))
	for i := range byEnd {
		byEnd[i] = i
	}
	slices.SortStableFunc(byEnd, func(a, b int) int { return int(reads[a].ended - reads[b].ended) })
	ended := make([]bool, len(reads))
	done := make(chan int)
	begun, past := 0, 0
	for past < len(reads) {
		for begun < len(reads) && (past == len(reads) || reads[begun].began < reads[byEnd[past]].ended) {
			i := begun
			begun++
			go func() {
				p := make([]byte, reads[i].n)
				if _, err := l.ReadAt(t.Context(), p, reads[i].off); err != nil && err != io.EOF {
					t.Error(err)
				}
				done <- i
			}()
		}
		ended[<-done] = true
		for past < len(reads) && ended[byEnd[past]] {
			past++
		}
	}
	return time.Since(began)
}

// touched is how many bytes of the blob have the chunks that reads need.
func (r *recording) touched(reads []recordedRead) int64 {
	seen := map[int]bool{}
	var n int64
	for _, read := range reads {
		for i, c := range r.chunks {
			if c.Offset < read.off+read.n && read.off < c.Offset+int64(c.Length) && !seen[i] {
				seen[i] = true
				n += int64(c.BlobLength)
			}
		}
	}
	return n
}

// TestReplay replays starts that no boot pack foresaw over the demonstration's
// link, 200 Mbit/s and 10 ms, in a bubble's time: what it says doesn't depend
// on the machine. The reads of a start depend on each other, so that one
// after the other takes three to four times as long as their bytes would; most
// of the bandwidth is to be used all the same.
func TestReplay(t *testing.T) {
	for _, test := range []struct {
		file, start string
		time, bytes float64 // at most, as multiples of what the bytes read take
	}{
		{"debian.gz", "numpy", 2.1, 1.6},
		{"debian.gz", "perl", 2.4, 1.7},
		{"debian.gz", "git", 2.3, 1.7},
		{"node.gz", "node", 1.7, 1.3},
	} {
		t.Run(test.start, func(t *testing.T) {
			r := openRecording(t, test.file)
			reads := r.starts[test.start]
			touched := r.touched(reads)
			synctest.Test(t, func(t *testing.T) {
				src := &link{recording: r, trip: 10 * time.Millisecond, rate: 25e6}
				c, err := Open(t.Context(), Options{Dir: t.TempDir()})
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				l, err := c.Acquire(t.Context(), r.device(t), src, nil)
				if err != nil {
					t.Fatal(err)
				}
				took := replay(t, l, reads)
				time.Sleep(time.Minute) // for what is still being read ahead
				l.Release()
				least := time.Duration(float64(touched) / src.rate * float64(time.Second))
				slow, more := float64(took)/float64(least), float64(src.bytes)/float64(touched)
				busy := more / slow // what comes after the start counts, too; that's little
				t.Logf("%s: %.1f MB touched, %.2f of that fetched in %d requests; %v, %.2f of what the bandwidth asks for; %.2f of the bandwidth used",
					test.start, float64(touched)/1e6, more, src.requests, took.Round(time.Millisecond), slow, busy)
				if slow > test.time || more > test.bytes || busy < 0.65 {
					t.Errorf("want at most %.2f of the bytes and %.2f of the time, and 0.65 of the bandwidth used", test.bytes, test.time)
				}
			})
		})
	}
}
