package kube_test

import (
	"errors"
	"slices"
	"testing"
	"time"

	"sluice/internal/kube"
)

// label returns the node's label: "" if it has none.
func (b *bed) label() string { return b.memory.Node(node)[kube.Streaming().Label] }

// The node has its label while it streams.
func TestNodeLabel(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		want := func(when, label string) {
			t.Helper()
			if got := b.label(); got != label {
				t.Errorf("%s: the label is %q, want %q", when, got, label)
			}
		}
		want("at first", "true")
		b.daemon.stop()
		b.wait(30 * time.Second)
		want("the daemon is away for half a minute", "true")
		b.daemon.start()
		b.wait(5 * time.Minute)
		want("the daemon is back", "true")
		b.stop()
		b.wait(time.Hour)
		want("the reporter is away", "true")
		b.run()
		b.wait(time.Minute)
		if n := b.cluster.count("label"); n != 1 {
			t.Errorf("the label was written %d times by now", n)
		}
		b.daemon.stop()
		b.wait(2 * time.Minute)
		want("the daemon is away for two minutes", "")
		if _, ok := b.memory.Node(node)[kube.Streaming().Label]; ok {
			t.Error("the label is there, and empty")
		}
		b.daemon.start()
		b.wait(10 * time.Second)
		want("the daemon is back after long", "true")
		b.daemon.stop()
		b.daemon.mu.Lock()
		b.daemon.bad = "no kernel"
		b.daemon.mu.Unlock()
		b.daemon.start()
		b.wait(10 * time.Second)
		want("the daemon can't stream", "")
		if b.memory.Node(node)["kubernetes.io/os"] != "linux" {
			t.Error("another label is gone")
		}
	})
}

// A label that somebody takes away, or that can't be given at once, is given again.
func TestNodeLabelIsGivenAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		b.memory.AddNode(node, nil)
		b.wait(time.Second)
		if b.label() != "true" {
			t.Error("the label that was taken away isn't there again")
		}
		b.cluster.set(func(request string, _ kube.PodRef) error {
			if request == "label" {
				return errors.Join(kube.ErrRefused, errors.New("not yet"))
			}
			return nil
		}, nil)
		b.memory.AddNode(node, nil)
		b.wait(time.Hour)
		if n := b.cluster.count("label"); n > 40 {
			t.Errorf("%d attempts in an hour", n)
		}
		b.cluster.set(nil, nil)
		b.wait(5 * time.Minute)
		if b.label() != "true" {
			t.Error("the label that was refused isn't there now that it may be")
		}
	})
}

// A label that somebody takes away just when it was given is given again.
func TestNodeLabelIsTakenAwayAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		b.cluster.set(nil, func(request string, _ kube.PodRef) error {
			if request == "label" {
				b.cluster.set(nil, nil)
				b.memory.AddNode(node, nil)
				time.Sleep(time.Millisecond) // the watch tells before the request returns
			}
			return nil
		})
		b.memory.AddNode(node, nil)
		b.wait(time.Second)
		if b.label() != "true" {
			t.Error("the label that was taken away isn't there again")
		}
	})
}

// The node's other label switches streaming off and on, for each daemon.
func TestOptOut(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		off := func() string {
			b.daemon.mu.Lock()
			defer b.daemon.mu.Unlock()
			return b.daemon.off
		}
		b.memory.AddNode(node, map[string]string{kube.DefaultOptOutLabel: "false"})
		b.wait(time.Second)
		const why = "node node-a has the label sluice.dev/artifact-streaming=false"
		if off() != why || b.label() != "" {
			t.Errorf("opted out, it's off because of %q, and the label is %q", off(), b.label())
		}
		b.daemon.stop()
		b.daemon.start()
		b.wait(10 * time.Second)
		if off() != why || b.label() != "" {
			t.Errorf("the next daemon is off because of %q, and the label is %q", off(), b.label())
		}
		b.memory.AddNode(node, map[string]string{kube.DefaultOptOutLabel: "true"})
		b.wait(time.Second)
		if off() != "" || b.label() != "true" {
			t.Errorf("opted in, it's off because of %q, and the label is %q", off(), b.label())
		}
		if want := []string{"true", "false", "false", "true"}; !slices.Equal(b.daemon.said, want) {
			t.Errorf("daemons were told %v, want %v", b.daemon.said, want)
		}
	})
}
