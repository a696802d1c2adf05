package lifecycle

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/node/mount/control"
	"sluice/test/bed"
)

// stage is what all tests share: it is set up by the first that asks.
type stage struct {
	*bed.Stage
	app   bed.Toolbox // app:1, which streams
	plain bed.Toolbox // plain:1, which doesn't, and pods' own container
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
	base, err := bed.NewStage(ctx, "life", func(s string) { t.Log(s) })
	s := &stage{Stage: base}
	if err != nil {
		return s, err
	}
	for _, step := range []func() error{
		func() (err error) {
			s.app, err = bed.NewToolbox(ctx, filepath.Join(s.Work, "app"), 1, 300_000, 2_000_000, 10_000)
			return
		},
		func() (err error) {
			s.plain, err = bed.NewToolbox(ctx, filepath.Join(s.Work, "plain"), 2, 50_000)
			return
		},
		func() error { return s.Push(ctx, s.app.Layout, "app:1") },
		func() error { return s.Push(ctx, s.plain.Layout, "plain:1") },
		func() error { return s.Convert(ctx, s.Ref("app:1")) },
	} {
		if err := step(); err != nil {
			return s, err
		}
	}
	return s, nil
}

// newNode makes a node that the end of the test takes down. Nothing runs yet.
func (s *stage) newNode(t *testing.T, tools bed.Tools, flags ...string) *bed.Node {
	t.Helper()
	dir, err := os.MkdirTemp(s.Work, "node-")
	if err == nil {
		err = os.Chmod(dir, 0o711) // like /run: roots of user namespaces pass through
	}
	if err != nil {
		t.Fatal(err)
	}
	n, err := bed.NewNode(tools, s.Sluice, dir, flags...)
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
				t.Logf("%s:\n%s", log, b[max(0, len(b)-6000):])
			}
			if err := n.Clear(); err != nil {
				t.Error(err)
			}
		}
		os.RemoveAll(dir)
	})
	return n
}

// must fails the test.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// start starts both of a node's daemons.
func start(t *testing.T, n *bed.Node) {
	t.Helper()
	must(t, n.StartSluice(t.Context()))
	must(t, n.StartContainerd(t.Context()))
}

// status asks the node daemon.
func status(t *testing.T, n *bed.Node) control.Status {
	t.Helper()
	var s control.Status
	out, err := n.Command(t.Context(), "node", "status", "--output", "json").Output()
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	if err != nil {
		t.Fatalf("node status: %v\n%s", err, out)
	}
	return s
}

// streams fails the test unless exactly one image is streamed, under the
// reference.
func streams(t *testing.T, n *bed.Node, ref string) {
	t.Helper()
	s := status(t, n)
	if len(s.Images) != 1 || s.Images[0].Reference != ref {
		t.Fatalf("streamed images: %+v, want %s; pulls: %+v", s.Images, ref, s.Pulls)
	}
}

// patience is how long the tests wait for what takes a second or two, unless the
// machine is very busy.
const patience = time.Minute

// eventually waits for something that happens by itself.
func eventually(t *testing.T, bound time.Duration, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(bound); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if is() {
			return
		}
	}
	if !is() {
		t.Fatalf("after %v still not: %s", bound, what)
	}
}

// checkSums is a command whose output sumsOf is, if all files are right.
func checkSums() []string {
	return []string{"/bin/sh", "-c", "sha256sum /data/*"}
}

// sumsOf is what checkSums prints.
func sumsOf(b bed.Toolbox) string {
	var out strings.Builder
	for _, name := range slices.Sorted(maps.Keys(b.Sums)) {
		fmt.Fprintf(&out, "%s  %s\n", b.Sums[name], name)
	}
	return out.String()
}
