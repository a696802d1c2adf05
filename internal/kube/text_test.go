package kube

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
)

// However long and strange what the daemon says is, the API server takes what is
// made of it.
func TestTextsFit(t *testing.T) {
	dns := regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	for _, s := range []string{"", "short", strings.Repeat("ü", 3000), strings.Repeat("a. \n", 900), "\xff\xfe bad", strings.Repeat("x", 2000)} {
		for _, e := range []happening.Event{
			{Kind: happening.Pulling, Streamed: true}, {Kind: happening.Started, Streamed: true, Duration: 1e9, BytesTotal: 1 << 60},
			{Kind: happening.Started, Streamed: true, Present: true, BytesTotal: 1 << 60}, {Kind: happening.Started},
		} {
			e.Image, e.Reason, e.Message, e.Remedy = s, s, s, s
			got := Streaming().eventMessage(e)
			if len(got) > MaxMessage || got == "" || utf8.ValidString(s) && !utf8.ValidString(got) {
				t.Errorf("%d bytes of %+.50v: %.100q", len(got), e, got)
			}
		}
		c := judge(map[string]verdict{"a": {Image: s, Reason: "R", Message: s, Remedy: s}, s + "b": {Reason: "Disabled"}})
		if len(c.Message) > 2*MaxMessage || c.Reason != "R" {
			t.Errorf("a condition of %d bytes, reason %s", len(c.Message), c.Reason)
		}
	}
	for _, pod := range []string{"web-0", strings.Repeat("a.", 126) + "a", strings.Repeat("a", 229) + "-b" + strings.Repeat("c", 22)} {
		e := happening.Event{Epoch: "0123456789abcdef", Seq: 1, Pod: happening.Pod{Name: pod}}
		first := eventName(e)
		e.Seq++
		if second := eventName(e); first == second || len(first) > 253 || !dns.MatchString(first) {
			t.Errorf("names are %q and %q", first, second)
		}
	}
}

func TestEventMessage(t *testing.T) {
	for want, e := range map[string]happening.Event{
		`Pulling image "a" with artifact streaming`:                                {Kind: happening.Pulling, Streamed: true},
		`Successfully pulled image "a" (streamed) in 1m1.235s: 5 of 10 bytes`:      {Kind: happening.Started, Streamed: true, Duration: 61234600 * time.Microsecond, BytesHere: 5, BytesTotal: 10},
		`Image "a" is on this node already (streamed): 0 of 10 bytes`:              {Kind: happening.Started, Streamed: true, Present: true, BytesTotal: 10},
		`Image "a" was not streamed: Disabled: the node says so. Take it away`:     {Kind: happening.Started, Reason: "Disabled", Message: "the node says so", Remedy: "take it away."},
		`Image "a" was not streamed: Disabled.`:                                    {Kind: happening.Started, Reason: "Disabled"},
		`Image "a" was not streamed: Disabled: it asked (twice) ... on two lines.`: {Kind: happening.Started, Reason: "Disabled", Message: "it asked (twice) ...\n on two lines."},
	} {
		e.Image = "a"
		if got := Streaming().eventMessage(e); got != want {
			t.Errorf("message %s\nwant    %s", got, want)
		}
	}
}

// The same in the words of teleportd.
func TestTeleportMessage(t *testing.T) {
	for want, e := range map[string]happening.Event{
		`Pulling: Pulling image "a" with Teleport`:                                              {Kind: happening.Pulling, Streamed: true},
		`Pulled: Successfully pulled image "a" (teleported) in 1.5s: 5 of 10 bytes`:             {Kind: happening.Started, Streamed: true, Duration: 1500 * time.Millisecond, BytesHere: 5, BytesTotal: 10},
		`Pulled: Image "a" is on this node already (teleported): 0 of 10 bytes`:                 {Kind: happening.Started, Streamed: true, Present: true, BytesTotal: 10},
		`NotTeleported: Image "a" was not teleported: ConversionPending: it expands. Ask again`: {Kind: happening.Started, Reason: "ConversionPending", Message: "it expands", Remedy: "ask again"},
	} {
		e.Image = "a"
		if got := Teleport().eventReason(e) + ": " + Teleport().eventMessage(e); got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
}

func TestMemoryIsBounded(t *testing.T) {
	s := newState()
	for i := range 3 * maxPods {
		s.pod(PodRef{"default", "web", fmt.Sprint(i)})
		s.pod(PodRef{"default", "web", "0"}) // heard of all the time
	}
	if len(s.Pods) != maxPods || s.Pods["0"] == nil || s.Pods["1"] != nil || s.Pods[fmt.Sprint(3*maxPods-1)] == nil {
		t.Errorf("%d pods are remembered, and the wrong ones", len(s.Pods))
	}
}

// Every reason has its place among the others.
func TestReasonsAreRanked(t *testing.T) {
	for _, r := range mount.Reasons() {
		if rank(string(r)) == rank("of a newer daemon") {
			t.Errorf("%s has no severity", r)
		}
	}
	if n := len(mount.Reasons()) + 1; len(severity) != n {
		t.Errorf("%d severities, want %d", len(severity), n)
	}
}
