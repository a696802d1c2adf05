package teleport

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/index"
	"sluice/internal/operation"
	"sluice/internal/storage"
	"sluice/internal/stored"
)

// workerDir tells the test's own program to be a worker, of the registry in that
// directory, until it is killed.
const workerDir = "SLUICE_TEST_WORKER_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(workerDir); dir != "" {
		worker(dir)
		return
	}
	os.Exit(m.Run())
}

// worker is the registry's process.
func worker(dir string) {
	b, err := open(context.Background(), dir)
	if err == nil {
		var s *Service
		s, err = newService(b.reg, b.db, Options{Directory: b.dir},
			operation.Timing{Lease: 2 * time.Second, Beat: 20 * time.Millisecond, Poll: 5 * time.Millisecond, Pause: time.Millisecond})
		if err == nil {
			fmt.Println("ready")
			s.Run(context.Background())
		}
	}
	fmt.Println("error:", err)
	os.Exit(1)
}

// open opens a registry as a server does when it starts.
func open(ctx context.Context, dir string) (*bench, error) {
	store, err := storage.OpenLocal(dir, storage.LocalOptions{Identity: stored.BlobIdentity})
	if err != nil {
		return nil, err
	}
	db, err := index.Open(ctx, index.Options{URL: "sqlite:" + filepath.Join(dir, "index.db")})
	if err != nil {
		return nil, err
	}
	b := &bench{store: store, db: db, reg: stored.New(store, db, stored.Options{Expand: true}), dir: filepath.Join(dir, "share")}
	return b, b.reg.Reconcile(ctx)
}

// The process is killed at many moments of many expansions: a disk that can be seen
// is whole, and in the end all of them are there.
func TestKilledAtAnyMoment(t *testing.T) {
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	dir, seed := t.TempDir(), rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	base := layerTar("base", noise(999, 1<<20))
	var tags []string
	for round := range rounds {
		visit(t, dir, func(b *bench, s *Service) {
			b.enable(s, repo)
			for _, tag := range tags {
				b.whole(s, tag)
			}
			for n := range 2 {
				tag := fmt.Sprintf("v%d-%d", round, n)
				b.push(repo, tag, "amd64", base, layerTar(tag, noise(uint64(round*2+n), 1<<20)))
				tags = append(tags, tag)
			}
		})
		killWorker(t, dir, time.Duration(r.Int64N(int64(120*time.Millisecond))))
	}
	visit(t, dir, func(b *bench, s *Service) {
		start(t, s)
		for _, tag := range tags {
			b.ready(s, repo, tag)
			b.whole(s, tag)
		}
	})
}

// whole checks the disks of an image that can be seen.
func (b *bench) whole(s *Service, tag string) {
	b.t.Helper()
	state, err := s.Find(b.t.Context(), repo, tag, amd64)
	if err != nil || state.Status != Ready && state.Status != Expanding {
		b.t.Fatalf("%s: %+v, %v", tag, state, err)
	}
	for _, d := range state.Disks {
		b.check(repo, d)
	}
}

// visit opens the registry in this process.
func visit(t *testing.T, dir string, f func(*bench, *Service)) {
	t.Helper()
	b, err := open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("", func(t *testing.T) { // ends what f starts
		b.t = t
		f(b, b.service(Options{}))
	})
	if err := b.db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.store.(*storage.Local).Close(); err != nil {
		t.Fatal(err)
	}
	if t.Failed() {
		t.FailNow()
	}
}

// killWorker runs a worker for a while, and kills it.
func killWorker(t *testing.T, dir string, after time.Duration) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), workerDir+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	if strings.TrimSpace(line) != "ready" {
		t.Errorf("the worker says %q", line)
	}
	time.Sleep(after)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}
