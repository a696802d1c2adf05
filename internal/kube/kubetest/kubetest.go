// Package kubetest is the conformance suite of kube.Cluster: Run holds an
// implementation to the interface's promises, in memory as at a real API server.
package kubetest

import (
	"context"
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/kube"
)

// Bench is a cluster to test, and what only an administrator can do there.
type Bench struct {
	Cluster kube.Cluster
	// Node is a node of the cluster that nobody else changes.
	Node string
	// AddPod makes a pod in the namespace "default" with an init, an ordinary and
	// an ephemeral container of these names, and returns which it is.
	AddPod func(t *testing.T, name, initial, ordinary, ephemeral string) kube.PodRef
	// RemovePod removes a pod at once.
	RemovePod func(t *testing.T, ref kube.PodRef)
	// Event returns an Event object, and what was said of it since.
	Event func(t *testing.T, namespace, name string) (kube.Event, kube.Repeat)
}

// Run tests a cluster. Names of pods and Events begin with prefix, so that one
// cluster can be tested more than once.
func Run(t *testing.T, b Bench, prefix string) {
	for _, tt := range []struct {
		name string
		test func(t *testing.T, b Bench, name string)
	}{
		{"Event", testEvent},
		{"EventRefused", testEventRefused},
		{"Pod", testPod},
		{"PodGone", testPodGone},
		{"NodeLabel", testNodeLabel},
		{"WatchNode", testWatchNode},
		{"Works", testWorks},
		{"Canceled", testCanceled},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, b, prefix+strings.ToLower(tt.name)) })
	}
}

// noon is when everything happens.
func noon() time.Time { return time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC) }

func wantError(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

func wantNone(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func testEvent(t *testing.T, b Bench, name string) {
	ctx := t.Context()
	e := kube.Event{
		Component: "sluice", Name: name, Pod: kube.PodRef{Namespace: "default", Name: "any", UID: "u-1"}, Field: "spec.initContainers{setup}", Node: b.Node,
		Warning: true, Reason: "NotStreamed", Message: `Image "ü" …`, Time: noon(),
	}
	wantNone(t, b.Cluster.CreateEvent(ctx, e))
	got, repeat := b.Event(t, "default", name)
	if diff := cmp.Diff(e, got); diff != "" {
		t.Errorf("the event (-want +got):\n%s", diff)
	}
	first := kube.Repeat{Namespace: "default", Name: name, Count: 1, Last: noon(), Message: e.Message}
	if diff := cmp.Diff(first, repeat); diff != "" {
		t.Errorf("a new event (-want +got):\n%s", diff)
	}
	second := e
	second.Message = "another"
	wantError(t, "the same event once more", b.Cluster.CreateEvent(ctx, second), kube.ErrExists)

	again := kube.Repeat{Namespace: "default", Name: name, Count: 7, Last: noon().Add(time.Hour), Message: "seven"}
	for range 2 { // to the same effect
		wantNone(t, b.Cluster.RepeatEvent(ctx, again))
		if _, repeat := b.Event(t, "default", name); repeat != again {
			t.Errorf("after a repetition: %+v, want %+v", repeat, again)
		}
	}
	again.Name += "-none"
	wantError(t, "an event that isn't there", b.Cluster.RepeatEvent(ctx, again), kube.ErrNotFound)

	normal := e
	normal.Name, normal.Warning, normal.Field = name+"-normal", false, ""
	wantNone(t, b.Cluster.CreateEvent(ctx, normal))
	if got, _ := b.Event(t, "default", normal.Name); got != normal {
		t.Errorf("a normal event is %+v, want %+v", got, normal)
	}
}

func testEventRefused(t *testing.T, b Bench, name string) {
	e := kube.Event{
		Component: "sluice", Name: name, Pod: kube.PodRef{Namespace: "default", Name: "any", UID: "u-1"}, Node: b.Node,
		Reason: "Pulled", Message: strings.Repeat("x", kube.MaxMessage), Time: noon(),
	}
	wantNone(t, b.Cluster.CreateEvent(t.Context(), e))
	e.Name += "%"
	wantError(t, "a name that isn't one", b.Cluster.CreateEvent(t.Context(), e), kube.ErrRefused)
}

func testPod(t *testing.T, b Bench, name string) {
	ctx := t.Context()
	ref := b.AddPod(t, name, "setup", "main", "debug")
	want := kube.Pod{Fields: map[string]string{
		"setup": "spec.initContainers{setup}", "main": "spec.containers{main}", "debug": "spec.ephemeralContainers{debug}",
	}}
	check := func() {
		t.Helper()
		got, err := b.Cluster.Pod(ctx, ref)
		wantNone(t, err)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("the pod (-want +got):\n%s", diff)
		}
	}
	check()
	for _, c := range []kube.Condition{
		{Status: "True", Reason: "NoStreamingArtifact", Message: "convert it", Since: noon()},
		{Status: "True", Reason: "Unauthorized", Message: "give it credentials", Since: noon()},
		{Status: "False", Reason: "Streamed", Message: "all is well", Since: noon().Add(time.Minute)},
		{Status: "False", Reason: "Streamed", Message: "all is well", Since: noon().Add(time.Minute)},
	} {
		wantNone(t, b.Cluster.SetCondition(ctx, ref, c))
		want.Condition = c
		check()
	}
}

func testPodGone(t *testing.T, b Bench, name string) {
	ctx := t.Context()
	c := kube.Condition{Status: "False", Reason: "Streamed", Since: noon()}
	old := b.AddPod(t, name, "setup", "main", "debug")
	b.RemovePod(t, old)
	_, err := b.Cluster.Pod(ctx, old)
	wantError(t, "a pod that's gone", err, kube.ErrNotFound)
	wantError(t, "condition of a pod that's gone", b.Cluster.SetCondition(ctx, old, c), kube.ErrNotFound)
	b.AddPod(t, name, "setup", "main", "debug")
	_, err = b.Cluster.Pod(ctx, old)
	wantError(t, "a pod that's another one", err, kube.ErrConflict)
	wantError(t, "condition of a pod that's another one", b.Cluster.SetCondition(ctx, old, c), kube.ErrConflict)
}

func testNodeLabel(t *testing.T, b Bench, name string) {
	ctx := t.Context()
	key, yes, no := "kubetest.example/"+name, "true", "false"
	for _, v := range []*string{nil, &yes, &yes, &no, nil, nil} {
		wantNone(t, b.Cluster.SetNodeLabel(ctx, b.Node, key, v))
		labels, ok := look(t, b)[key]
		if v == nil && ok || v != nil && labels != *v {
			t.Errorf("after it was set to %v: %q, %v", v, labels, ok)
		}
	}
	wantError(t, "a node that isn't there", b.Cluster.SetNodeLabel(ctx, "no-such-node", key, &yes), kube.ErrNotFound)
}

// look returns the node's labels as they are.
func look(t *testing.T, b Bench) map[string]string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var found map[string]string
	err := b.Cluster.WatchNode(ctx, b.Node, func(l map[string]string) {
		if found == nil {
			found = map[string]string{}
			maps.Copy(found, l)
		}
		cancel()
	})
	if found == nil {
		t.Fatalf("a watch says nothing: %v", err)
	}
	return found
}

func testWatchNode(t *testing.T, b Bench, name string) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	key, value := "kubetest.example/"+name, "0"
	wantNone(t, b.Cluster.SetNodeLabel(ctx, b.Node, key, &value))
	seen := ""
	err := b.Cluster.WatchNode(ctx, b.Node, func(l map[string]string) {
		if seen == l[key] {
			return // something else about the node has changed
		}
		seen = l[key]
		if seen == "3" {
			cancel()
			return
		}
		next := string(rune(seen[0] + 1))
		if err := b.Cluster.SetNodeLabel(ctx, b.Node, key, &next); err != nil {
			t.Error(err)
			cancel()
		}
	})
	wantError(t, "the watch", err, context.Canceled)
	if seen != "3" {
		t.Errorf("the last that was seen is %q", seen)
	}
	wantNone(t, b.Cluster.SetNodeLabel(t.Context(), b.Node, key, nil))
}

func testWorks(t *testing.T, b Bench, _ string) {
	wantNone(t, b.Cluster.Works(t.Context(), b.Node))
}

func testCanceled(t *testing.T, b Bench, name string) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	ref := kube.PodRef{Namespace: "default", Name: name, UID: "u-1"}
	_, err := b.Cluster.Pod(ctx, ref)
	wantError(t, "Pod", err, context.Canceled)
	wantError(t, "SetCondition", b.Cluster.SetCondition(ctx, ref, kube.Condition{}), context.Canceled)
	wantError(t, "CreateEvent", b.Cluster.CreateEvent(ctx, kube.Event{Name: name, Pod: ref}), context.Canceled)
	wantError(t, "RepeatEvent", b.Cluster.RepeatEvent(ctx, kube.Repeat{Namespace: "default", Name: name}), context.Canceled)
	wantError(t, "SetNodeLabel", b.Cluster.SetNodeLabel(ctx, b.Node, "k", nil), context.Canceled)
	wantError(t, "WatchNode", b.Cluster.WatchNode(ctx, b.Node, func(map[string]string) {}), context.Canceled)
	wantError(t, "Works", b.Cluster.Works(ctx, b.Node), context.Canceled)
}
