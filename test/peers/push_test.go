package peers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice/test/bed"
)

// TestPushes measures pushes of blobs that the registry doesn't have. Those
// that acknowledge what isn't on disk yet are measured twice: as they are, and
// with a client that makes it durable before it pushes on.
func TestPushes(t *testing.T) {
	servers := registries(t)
	small, err := newVariants(random(2, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	large, err := newVariants(random(3, 32<<20))
	if err != nil {
		t.Fatal(err)
	}
	push := func(v *variants, clients int) func(server) (float64, error) {
		return func(s server) (float64, error) {
			_, rate, err := load(t.Context(), s, clients, 300*time.Millisecond, func(_ int, c *conn) (int64, error) {
				end, digest, err := v.another()
				if err == nil {
					err = c.pushBlob(repo, digest, v.base, end)
				}
				if err == nil && s.durably != nil {
					err = s.durably(digest)
				}
				return int64(len(v.base) + len(end)), err
			})
			return rate / 1e6, err
		}
	}
	var all []server
	for _, s := range servers {
		const blobs = 20
		n, err := syncsOf(t, s, func() error { return pushSome(t.Context(), s, small, blobs) })
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("FIGURE fsync, fdatasync and syncfs for each blob pushed to %s: %.1f", s.name, float64(n)/blobs)
		all = append(all, s)
		if n == 0 && s.name == "olareg" {
			s.name += ", synced by the client"
			s.durably = s.syncOlareg
			all = append(all, s)
		}
	}
	inTurns(t, "pushed blobs of 32 MiB, 1 client", "MB/s", all, push(large, 1))
	inTurns(t, "pushed blobs of 32 MiB, 4 clients", "MB/s", all, push(large, 4))
	inTurns(t, "pushed blobs of 1 MiB, 1 client", "MB/s", all, push(small, 1))
	inTurns(t, "pushed blobs of 1 MiB, 16 clients", "MB/s", all, push(small, 16))
}

// pushSome pushes a number of blobs.
func pushSome(ctx context.Context, s server, v *variants, blobs int) error {
	c, err := dial(ctx, s.addr)
	if err != nil {
		return err
	}
	defer c.Close()
	for range blobs {
		end, digest, err := v.another()
		if err != nil {
			return err
		}
		if err := c.pushBlob(repo, digest, v.base, end); err != nil {
			return err
		}
	}
	return nil
}

// syncOlareg makes a blob durable that olareg has acknowledged: its content
// and its name.
func (s server) syncOlareg(digest string) error {
	name := filepath.Join(s.dir, repo, "blobs", strings.ReplaceAll(digest, ":", "/"))
	for _, n := range []string{name, filepath.Dir(name)} {
		f, err := os.Open(n)
		if err != nil {
			return err
		}
		err = f.Sync()
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// syncsOf counts the system calls by which a server makes something durable
// while f runs.
func syncsOf(t *testing.T, s server, f func() error) (int, error) {
	t.Helper()
	if err := bed.Install(t.Context(), "strace"); err != nil {
		return 0, err
	}
	out := filepath.Join(t.TempDir(), "strace")
	trace := exec.Command("strace", "-f", "-qq", "-e", "trace=fsync,fdatasync,syncfs", "-e", "signal=none", "-o", out, "-p", strconv.Itoa(s.process.Pid()))
	trace.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := trace.Start(); err != nil {
		return 0, err
	}
	err := awaitTraced(t.Context(), s.process.Pid())
	if err == nil {
		err = f()
	}
	_ = trace.Process.Signal(syscall.SIGINT) // it detaches
	_ = trace.Wait()                         // and reports the signal
	b, readErr := os.ReadFile(out)
	calls := 0
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "sync") && !strings.Contains(line, "resumed>") {
			calls++
		}
	}
	return calls, errors.Join(err, readErr)
}

// awaitTraced waits until every thread of a process is traced.
func awaitTraced(ctx context.Context, pid int) error {
	for range 6000 {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(files, func(f string) bool {
			b, err := os.ReadFile(f)
			return err == nil && strings.Contains(string(b), "TracerPid:\t0\n")
		}) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return fmt.Errorf("strace doesn't attach to process %d", pid)
}
