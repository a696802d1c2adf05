package whole

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/test/bed"
)

// stage is what all tests share: it is set up by the first that asks.
type stage struct {
	*bed.Stage
	images bed.Images
}

var shared struct {
	once  sync.Once
	stage *stage
	err   error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if s := shared.stage; s != nil {
		code = s.CloseAfter(code)
	}
	os.Exit(code)
}

// theStage returns the shared stage: a registry with the Debian image as
// debian:1 and debian:28, converted, and as debian:plain, not converted.
func theStage(t *testing.T) *stage {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting images and running containers needs root")
	}
	shared.once.Do(func() { shared.stage, shared.err = setUp(t) })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.stage
}

func setUp(t *testing.T) (*stage, error) {
	ctx := context.Background() // the stage outlives the test that set it up
	say := func(s string) { t.Log(s) }
	base, err := bed.NewStage(ctx, "whole", say)
	s := &stage{Stage: base}
	if err != nil {
		return s, err
	}
	if s.images, err = bed.Debian(ctx, say); err != nil {
		return s, err
	}
	for name, layout := range map[string]string{"debian:1": s.images.OneLayer, "debian:28": s.images.ManyLayers} {
		if err := s.Push(ctx, layout, name); err != nil {
			return s, err
		}
		begin := time.Now()
		if err := s.Convert(ctx, s.Ref(name)); err != nil {
			return s, err
		}
		t.Logf("FIGURE conversion of %s took %.1f s", name, time.Since(begin).Seconds())
	}
	return s, s.Push(ctx, s.images.ManyLayers, "plain/debian:28")
}

// crane runs crane against the registry.
func (s *stage) crane(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), s.Tools.Crane, append(args, "--insecure")...).CombinedOutput()
	if err != nil {
		t.Fatalf("crane %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// node starts a node that the end of the test takes down.
func (s *stage) node(t *testing.T) *bed.Node {
	t.Helper()
	dir, err := os.MkdirTemp(s.Work, "node-")
	if err != nil {
		t.Fatal(err)
	}
	n, err := bed.StartNode(t.Context(), s.Tools, s.Sluice, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			for _, log := range []string{"sluice.log", "containerd.log"} {
				b, _ := os.ReadFile(filepath.Join(dir, log))
				t.Logf("%s:\n%s", log, b[max(0, len(b)-4000):])
			}
		}
		os.RemoveAll(dir)
	})
	return n
}

// run runs a shell command in a new container of an image that was pulled.
func run(t *testing.T, n *bed.Node, snapshotter, ref, script string) string {
	t.Helper()
	id := fmt.Sprintf("c%d", time.Now().UnixNano())
	r, err := n.Run(t.Context(), snapshotter, ref, id, "/bin/sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	return r.Output
}

// pull pulls an image.
func pull(t *testing.T, n *bed.Node, snapshotter, ref string) {
	t.Helper()
	if err := n.Pull(t.Context(), snapshotter, ref); err != nil {
		t.Fatal(err)
	}
}

// erofsMounts counts a node's mounted images.
func erofsMounts(t *testing.T, n *bed.Node) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, n.Dir+"/") && strings.Contains(line, " - erofs ") {
			count++
		}
	}
	return count
}
