package cache

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/oci"
)

// TestEvictionOrder: first go the layers that no image has, then the least
// recently used, until the low mark; what is in use or pinned stays, and up to
// the high mark everything.
func TestEvictionOrder(t *testing.T) {
	const mib = 1 << 20
	names := []string{"in use", "pinned", "needed, old", "needed, new", "unneeded"} // from the oldest
	fs := make([]*fixture, len(names))
	for i := range fs {
		fs[i] = newFixture(t, uint64(i), mib, 64<<10)
	}
	needs := func() map[oci.Digest]Need {
		return map[oci.Digest]Need{
			fs[1].device(t).Key: Pinned, fs[2].device(t).Key: Needed, fs[3].device(t).Key: Needed,
		}
	}
	for _, test := range []struct {
		name string
		opts Options
		stay []string
	}{
		{"no bound", Options{}, names},
		{"up to the high mark", Options{Quota: Space{Bytes: 6 * mib}, Low: 10}, names},
		{"one goes", Options{Quota: Space{Bytes: 45 * mib / 10}, Low: 95}, names[:4]},
		{"to the low mark", Options{Quota: Space{Bytes: 45 * mib / 10}, Low: 70}, []string{"in use", "pinned", "needed, new"}},
		{"all that may", Options{Quota: Space{Bytes: 1}}, names[:2]},
		{"free space", Options{Free: Space{Bytes: 12 * mib}, Low: 95}, []string{"in use", "pinned", "needed, new"}}, // of 16 MiB
		{"free space in percent", Options{Free: Space{Percent: 80}}, names[:2]},
	} {
		t.Run(test.name, func(t *testing.T) {
			opts := test.opts
			opts.Dir = filepath.Join(smallDisk(t, "size=16m"), "cache")
			all := openCache(t, Options{Dir: opts.Dir})
			for _, f := range fs {
				l := acquire(t, all, f, f.source())
				if err := l.Fill(t.Context()); err != nil {
					t.Fatal(err)
				}
				l.Release()
			}
			if err := all.Close(); err != nil {
				t.Fatal(err)
			}
			for i, f := range fs {
				used := time.Now().Add(time.Duration(i-100) * time.Hour)
				if err := os.Chtimes(all.dirOf(f.device(t).Key), used, used); err != nil {
					t.Fatal(err)
				}
			}

			c := openCache(t, opts)
			held := acquire(t, c, fs[0], unreachable(fs[0]))
			stay := func() (left []string) {
				for i, f := range fs {
					if u, ok := c.Layer(f.device(t).Key); ok && u.Complete {
						left = append(left, names[i])
					}
				}
				return left
			}
			c.makeRoom()
			if left := stay(); !slices.Equal(left, names) {
				t.Errorf("before it's known what is in use, there's %q left", left)
			}
			c.Settled(needs)
			c.makeRoom()      // or the flusher has,
			c.evicting.Lock() // or is about to
			left := stay()
			c.evicting.Unlock()
			if !slices.Equal(left, test.stay) {
				t.Errorf("there's %q left, want %q", left, test.stay)
			}
			mustRead(t, held, fs[0], 0, held.Size())
		})
	}
}

// TestRoomThatOthersMade: what somebody else evicts meanwhile, as the flusher
// does, is room for a Fill, too.
func TestRoomThatOthersMade(t *testing.T) {
	const mib = 1 << 20
	old, f := newFixture(t, 1, mib, 64<<10), newFixture(t, 2, 2*mib, 64<<10)
	c := openCache(t, Options{Quota: Space{Bytes: 5 * mib / 2}})
	l := acquire(t, c, old, old.source())
	if err := l.Fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.Release()
	key := l.dev.Key
	c.Settled(func() map[oci.Digest]Need {
		c.Remove(key)
		return nil
	})
	l = acquire(t, c, f, f.source())
	if err := l.Fill(t.Context()); err != nil {
		t.Error(err)
	}
}

// smallDisk returns a tmpfs, which ends with the test.
func smallDisk(t *testing.T, options string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a tmpfs")
	}
	dir := t.TempDir()
	if err := unix.Mount("sluice-test", dir, "tmpfs", 0, options); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}
