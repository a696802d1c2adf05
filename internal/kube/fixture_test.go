package kube_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/kube"
	"sluice/internal/kube/kubemem"
	"sluice/internal/node/happening"
)

const node = "node-a"

// nodeDaemon is a node daemon in memory. It may be used concurrently.
type nodeDaemon struct {
	mu   sync.Mutex
	log  *happening.Log // nil: the daemon is gone
	bad  string         // why it can't stream
	off  string         // why it's switched off
	said []string
}

var errGone = errors.New("nobody answers")

// start begins a daemon's life anew.
func (d *nodeDaemon) start() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log, d.off = happening.NewLog(happening.Capacity), ""
}

// stop ends the daemon.
func (d *nodeDaemon) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log.Close()
	d.log = nil
}

func (d *nodeDaemon) add(events ...happening.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range events {
		d.log.Add(e)
	}
}

func (d *nodeDaemon) Streams(ctx context.Context) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.log == nil {
		return "", errGone
	}
	return d.bad + d.off, ctx.Err()
}

func (d *nodeDaemon) SetStreaming(ctx context.Context, on bool, why string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.log == nil {
		return errGone
	}
	d.off = why
	d.said = append(d.said, fmt.Sprint(on))
	return ctx.Err()
}

func (d *nodeDaemon) Follow(ctx context.Context, after happening.Cursor, each func(happening.Event, uint64) error) error {
	d.mu.Lock()
	log := d.log
	d.mu.Unlock()
	if log == nil {
		return errGone
	}
	for {
		events, lost, err := log.Follow(ctx, after)
		if err != nil {
			return err
		}
		for _, e := range events {
			if err := each(e, lost); err != nil {
				return err
			}
			after, lost = e.Cursor(), 0
		}
	}
}

// troubled is a cluster with troubles: before is asked before each request, and
// after when it was done. It counts requests.
type troubled struct {
	kube.Cluster
	mu            sync.Mutex
	before, after func(request string, pod kube.PodRef) error
	requests      []string
}

func (c *troubled) do(request string, pod kube.PodRef, do func() error) error {
	c.mu.Lock()
	c.requests = append(c.requests, request)
	before, after := c.before, c.after
	c.mu.Unlock()
	if before != nil {
		if err := before(request, pod); err != nil {
			return err
		}
	}
	if err := do(); err != nil || after == nil {
		return err
	}
	return after(request, pod)
}

// set sets the troubles from now on.
func (c *troubled) set(before, after func(request string, pod kube.PodRef) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.before, c.after = before, after
}

// count counts requests of a kind; "": all.
func (c *troubled) count(request string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, r := range c.requests {
		if request == "" || r == request {
			n++
		}
	}
	return n
}

func (c *troubled) CreateEvent(ctx context.Context, e kube.Event) error {
	return c.do("create", e.Pod, func() error { return c.Cluster.CreateEvent(ctx, e) })
}

func (c *troubled) RepeatEvent(ctx context.Context, r kube.Repeat) error {
	return c.do("repeat", kube.PodRef{}, func() error { return c.Cluster.RepeatEvent(ctx, r) })
}

func (c *troubled) Pod(ctx context.Context, ref kube.PodRef) (p kube.Pod, err error) {
	err = c.do("pod", ref, func() (err error) { p, err = c.Cluster.Pod(ctx, ref); return err })
	return p, err
}

func (c *troubled) SetCondition(ctx context.Context, ref kube.PodRef, cond kube.Condition) error {
	return c.do("condition", ref, func() error { return c.Cluster.SetCondition(ctx, ref, cond) })
}

func (c *troubled) SetNodeLabel(ctx context.Context, node, key string, value *string) error {
	return c.do("label", kube.PodRef{}, func() error { return c.Cluster.SetNodeLabel(ctx, node, key, value) })
}

func (c *troubled) Works(ctx context.Context, node string) error {
	return c.do("works", kube.PodRef{}, func() error { return c.Cluster.Works(ctx, node) })
}

// bed is a reporter between a daemon and a cluster, in a bubble of its own time.
type bed struct {
	t       *testing.T
	daemon  *nodeDaemon
	memory  *kubemem.Cluster
	cluster *troubled
	opts    kube.Options
	log     lockedBuffer
	stop    func()
	*kube.Reporter
}

// lockedBuffer is a log that may be read while it's written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// count counts lines with a text.
func (l *lockedBuffer) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

// inBubble tests a bed whose daemon and reporter run.
func inBubble(t *testing.T, test func(t *testing.T, b *bed)) {
	dir := t.TempDir() // of outside: it lives longer
	synctest.Test(t, func(t *testing.T) {
		b := &bed{t: t, daemon: &nodeDaemon{}, memory: &kubemem.Cluster{}}
		b.cluster = &troubled{Cluster: b.memory}
		b.memory.AddNode(node, map[string]string{"kubernetes.io/os": "linux"})
		b.opts = kube.Options{
			Cluster: b.cluster, Daemon: b.daemon, Feature: kube.Streaming(), Node: node, State: dir + "/reporter.json",
			Label: kube.Streaming().Label, OptOutLabel: kube.DefaultOptOutLabel, Grace: kube.DefaultGrace,
			Rate: kube.DefaultRate, Burst: kube.DefaultBurst, Log: slog.New(slog.NewTextHandler(&b.log, nil)),
		}
		b.daemon.start()
		b.run()
		test(t, b)
		b.stop()
		if t.Failed() {
			t.Logf("the reporter's log:\n%s", b.log.b.String())
		}
	})
}

// run runs a reporter until stop.
func (b *bed) run() {
	ctx, cancel := context.WithCancel(b.t.Context())
	b.Reporter = kube.New(b.opts)
	done := make(chan error, 1)
	go func() { done <- b.Reporter.Run(ctx) }()
	b.stop = func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("the reporter ended: %v", err)
		}
	}
	synctest.Wait()
}

// wait lets time pass.
func (b *bed) wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// pod puts a pod with containers setup, main and debug into the cluster.
func (b *bed) pod(name string) happening.Pod {
	ref := kube.PodRef{Namespace: "shop", Name: name, UID: "uid-of-" + name}
	b.memory.AddPod(ref, map[string]string{
		"setup": "spec.initContainers{setup}", "main": "spec.containers{main}", "debug": "spec.ephemeralContainers{debug}",
	})
	return happening.Pod{Namespace: ref.Namespace, Name: ref.Name, UID: ref.UID}
}

// condition returns a pod's condition, and how often it was set.
func (b *bed) condition(p happening.Pod) (kube.Condition, int) {
	return b.memory.Condition(kube.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID})
}

// events returns the cluster's events, each on a line.
func (b *bed) events() []string {
	var all []string
	for _, e := range b.memory.Events() {
		kind := "Normal"
		if e.Warning {
			kind = "Warning"
		}
		all = append(all, fmt.Sprintf("%s %s %s ×%d %s", e.Event.Pod, e.Field, kind+" "+e.Reason, e.Count, e.Repeat.Message))
	}
	slices.Sort(all)
	return all
}

// want fails unless the cluster has exactly these events.
func (b *bed) want(events ...string) {
	b.t.Helper()
	slices.Sort(events)
	if got := b.events(); !slices.Equal(got, events) {
		b.t.Errorf("events are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(events, "\n"))
	}
}

// pulling, streamed and ordinary are events of a pod's container.
func pulling(p happening.Pod) happening.Event {
	return happening.Event{Kind: happening.Pulling, Pod: p, Image: "r.test/app:1", Streamed: true}
}

func streamed(p happening.Pod, container string) happening.Event {
	return happening.Event{
		Kind: happening.Started, Pod: p, Container: container, Image: "r.test/app:1", Streamed: true,
		Duration: 412345 * time.Microsecond, BytesHere: 100, BytesTotal: 2000,
	}
}

func ordinary(p happening.Pod, container, reason string) happening.Event {
	return happening.Event{
		Kind: happening.Started, Pod: p, Container: container, Image: "r.test/big:2",
		Reason: reason, Message: "there's nothing.", Remedy: "convert it: sluice artifact-streaming create IMAGE",
	}
}
