package peers

import (
	"context"
	"crypto/sha256"
	"encoding"
	"fmt"
	"hash"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/test/bed"
)

// server is one of those that are measured.
type server struct {
	name    string
	addr    string
	dir     string // of its files
	process *bed.Process

	// durably makes a blob durable that the server acknowledged. nil: it is.
	durably func(digest string) error
}

// repo is the repository of everything but killing.
const repo = "figures/bench"

// path of a blob.
func (s server) path(digest string) string {
	if s.name == "nginx" {
		return "/" + digest
	}
	return "/v2/" + repo + "/blobs/" + digest
}

// registries starts ours and its peers, each on empty directories of the same
// file system, to end with the test.
func registries(t *testing.T) []server {
	t.Helper()
	src, dir := checkout(t), t.TempDir()
	say := func(s string) { t.Log(s) }
	ours := start(t, dir)
	distribution, err := bed.StartDistribution(t.Context(), src, dir, say)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(distribution.Stop)
	olareg, err := bed.StartOlareg(t.Context(), src, dir, say)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(olareg.Stop)
	return []server{
		{name: "sluice", addr: ours.Addr, dir: filepath.Join(dir, "registry"), process: ours.Process},
		{name: "distribution", addr: distribution.Addr, dir: distribution.Dir, process: distribution.Process},
		{name: "olareg", addr: olareg.Addr, dir: olareg.Dir, process: olareg.Process},
	}
}

// start starts our registry, logging no requests as the others don't.
func start(t *testing.T, dir string) *bed.Registry {
	t.Helper()
	bin, err := bed.BuildSluice(t.Context(), checkout(t), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	r, err := bed.StartRegistry(t.Context(), bin, dir, "SLUICE_REGISTRY_LOG_LEVEL=warn")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Stop() })
	return r
}

func checkout(t *testing.T) string {
	t.Helper()
	src, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return src
}

// random returns n bytes that don't compress.
func random(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// variants makes any number of blobs that share all but their last bytes, so
// that their digests cost the client next to nothing.
type variants struct {
	base  []byte
	state []byte // of SHA-256 after base
	next  atomic.Uint64
}

func newVariants(base []byte) (*variants, error) {
	h := sha256.New()
	h.Write(base)
	state, err := h.(encoding.BinaryMarshaler).MarshalBinary()
	return &variants{base: base, state: state}, err
}

// another returns the end of a blob that was never returned before, and the
// blob's digest.
func (v *variants) another() (end []byte, digest string, err error) {
	end = fmt.Appendf(nil, "%016x", v.next.Add(1))
	var h hash.Hash = sha256.New()
	if err := h.(encoding.BinaryUnmarshaler).UnmarshalBinary(v.state); err != nil {
		return nil, "", err
	}
	h.Write(end)
	return end, fmt.Sprintf("sha256:%x", h.Sum(nil)), nil
}

// load runs clients, each with a connection of its own, until duration is over
// or one fails. step returns the bytes it moved.
func load(ctx context.Context, s server, clients int, duration time.Duration, step func(i int, c *conn) (int64, error)) (requests, bytes float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, duration)
	defer cancel()
	var (
		wg            sync.WaitGroup
		count, volume atomic.Int64
		failed        atomic.Value
	)
	begin := time.Now()
	for i := range clients {
		wg.Go(func() {
			c, err := dial(context.WithoutCancel(ctx), s.addr)
			if err == nil {
				defer c.Close()
			}
			for err == nil && ctx.Err() == nil {
				var n int64
				if n, err = step(i, c); err == nil {
					count.Add(1)
					volume.Add(n)
				}
			}
			if err != nil {
				failed.CompareAndSwap(nil, fmt.Errorf("%s: %w", s.name, err))
				cancel()
			}
		})
	}
	wg.Wait()
	took := time.Since(begin).Seconds()
	err, _ = failed.Load().(error)
	return float64(count.Load()) / took, float64(volume.Load()) / took, err
}

// rounds is how often everything is measured. A round is short, so that what
// else the machine does meets every server alike.
const rounds = 5

// inTurns measures every server once in each round, and prints the medians and,
// in parentheses, the median of each round's ratio of ours to theirs.
func inTurns(t *testing.T, title, unit string, servers []server, measure func(server) (float64, error)) {
	t.Helper()
	values, ratios := make([][]float64, len(servers)), make([][]float64, len(servers))
	for range rounds {
		for i, s := range servers {
			v, err := measure(s)
			if err != nil {
				t.Fatal(err)
			}
			values[i] = append(values[i], v)
			ratios[i] = append(ratios[i], values[0][len(values[0])-1]/v)
		}
	}
	line := fmt.Sprintf("%s %.0f", servers[0].name, median(values[0]))
	for i, s := range servers[1:] {
		line += fmt.Sprintf(", %s %.0f (%.2f)", s.name, median(values[i+1]), median(ratios[i+1]))
	}
	t.Logf("FIGURE %s, %s (ours to theirs): %s", title, unit, line)
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}

// status returns a size from /proc/PID/status, in MB of 2^20 bytes.
func status(p *bed.Process, field string) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid()))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			var kib float64
			_, err := fmt.Sscanf(rest, "%f kB", &kib)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no %s", p.Pid(), field)
}
