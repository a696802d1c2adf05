package pulled_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice/internal/node/pulled"
	server "sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/oci"
)

// The test binary is also the process that is killed.
const victimVariable = "SLUICE_TEST_PULL"

func TestMain(m *testing.M) {
	if dir := os.Getenv(victimVariable); dir != "" {
		if err := pullForEver(dir, os.Args[len(os.Args)-1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// pullForEver pulls and removes an image of the registry at addr until it's killed.
func pullForEver(root, addr string) error {
	ctx := context.Background()
	s, err := pulled.Open(ctx, pulled.Options{
		Root: root, KeepFree: -1, Platform: oci.Platform{OS: "linux", Architecture: "amd64"},
		Registry: func(host, _ string) (oci.Registry, error) { return remote.New(host, remote.Options{}) },
	})
	if err != nil {
		return err
	}
	for {
		if _, err := s.Pull(ctx, addr+"/"+repo+":v1", "me", nil); err != nil {
			return err
		}
		if err := s.Release(ctx, "me"); err != nil {
			return err
		}
		s.Collect(ctx)
	}
}

// Whenever a process is killed, what the next one finds is whole.
func TestKilledPulls(t *testing.T) {
	reg := newRegistry(t)
	want := map[string]string{"a": noise(9, 500_000), "b": noise(10, 500_000), "sparse": "head" + strings.Repeat("\x00", 1<<20-8) + "tail"}
	reg.image("v1", "amd64", false, nil, tarOf(t, "a", want["a"]), tarOf(t, "b", want["b"]), sparseTar(t))
	web := httptest.NewServer(server.NewHandler(reg, server.Options{}))
	t.Cleanup(web.Close)
	root := t.TempDir()
	for i := range 12 {
		var said strings.Builder
		cmd := exec.CommandContext(t.Context(), os.Args[0], strings.TrimPrefix(web.URL, "http://"))
		cmd.Env = append(os.Environ(), victimVariable+"="+root)
		cmd.Stderr = &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(20+rand.IntN(150)) * time.Millisecond) // somewhere in the middle
		if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); said.Len() > 0 {
			t.Fatalf("%v: %s", err, &said)
		}
		s := open(t, root, reg, pulled.Options{})
		if rest := left(t, root); strings.Contains(rest, "/.") {
			t.Errorf("round %d: left are %s", i, rest)
		}
		img := pull(t, s, host+"/"+repo+":v1", "me")
		if i == 11 {
			if got := show(t, s, img.ID); len(got) != 3 || got["a"] != want["a"] || got["b"] != want["b"] || got["sparse"] != want["sparse"] {
				t.Error("it shows something else than was pushed")
			}
		}
		if i%2 == 0 { // the next one begins with nothing
			if err := s.Release(t.Context(), "me"); err != nil {
				t.Error(err)
			}
			s.Collect(t.Context())
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}
