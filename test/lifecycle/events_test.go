package lifecycle

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
	"sluice/test/bed"
)

const optOut = "sluice.dev/artifact-streaming"

// eventImages are images of the test of events, and their layers nobody else's.
type eventImages struct{ out, late string }

func (s *stage) eventImages(t *testing.T) eventImages {
	t.Helper()
	for i, name := range []string{"out:1", "late:1"} {
		box, err := bed.NewToolbox(t.Context(), filepath.Join(t.TempDir(), name), uint64(20+i), 40_000)
		must(t, err)
		must(t, s.Push(t.Context(), box.Layout, name))
	}
	must(t, s.Convert(t.Context(), s.Ref("out:1")))
	return eventImages{s.Ref("out:1"), s.Ref("late:1")}
}

// TestEvents runs pods as kubelet does and follows what is told of them: streamed
// and not, pulled and present, by tag and by digest, restarted, opted out; with
// both of containerd's ways to pull, and after the daemon was killed.
func TestEvents(t *testing.T) {
	s := theStage(t)
	images := s.eventImages(t)
	out, err := exec.CommandContext(t.Context(), s.Tools.Crane, "digest", "--insecure", s.Ref("app:1")).Output()
	must(t, err)
	digest := strings.TrimSpace(string(out))
	for _, c := range []struct {
		name  string
		local bool
		app   string
	}{{"transfer service, by tag", false, s.Ref("app:1")}, {"CRI's own pull, by digest", true, s.Ref("app@" + digest)}} {
		t.Run(c.name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "containerd.sock")
			n := s.newNode(t, s.Tools, "--cri-socket", socket)
			must(t, os.Symlink(n.ContainerdSocket(), socket))
			must(t, n.EnableCRI(bed.CRI{Sandbox: s.Ref("plain:1"), LocalPull: c.local}, s.Registry.Addr))
			start(t, n)
			k, err := n.Kubelet(filepath.Join(n.Dir, "run", "cri.sock"))
			must(t, err)
			t.Cleanup(k.Close) // after the pods are gone
			e := eventsOf{t, n, k, follow(t, n, "")}
			e.pods(c.app, digest, images)
		})
	}
}

// TestEventsOfOtherClients pulls past the daemon, as a kubelet does that wasn't
// told of it, and runs a container that is no pod's: the first of a pod's
// containers has what the snapshotter has seen of the pull.
func TestEventsOfOtherClients(t *testing.T) {
	s := theStage(t)
	socket := filepath.Join(t.TempDir(), "containerd.sock")
	n := s.newNode(t, s.Tools, "--cri-socket", socket)
	must(t, os.Symlink(n.ContainerdSocket(), socket))
	must(t, n.EnableCRI(bed.CRI{Sandbox: s.Ref("plain:1")}, s.Registry.Addr))
	start(t, n)
	k, err := n.Kubelet("")
	must(t, err)
	t.Cleanup(k.Close)
	e := eventsOf{t, n, k, follow(t, n, "")}
	app := s.Ref("app:1")
	web := e.sandbox(map[string]string{optOut: "false"}) // which only kubelet's pulls tell
	id := e.pull(web, app)
	if h := e.next(); h.Kind != happening.Pulling || h.Image != app || h.Pod != (happening.Pod{}) {
		t.Errorf("while it's pulled: %+v", h)
	}
	if h := e.start(web, "init", 0, app, id); !h.Streamed || h.Present || h.Duration <= 0 || h.Duration > time.Minute {
		t.Errorf("the first container: %+v", h)
	}
	if h := e.start(web, "main", 0, app, id); !h.Streamed || !h.Present || h.Duration != 0 {
		t.Errorf("the second container: %+v", h)
	}
	must(t, n.Pull(t.Context(), bed.Sluice, app))
	_, err = n.Run(t.Context(), bed.Sluice, app, "alone", "/bin/sh", "-c", "exit")
	must(t, err)
	h := e.next()
	if h.Kind == happening.Pulling { // containerd's other namespace may ask again
		h = e.next()
	}
	if h.Kind != happening.Started || h.ContainerID != "alone" || h.Pod != (happening.Pod{}) || h.Image != app || !h.Streamed || h.BytesTotal == 0 {
		t.Errorf("a container of ctr: %+v", h)
	}
}

// eventsOf is one run of the test.
type eventsOf struct {
	*testing.T
	n      *bed.Node
	k      *bed.Kubelet
	events <-chan control.Happening
}

func (e *eventsOf) pods(app, digest string, images eventImages) {
	e.Helper()
	// An init container for which the image is pulled, and one that finds it here.
	web := e.sandbox(nil)
	id := e.pull(web, app)
	h := e.next()
	if h.Kind != happening.Pulling || h.Image != app || h.Digest.String() != digest || !h.Streamed || !of(h, web) {
		e.Errorf("while it's pulled: %+v", h)
	}
	h = e.start(web, "init", 0, app, id)
	if !h.Streamed || h.Present || h.Duration <= 0 || h.Duration > time.Minute || h.Digest.String() != digest || h.BytesTotal < 2_000_000 || h.BytesHere > h.BytesTotal {
		e.Errorf("the init container: %+v", h)
	}
	first := h
	if h = e.start(web, "main", 0, app, id); !h.Streamed || !h.Present || h.Duration != 0 {
		e.Errorf("the container: %+v", h)
	}
	if h = e.start(web, "main", 1, app, id); !h.Present || h.Attempt != 1 {
		e.Errorf("the container's second attempt: %+v", h)
	}
	// Another pod pulls always, and nothing has to come.
	again := e.sandbox(nil)
	if h = e.start(again, "main", 0, app, e.pull(again, app)); !h.Streamed || !h.Present || h.Duration != 0 {
		e.Errorf("a pod for which it's pulled again: %+v", h)
	}
	// An image that doesn't stream.
	plain := e.sandbox(nil)
	lateID := e.pull(plain, images.late)
	is := func(what string, h control.Happening, present bool, reason mount.Reason) {
		e.Helper()
		if h.Streamed || h.Present != present || h.Reason != string(reason) || h.Remedy != reason.Remedy() || h.Message == "" || (h.Duration > 0) == present {
			e.Errorf("%s: %+v", what, h)
		}
	}
	is("an image that nobody has converted", e.start(plain, "main", 0, images.late, lateID), false, mount.NoStreamingArtifact)
	is("its second container", e.start(plain, "other", 0, images.late, lateID), true, mount.NoStreamingArtifact)
	// A pod that doesn't want it.
	out := e.sandbox(map[string]string{optOut: "false"})
	outID := e.pull(out, images.out)
	h = e.start(out, "main", 0, images.out, outID)
	is("a pod that opts out", h, false, mount.Disabled)
	if !strings.Contains(h.Message, optOut) {
		e.Errorf("a pod that opts out is told %q", h.Message)
	}
	e.after(first, web, app, id)
	// Without the pulls' reasons it's what would become of them now.
	is("after a restart, an image that nobody has converted", e.start(plain, "main", 1, images.late, lateID), true, mount.NoStreamingArtifact)
	is("after a restart, an image that would stream", e.start(out, "main", 1, images.out, outID), true, mount.AlreadyPresent)
	e.table()
}

// after is what is told when the daemon was killed and is there again.
func (e *eventsOf) after(first control.Happening, web bed.Sandbox, app, id string) {
	e.Helper()
	e.n.Sluice.Kill()
	for range e.events { // it ends
	}
	must(e.T, e.n.StartSluice(e.Context()))
	connected(e.T, e.n)
	e.events = follow(e.T, e.n, first.Cursor().String())
	h := e.start(web, "main", 2, app, id)
	if !h.Streamed || !h.Present || h.Attempt != 2 || h.Seq != 1 || h.Epoch == first.Epoch {
		e.Errorf("after a restart: %+v", h)
	}
}

// table compares what people see with the three events that came since.
func (e *eventsOf) table() {
	e.Helper()
	table, err := e.n.Command(e.Context(), "node", "events").CombinedOutput()
	lines := strings.Split(strings.TrimSpace(string(table)), "\n")
	if err != nil || len(lines) != 4 || !strings.HasPrefix(lines[0], "TIME ") || !strings.Contains(lines[1], "main (2)") || !strings.Contains(lines[2], "not streamed: NoStreamingArtifact: ") || !strings.Contains(lines[3], "not streamed: AlreadyPresent: ") {
		e.Errorf("the table is, %v:\n%s", err, table)
	}
}

func (e *eventsOf) sandbox(annotations map[string]string) bed.Sandbox {
	e.Helper()
	s, err := e.k.StartSandbox(e.Context(), false, annotations)
	must(e.T, err)
	e.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := e.k.RemovePod(ctx, bed.Pod{Sandbox: s.ID}); err != nil {
			e.Error(err)
		}
	})
	return s
}

func (e *eventsOf) pull(s bed.Sandbox, ref string) (id string) {
	e.Helper()
	id, err := e.k.PullFor(e.Context(), s, ref)
	must(e.T, err)
	return id
}

// start starts a container and returns what is told of it.
func (e *eventsOf) start(s bed.Sandbox, name string, attempt uint32, ref, id string) control.Happening {
	e.Helper()
	container, err := e.k.StartContainer(e.Context(), s, name, attempt, ref, id, "/bin/sh", "-c", "exit")
	must(e.T, err)
	h := e.next()
	if h.Kind != happening.Started || !of(h, s) || h.Container != name || h.ContainerID != container || h.Attempt != attempt || h.Image != ref {
		e.Errorf("container %s, attempt %d on %s is told of as %+v", name, attempt, ref, h)
	}
	return h
}

func of(h control.Happening, s bed.Sandbox) bool {
	m := s.Metadata()
	return h.Pod == happening.Pod{Namespace: m.Namespace, Name: m.Name, UID: m.Uid}
}

// next waits for what is told next.
func (e *eventsOf) next() control.Happening {
	e.Helper()
	select {
	case h, ok := <-e.events:
		if !ok || h.Lost > 0 {
			e.Fatalf("%d events were lost, it goes on: %t", h.Lost, ok)
		}
		return h
	case <-time.After(patience):
		e.Fatal("nothing is told")
		return control.Happening{}
	}
}

// follow follows a node's events until it ends, or the test does.
func follow(t *testing.T, n *bed.Node, after string) <-chan control.Happening {
	t.Helper()
	events := make(chan control.Happening, 100)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(events)
		client := control.NewClient(filepath.Join(n.Dir, "run", "control.sock"))
		err := client.Events(ctx, after, true, func(h control.Happening) error {
			events <- h
			return nil
		})
		if ctx.Err() == nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("following events ended with %v", err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return events
}
