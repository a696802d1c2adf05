package whole

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"sluice/test/bed"
)

// TestManyStartAtOnce starts fifty containers of an image that the node has
// never seen at once: its bytes cross the network once.
func TestManyStartAtOnce(t *testing.T) {
	s := theStage(t)
	link, err := bed.NewLink(t.Context(), s.Registry.Addr, 200e6, 10*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	one, oneTook := s.startTogether(t, link, 1)
	many, manyTook := s.startTogether(t, link, 50)
	t.Logf("FIGURE one container fetches %.1f MB and starts within %.1f s, fifty at once %.1f MB and %.1f s",
		float64(one)/1e6, oneTook.Seconds(), float64(many)/1e6, manyTook.Seconds())
	// What is fetched ahead depends on timing.
	if many > one+one/3 {
		t.Errorf("fifty containers fetch %d bytes, one fetches %d: the same were fetched again", many, one)
	}
}

// TestUnforeseenStart imports a library that no boot pack foresaw: that is bound
// by the bandwidth, not by one round trip after the other.
func TestUnforeseenStart(t *testing.T) {
	s := theStage(t)
	// As much on the way as at 200 Mbit/s and 10 ms, but so slow that the processor's part
	// is small, on a machine that is slow, too.
	const rate = 40e6
	link, err := bed.NewLink(t.Context(), s.Registry.Addr, rate, 50*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	n := s.freshNode(t)
	ref := link.Addr() + "/debian:28"
	if err := n.Pull(t.Context(), bed.Sluice, ref); err != nil {
		t.Fatal(err)
	}
	run := func(id, program string) float64 {
		t.Helper()
		out, err := printed(t, n, ref, id, program)
		if err != nil {
			t.Fatal(err)
		}
		var seconds float64
		if _, err := fmt.Sscan(out, &seconds); err != nil {
			t.Fatalf("printed %q", out)
		}
		return seconds
	}
	run("foreseen", "import time; print(0)") // all that the interpreter itself needs
	before := link.Stats()
	const program = "import time; t = time.time(); import numpy; print(time.time() - t)"
	cold := run("unforeseen", program)
	fetched := link.Stats().Down - before.Down
	warm := run("warm", program)
	used := float64(fetched) * 8 / (rate * (cold - warm))
	t.Logf("FIGURE import numpy, which nothing foresaw: %.2f s, %.2f of them its own work; %.1f MB at %.2f of the bandwidth", cold, warm, float64(fetched)/1e6, used)
	if used < 0.3 { // on a machine that does something else meanwhile
		t.Errorf("it used %.2f of the bandwidth", used)
	}
}

// startTogether starts so many containers at once on a fresh node, and returns
// the bytes that the registry sent and the time up to the last one's end.
func (s *stage) startTogether(t *testing.T, link *bed.Link, count int) (bytes int64, took time.Duration) {
	t.Helper()
	n := s.freshNode(t)
	if err := bed.DropCaches(); err != nil {
		t.Fatal(err)
	}
	ref := link.Addr() + "/debian:28"
	before, began := link.Stats(), time.Now()
	if err := n.Pull(t.Context(), bed.Sluice, ref); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for i := range count {
		all.Go(func() {
			id := fmt.Sprintf("together-%d-%d", count, i)
			out, err := printed(t, n, ref, id, `import json; print("hi")`)
			if err != nil || out != "hi\n" {
				t.Errorf("container %d printed %q, %v", i, out, err)
			}
		})
	}
	all.Wait()
	return link.Stats().Down - before.Down, time.Since(began)
}

// printed runs a program of Python in a container and returns what it printed, by way
// of a file: ctr gives up reading that from the container's shim when it has ended.
func printed(t *testing.T, n *bed.Node, ref, id, program string) (string, error) {
	t.Helper()
	name := filepath.Join(n.Dir, "output-"+id)
	problems, err := n.CtrCommand(t.Context(), "run", "--rm", "--net-host", "--snapshotter", bed.Sluice, "--log-uri", "file://"+name,
		ref, id, "python3", "-c", program).CombinedOutput()
	out, rerr := os.ReadFile(name)
	if err = errors.Join(err, rerr); err != nil {
		err = fmt.Errorf("%w\n%s", err, problems)
	}
	return string(out), err
}

// freshNode starts a node that fetches only what is read.
func (s *stage) freshNode(t *testing.T) *bed.Node {
	t.Helper()
	dir, err := os.MkdirTemp(s.Work, "node-")
	if err != nil {
		t.Fatal(err)
	}
	n, err := bed.NewNode(s.Tools, s.Sluice, dir, "--no-fill")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	if err := n.StartSluice(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}
