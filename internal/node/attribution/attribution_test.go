package attribution

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"sluice/internal/node/cri"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/oci"
)

// node is what an Attributor asks, in memory.
type node struct {
	mu         sync.Mutex
	expected   []string
	optOuts    map[string]string // by image, while they hold
	judged     string            // registry whose images are to be told of, streamed or not
	pulls      map[string]mount.Outcome
	images     map[oci.Digest]mount.Image
	containers map[string]cri.Container
	findError  error
	finds      int
}

func (n *node) Expect(ref string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.expected = append(n.expected, ref)
}

func (n *node) OptOut(ref, why string) func() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.optOuts[ref] = why
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.optOuts, ref)
	}
}

func (n *node) Judges(registry string, _ bool) bool { return registry == n.judged }

func (n *node) LastPull(ref string) (mount.Outcome, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	o, ok := n.pulls[ref]
	return o, ok
}

func (n *node) WhyPresent(_ context.Context, ref string) error {
	return &mount.NotStreaming{Reason: mount.AlreadyPresent, Err: errors.New(ref + " would stream")}
}

func (n *node) Arrived(_ context.Context, id oci.Digest) (mount.Image, int64, int64, error) {
	img, ok := n.images[id]
	if !ok {
		return mount.Image{}, 0, 0, mount.ErrUnknownImage
	}
	return img, 10, 100, nil
}

func (n *node) Find(_ context.Context, id string) (cri.Container, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.finds++
	if n.findError != nil {
		return cri.Container{}, n.findError
	}
	c, ok := n.containers[id]
	if !ok {
		return cri.Container{}, cri.ErrUnknown
	}
	return c, nil
}

func (n *node) add(id string, c cri.Container) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.containers[id] = c
}

const app, plain = "r.test/app:1", "r.test/plain:1"

var (
	artifact = oci.DigestOf([]byte("artifact"))
	manifest = oci.DigestOf([]byte("manifest"))
	web      = happening.Pod{Namespace: "team", Name: "web-0", UID: "1"}
	db       = happening.Pod{Namespace: "team", Name: "db-0", UID: "2"}
)

// newNode returns a node, with its Attributor that runs until the test ends.
func newNode(t *testing.T) (*node, *Attributor) {
	t.Helper()
	n := &node{
		optOuts: make(map[string]string), judged: "r.test", pulls: make(map[string]mount.Outcome),
		images:     map[oci.Digest]mount.Image{artifact: {ID: artifact, Reference: app, Manifest: manifest}},
		containers: make(map[string]cri.Container),
	}
	a := New(Options{Events: happening.NewLog(100), Images: n, Containers: n, OptOut: "stream"})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); a.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return n, a
}

// event waits for the next event after some.
func event(t *testing.T, a *Attributor, seen uint64) happening.Event {
	t.Helper()
	events, _ := a.opts.Events.After(happening.Cursor{})
	c := happening.Cursor{}
	if len(events) > 0 {
		c = happening.Cursor{Epoch: events[0].Epoch, Seq: seen}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	events, _, err := a.opts.Events.Follow(ctx, c)
	if err != nil {
		t.Fatalf("event %d doesn't come: %v", seen+1, err)
	}
	return events[0]
}

func pod(p happening.Pod, image string) cri.Pull { return cri.Pull{Image: image, Pod: p} }

// A streamed image: the first container has what was pulled for it, the next one
// finds the image here, and so does another pod.
func TestStreamed(t *testing.T) {
	n, a := newNode(t)
	end := a.BeginPull(pod(web, app))
	a.Asked(app, manifest, nil)
	a.Asked(app, manifest, nil) // of the next layer
	e := event(t, a, 0)
	if e.Kind != happening.Pulling || e.Pod != web || e.Image != app || e.Digest != manifest || !e.Streamed {
		t.Errorf("while it's pulled: %+v", e)
	}
	end(nil)
	n.add("c1", cri.Container{Pod: web, Name: "init", Image: app})
	a.Created("k8s.io/17/c1", artifact)
	e = event(t, a, 1)
	if e.Kind != happening.Started || e.Pod != web || e.Container != "init" || e.ContainerID != "c1" || e.Image != app || e.Digest != manifest ||
		!e.Streamed || e.Reason != "" || e.Present || e.Duration <= 0 || e.BytesHere != 10 || e.BytesTotal != 100 {
		t.Errorf("the container for which it was pulled: %+v", e)
	}
	n.add("c2", cri.Container{Pod: web, Name: "main", Attempt: 2, Image: app})
	a.Created("k8s.io/18/c2", artifact)
	if e = event(t, a, 2); e.Container != "main" || e.Attempt != 2 || !e.Present || e.Duration != 0 {
		t.Errorf("the pod's second container: %+v", e)
	}
	// kubelet asks for it, and nothing has to come.
	end = a.BeginPull(pod(db, app))
	end(nil)
	n.add("c3", cri.Container{Pod: db, Name: "main", Image: app})
	a.Created("k8s.io/19/c3", artifact)
	if e = event(t, a, 3); e.Pod != db || !e.Present || e.Duration != 0 {
		t.Errorf("another pod's: %+v", e)
	}
	if want := []string{app, app}; !slices.Equal(n.expected, want) {
		t.Errorf("expected were %q, want %q", n.expected, want)
	}
	if len(a.pulls) != 0 {
		t.Errorf("pulls are remembered for nobody: %+v", a.pulls)
	}
}

// Pods that pull the same image at once have each its own pull.
func TestPullsAtOnce(t *testing.T) {
	n, a := newNode(t)
	endWeb, endDB, other := a.BeginPull(pod(web, app)), a.BeginPull(pod(db, app)), a.BeginPull(pod(db, plain))
	a.Asked(app, manifest, nil)
	endDB(nil)
	endWeb(nil)
	other(errors.New("broken off"))
	for i, p := range []happening.Pod{db, web} {
		if e := event(t, a, uint64(i)); e.Kind != happening.Pulling {
			t.Errorf("%+v", e)
		}
		id := fmt.Sprint("c", i)
		n.add(id, cri.Container{Pod: p, Name: "main", Image: app})
	}
	a.Created("k8s.io/1/c0", artifact)
	a.Created("k8s.io/2/c1", artifact)
	for i := range 2 {
		if e := event(t, a, uint64(2+i)); e.Present || e.Duration <= 0 {
			t.Errorf("%+v", e)
		}
	}
	if len(a.pulls) != 0 {
		t.Errorf("left are %+v", a.pulls)
	}
}

// What doesn't stream has a reason: that of the pull for this container, of the
// last pull, or that nobody knows any more.
func TestNotStreamed(t *testing.T) {
	n, a := newNode(t)
	no := &mount.NotStreaming{Reason: mount.NoStreamingArtifact, Err: errors.New("no referrer")}
	end := a.BeginPull(pod(web, plain))
	a.Asked(plain, manifest, no)
	end(nil)
	seen := uint64(0)
	start := func(p happening.Pod, image string) happening.Event {
		t.Helper()
		id := fmt.Sprint("c", seen)
		n.add(id, cri.Container{Pod: p, Name: "main", Image: image})
		a.Created("k8s.io/1/"+id, "")
		seen++
		return event(t, a, seen-1)
	}
	is := func(what string, e happening.Event, present bool, reason mount.Reason, message string) {
		t.Helper()
		if e.Kind != happening.Started || e.Streamed || e.Present != present || e.Reason != string(reason) || e.Message != message || e.Remedy != reason.Remedy() {
			t.Errorf("%s: %+v", what, e)
		}
	}
	is("the pull's reason", start(web, plain), false, mount.NoStreamingArtifact, "no referrer")
	is("nobody knows", start(db, plain), true, mount.AlreadyPresent, plain+" would stream")
	n.pulls[plain] = mount.Outcome{Reason: mount.Unauthorized, Message: "Unauthorized: HTTP 401", Manifest: manifest}
	e := start(db, plain)
	is("the last pull's reason", e, true, mount.Unauthorized, "HTTP 401")
	if e.Digest != manifest {
		t.Errorf("its manifest is %s", e.Digest)
	}
	n.pulls[plain] = mount.Outcome{} // streamed, by then
	is("it would stream now", start(db, plain), true, mount.AlreadyPresent, plain+" would stream")
	end = a.BeginPull(pod(web, plain))
	a.Asked(plain, manifest, nil)
	a.Asked(plain, manifest, errors.New("the disk is full")) // of a layer above
	end(nil)
	seen++ // it was said to stream
	is("a reason of the node's own", start(web, plain), false, mount.PlaneUnavailable, "the disk is full")
}

// What is none of this node's business isn't told of.
func TestOnlyOwn(t *testing.T) {
	n, a := newNode(t)
	n.add("c1", cri.Container{Pod: web, Name: "a", Image: "other.test/x:1"})
	n.add("c2", cri.Container{Pod: web, Name: "b", Image: "NO NAME"})
	n.add("pause", cri.Container{Sandbox: true, Pod: web})
	n.add("last", cri.Container{Pod: web, Name: "last", Image: plain})
	for _, id := range []string{"c1", "c2", "pause"} {
		a.Created("k8s.io/1/"+id, "")
	}
	a.Created("moby/1/last", "") // of another client of containerd
	end := a.BeginPull(pod(web, "other.test/x:1"))
	a.Asked("other.test/x:1", manifest, nil)
	end(nil)
	bound := time.Now().Add(20 * time.Second)
	for asked := 0; asked < 3 && time.Now().Before(bound); { // all of them are done with
		n.mu.Lock()
		asked = n.finds
		n.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	a.Created("k8s.io/1/last", "")
	if e := event(t, a, 0); e.Container != "last" {
		t.Errorf("told of %+v", e)
	}
}

// Containers of other namespaces of containerd aren't told of.
func TestNamespace(t *testing.T) {
	_, a := newNode(t)
	a.opts.Containers, a.opts.Namespace = nil, "k8s.io"
	a.Created("moby/1/theirs", artifact)
	a.Created("k8s.io/2/ours", artifact)
	if e := event(t, a, 0); e.ContainerID != "ours" {
		t.Errorf("told of %+v", e)
	}
}

// Without anybody who knows pods it's the image that counts, and what the
// snapshotter has seen of its pull.
func TestWithoutCRI(t *testing.T) {
	n, a := newNode(t)
	a.opts.Containers = nil
	a.Asked(app, manifest, nil)
	a.Created("default/3/my/container", artifact)
	if e := event(t, a, 0); e.Kind != happening.Pulling || e.Pod != (happening.Pod{}) {
		t.Errorf("while it's pulled: %+v", e)
	}
	e := event(t, a, 1)
	if e.Pod != (happening.Pod{}) || e.ContainerID != "container" || e.Image != app || !e.Streamed || e.Present || e.Duration <= 0 {
		t.Errorf("%+v", e)
	}
	a.Created("k8s.io/4/second", artifact)
	if e = event(t, a, 2); !e.Present || n.finds > 0 {
		t.Errorf("%+v, asked %d times", e, n.finds)
	}
}

// Pulls that kubelet makes past this daemon are those that the snapshotter sees.
func TestPullsPastTheDaemon(t *testing.T) {
	n, a := newNode(t)
	a.Asked(app, manifest, nil)
	n.add("c1", cri.Container{Pod: web, Name: "a", Image: app})
	a.Created("k8s.io/1/c1", artifact)
	if e := event(t, a, 1); e.Pod != web || e.Present || e.Duration <= 0 {
		t.Errorf("%+v", e)
	}
	now := time.Now()
	for _, c := range []struct {
		why   error
		after time.Duration
		over  bool
	}{{nil, 14 * time.Second, false}, {nil, 16 * time.Second, true}, {errors.New("ordinary"), 9 * time.Minute, false}, {errors.New("ordinary"), 11 * time.Minute, true}} {
		if p := (&pull{seen: true, ended: now, why: c.why}); p.over(now.Add(c.after)) != c.over {
			t.Errorf("%v after it was last asked for, why %v: over is %v", c.after, c.why, !c.over)
		}
	}
}

func TestOptOutByAnnotation(t *testing.T) {
	n, a := newNode(t)
	for value, out := range map[string]bool{"false": true, "False": true, "0": true, "true": false, "1": false, "": false, "no": false} {
		p := pod(web, app)
		p.Annotations = map[string]string{"stream": value, "other": "false"}
		before := len(n.expected)
		end := a.BeginPull(p)
		if why, is := n.optOuts[app]; is != out || is && why != fmt.Sprintf("pod team/web-0 opts out by its annotation stream: %q", value) {
			t.Errorf("%q: %v, %q", value, is, why)
		}
		if expected := len(n.expected) > before; expected == out {
			t.Errorf("%q: whether it's looked up ahead: %v", value, expected)
		}
		end(nil)
		if len(n.optOuts) > 0 {
			t.Errorf("%q: it goes on after the pull", value)
		}
	}
	a.opts.OptOut = ""
	p := pod(web, app)
	p.Annotations = map[string]string{"": "false"}
	if end := a.BeginPull(p); len(n.optOuts) > 0 {
		t.Error("without a key somebody opts out")
	} else {
		end(nil)
	}
}

// What nobody claims is bounded.
func TestPullsAreBounded(t *testing.T) {
	_, a := newNode(t)
	for i := range 3 * maxPulls {
		a.BeginPull(pod(web, fmt.Sprintf("r.test/app:%d", i)))(nil)
		a.BeginPull(pod(db, app)) // that never ends
		a.Asked(fmt.Sprintf("other.test/seen:%d", i), "", errors.New("no"))
	}
	if len(a.pulls) > maxPulls {
		t.Errorf("%d pulls", len(a.pulls))
	}
}

// A daemon that ends doesn't wait for containerd's answer, nor does one that asks
// for what will never be hold others up.
func TestUnknownContainers(t *testing.T) {
	n, a := newNode(t)
	for i := range maxAsking - 1 {
		a.Created(fmt.Sprintf("k8s.io/1/never-%d", i), artifact)
	}
	n.add("real", cri.Container{Pod: web, Name: "real", Image: app})
	a.Created("k8s.io/1/real", artifact)
	if e := event(t, a, 0); e.Container != "real" {
		t.Errorf("told of %+v", e)
	}
}
