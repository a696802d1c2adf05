package streaming

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
	ctx := context.Background()
	store, db, reg, err := open(ctx, dir)
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	fmt.Println("ready")
	s := newService(reg, db, Options{Store: store},
		operation.Timing{Lease: 2 * time.Second, Beat: 20 * time.Millisecond, Poll: 5 * time.Millisecond, Pause: time.Millisecond})
	s.Run(ctx)
}

// open opens a registry as a server does when it starts.
func open(ctx context.Context, dir string) (*storage.Local, *index.DB, *stored.Registry, error) {
	store, err := storage.OpenLocal(dir, storage.LocalOptions{Identity: stored.BlobIdentity})
	if err != nil {
		return nil, nil, nil, err
	}
	db, err := index.Open(ctx, index.Options{URL: "sqlite:" + filepath.Join(dir, "index.db")})
	if err != nil {
		return nil, nil, nil, err
	}
	reg := stored.New(store, db, stored.Options{})
	return store, db, reg, reg.Reconcile(ctx)
}

// The process is killed at many moments of many conversions: nothing is seen of
// what wasn't finished, and in the end everything is.
func TestKilledAtAnyMoment(t *testing.T) {
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	dir, seed := t.TempDir(), rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	base := files("base", noise(999, 1<<20))
	var ops []Operation
	complete := 0
	for round := range rounds {
		visit(t, dir, func(b *bench, s *Service) {
			complete = 0
			for _, op := range ops {
				if n := len(b.artifacts(repo, op.Subject)); n == 1 {
					complete++
				} else if now, err := s.Operation(t.Context(), repo, op.ID); err != nil || n != 0 || now.Status != operation.StatusNotStarted && now.Status != operation.StatusRunning {
					t.Errorf("%d artifacts of %+v, %v", n, now, err)
				}
			}
			for n := range 2 {
				tag := fmt.Sprintf("v%d-%d", round, n)
				b.push(tag, image{tars: [][]byte{base, files(tag, noise(uint64(round*2+n), 1<<20))}})
				ops = append(ops, must(t, s, repo, tag))
			}
		})
		killWorker(t, dir, time.Duration(r.Int64N(int64(250*time.Millisecond))))
	}
	t.Logf("%d of %d conversions survived the last kill but one", complete, len(ops)-2)
	visit(t, dir, func(b *bench, s *Service) {
		start(t, s)
		for _, op := range ops {
			if op = end(t, s, op); op.Status != operation.StatusSucceeded || len(b.artifacts(repo, op.Subject)) != 1 {
				t.Errorf("in the end: %+v", op)
			}
		}
	})
}

// visit opens the registry in this process.
func visit(t *testing.T, dir string, f func(*bench, *Service)) {
	t.Helper()
	store, db, reg, err := open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close(); store.Close() })
	b := &bench{t: t, store: store, db: db, reg: reg}
	t.Run("", func(t *testing.T) { // ends what f starts
		b.t = t
		f(b, b.service(Options{}))
	})
	if t.Failed() {
		t.FailNow()
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
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
