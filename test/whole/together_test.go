package whole

import (
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"sluice/test/bed"
)

// TestManyStartAtOnce starts fifty containers of an image that the node has
// never seen at once: its bytes cross the network once.
func TestManyStartAtOnce(t *testing.T) {
	s := theStage(t)
	link, err := bed.NewLink(t.Context(), s.reg.Addr, 200e6, 10*time.Millisecond)
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

// startTogether starts so many containers at once on a fresh node, and returns
// the bytes that the registry sent and the time up to the last one's end.
func (s *stage) startTogether(t *testing.T, link *bed.Link, count int) (bytes int64, took time.Duration) {
	t.Helper()
	dir, err := os.MkdirTemp(s.work, "node-")
	if err != nil {
		t.Fatal(err)
	}
	n, err := bed.NewNode(s.tools, s.sluice, dir, "--no-fill")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	}()
	if err := n.StartSluice(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
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
			out, err := n.CtrCommand(t.Context(), "run", "--rm", "--net-host", "--snapshotter", bed.Sluice, ref, id, "python3", "-c", `import json; print("hi")`).Output()
			if err != nil || string(out) != "hi\n" {
				t.Errorf("container %d printed %q, %v", i, out, err)
			}
		})
	}
	all.Wait()
	return link.Stats().Down - before.Down, time.Since(began)
}
