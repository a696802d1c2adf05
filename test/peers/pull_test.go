package peers

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sluice/test/bed"
)

// TestPulls measures what nodes do (ranges of 128 KiB at random, over
// connections that are kept) and what ordinary clients do (a large blob whole),
// from the page cache.
func TestPulls(t *testing.T) {
	servers := registries(t)
	nginx, err := bed.StartNginx(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nginx.Stop)

	blob := random(1, 256<<20)
	v, err := newVariants(blob)
	if err != nil {
		t.Fatal(err)
	}
	end, digest, err := v.another()
	if err != nil {
		t.Fatal(err)
	}
	blob = append(blob, end...)
	for _, s := range servers {
		c, err := dial(t.Context(), s.addr)
		if err != nil {
			t.Fatal(err)
		}
		err = c.pushBlob(repo, digest, blob)
		c.Close()
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
	}
	if err := os.WriteFile(filepath.Join(nginx.Dir, digest), blob, 0o644); err != nil {
		t.Fatal(err)
	}
	servers = append(servers, server{name: "nginx", addr: nginx.Addr, dir: nginx.Dir, process: nginx.Process})

	const size = 128 << 10
	ranges := func(clients int) func(server) (float64, error) {
		return func(s server) (float64, error) {
			requests, _, err := load(t.Context(), s, clients, 400*time.Millisecond, func(_ int, c *conn) (int64, error) {
				from := rand.IntN(len(blob) - size)
				return size, c.get(s.path(digest), from, blob[from:from+size])
			})
			return requests, err
		}
	}
	large := func(clients int) func(server) (float64, error) {
		return func(s server) (float64, error) {
			_, rate, err := load(t.Context(), s, clients, 400*time.Millisecond, func(_ int, c *conn) (int64, error) {
				return int64(len(blob)), c.get(s.path(digest), whole, blob)
			})
			return rate / 1e6, err
		}
	}
	inTurns(t, "random 128 KiB ranges, 8 clients", "GETs/s", servers, ranges(8))
	inTurns(t, "random 128 KiB ranges, 64 clients", "GETs/s", servers, ranges(64))
	inTurns(t, "a blob of 256 MiB, 1 client", "MB/s", servers, large(1))
	inTurns(t, "a blob of 256 MiB, 4 clients", "MB/s", servers, large(4))
}
