package whole

import (
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"sluice/test/bed"
)

// TestCompletedReads holds reads of a streamed image whose content has arrived
// against the same EROFS from local files: through the mount that was there
// while it arrived, and through the one that is made after a restart of the
// machine. Warm reads find everything in memory, cold ones nothing.
func TestCompletedReads(t *testing.T) {
	s := theStage(t)
	n := s.node(t)
	ref := s.Ref("debian:1")
	pull(t, n, bed.Sluice, ref)
	streamed := awaitComplete(t, n)
	local := mountLocally(t, n)
	compareReads(t, "mounted while it came", streamed, local)

	n.Sluice.Stop()
	if err := syscall.Unmount(streamed, 0); err != nil {
		t.Fatal(err)
	}
	if err := n.StartSluice(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.AwaitConnection(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out := run(t, n, bed.Sluice, ref, "echo mounted"); out != "mounted\n" {
		t.Fatalf("printed %q", out)
	}
	compareReads(t, "mounted when it was there", awaitComplete(t, n), local)
}

// awaitComplete waits for all content of the node's only image and returns where
// the image is mounted.
func awaitComplete(t *testing.T, n *bed.Node) string {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		out, err := n.Command(t.Context(), "node", "status", "--output", "json").Output()
		var s struct {
			Images []struct {
				Complete bool
				Mounts   []struct{ Part, Path string }
			}
		}
		if err == nil {
			err = json.Unmarshal(out, &s)
		}
		if err != nil {
			t.Fatalf("node status: %v\n%s", err, out)
		}
		if len(s.Images) == 1 && s.Images[0].Complete && len(s.Images[0].Mounts) == 1 {
			return s.Images[0].Mounts[0].Path
		}
	}
	t.Fatal("the image doesn't become complete")
	return ""
}

// mountLocally mounts the node's only image, of one layer, as anybody would who
// has its metadata and content in files.
func mountLocally(t *testing.T, n *bed.Node) string {
	t.Helper()
	dir := filepath.Join(n.Dir, "local")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{
		"meta": filepath.Join(n.Dir, "sluice", "images", "*", "merged.erofs"),
		"data": filepath.Join(n.Dir, "sluice", "cache", "sha256-*", "data"),
	}
	for name, pattern := range files {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) != 1 {
			t.Fatalf("%s: %q, %v; want one file", pattern, found, err)
		}
		files[name] = filepath.Join(dir, name)
		if err := os.Link(found[0], files[name]); err != nil { // on the same blocks of the disk
			t.Fatal(err)
		}
	}
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount(files["meta"], mnt, "erofs", syscall.MS_RDONLY, "device="+files["data"]); err != nil {
		t.Fatal(err)
	}
	return mnt
}

// readers are what is measured, each as seconds for the whole of it.
var readers = map[string]func(t *testing.T, dir string) float64{
	"sequential": func(t *testing.T, dir string) float64 {
		return readFiles(t, dir, func(size int64) bool { return size > 4<<20 })
	},
	"small files": func(t *testing.T, dir string) float64 {
		return readFiles(t, filepath.Join(dir, "usr/share"), func(size int64) bool { return size < 64<<10 })
	},
	"random 4k": randomReads,
}

// readFiles reads all regular files beneath dir of certain sizes.
func readFiles(t *testing.T, dir string, wanted func(size int64) bool) float64 {
	t.Helper()
	buf, total := make([]byte, 1<<20), 0
	began := time.Now()
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil || !wanted(info.Size()) {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		for {
			n, err := f.Read(buf)
			total += n
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
		}
	})
	took := time.Since(began).Seconds()
	if err != nil || total == 0 {
		t.Fatalf("%d bytes of %s: %v", total, dir, err)
	}
	return took
}

// randomReads reads pages of the largest file.
func randomReads(t *testing.T, dir string) float64 {
	t.Helper()
	name, size := "", int64(0)
	err := filepath.WalkDir(filepath.Join(dir, "usr/lib"), func(at string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if info, ierr := d.Info(); ierr == nil && info.Size() > size {
				name, size = at, info.Size()
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rng, page := rand.New(rand.NewPCG(1, 2)), make([]byte, 4096)
	began := time.Now()
	for range 2000 {
		if _, err := f.ReadAt(page, rng.Int64N(size/4096)*4096); err != nil {
			t.Fatal(err)
		}
	}
	return time.Since(began).Seconds()
}

// compareReads measures both in turns and prints ratios of medians of speed.
func compareReads(t *testing.T, what, streamed, local string) {
	t.Helper()
	const rounds = 5
	dirs := []string{streamed, local}
	for _, name := range []string{"sequential", "small files", "random 4k"} {
		for _, warm := range []bool{true, false} {
			times := map[string][]float64{}
			for round := range rounds {
				for i := range dirs {
					dir := dirs[(i+round)%2]
					if !warm {
						if err := bed.DropCaches(); err != nil {
							t.Fatal(err)
						}
					} else if round == 0 {
						readers[name](t, dir)
					}
					times[dir] = append(times[dir], readers[name](t, dir))
				}
			}
			state := map[bool]string{true: "warm", false: "cold"}[warm]
			t.Logf("FIGURE %s, %s, %s: %.2f of the speed of local files, best %.2f (%s)", what, state, name,
				median(times[local])/median(times[streamed]), slices.Min(times[local])/slices.Min(times[streamed]),
				fmt.Sprintf("%.1f and %.1f ms", 1000*median(times[streamed]), 1000*median(times[local])))
		}
	}
}
