package kube_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"sluice/internal/kube"
	"sluice/internal/node/happening"
)

// What pods say after their containers came in one way or another.
func TestReport(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		p := b.pod("web-0")
		here := streamed(p, "debug")
		here.Present, here.Duration = true, 0
		b.daemon.add(pulling(p), streamed(p, "setup"), streamed(p, "main"), here,
			happening.Event{Kind: "invented later", Pod: p}, streamed(happening.Pod{}, "of no pod"))
		b.wait(time.Second)
		b.want(
			`shop/web-0  Normal Pulling ×1 Pulling image "r.test/app:1" with artifact streaming`,
			`shop/web-0 spec.initContainers{setup} Normal Pulled ×1 Successfully pulled image "r.test/app:1" (streamed) in 412ms: 100 of 2000 bytes`,
			`shop/web-0 spec.containers{main} Normal Pulled ×1 Successfully pulled image "r.test/app:1" (streamed) in 412ms: 100 of 2000 bytes`,
			`shop/web-0 spec.ephemeralContainers{debug} Normal Pulled ×1 Image "r.test/app:1" is on this node already (streamed): 100 of 2000 bytes`,
		)
		if c, n := b.condition(p); c.Status != "False" || c.Reason != "Streamed" || n != 1 {
			t.Errorf("condition is %+v, set %d times", c, n)
		}
		q := b.pod("web-1")
		b.daemon.add(ordinary(q, "main", "NoStreamingArtifact"))
		b.wait(time.Second)
		const want = `was not streamed: NoStreamingArtifact: there's nothing. Convert it: sluice artifact-streaming create IMAGE`
		if got := strings.Join(b.events(), "\n"); !strings.Contains(got, `shop/web-1 spec.containers{main} Warning NotStreamed ×1 Image "r.test/big:2" `+want) {
			t.Errorf("events are\n%s", got)
		}
		if c, _ := b.condition(q); c.Status != "True" || c.Reason != "NoStreamingArtifact" || c.Message != `Image "r.test/big:2" of container main `+want {
			t.Errorf("condition is %+v", c)
		}
	})
}

// What pods say of teleportd: Events that name it and the container, no condition.
func TestReportOfTeleport(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		b.stop()
		b.opts.Feature = kube.Teleport()
		b.opts.Label, b.opts.OptOutLabel, b.opts.State = b.opts.Feature.Label, "", ""
		b.run()
		p := b.pod("web-0")
		b.daemon.add(pulling(p), streamed(p, "main"), ordinary(p, "setup", "NoStreamingArtifact"))
		b.wait(time.Second)
		b.want(
			`shop/web-0  Normal Pulling ×1 Pulling image "r.test/app:1" with Teleport`,
			`shop/web-0 spec.containers{main} Normal Pulled ×1 Successfully pulled image "r.test/app:1" (teleported) in 412ms: 100 of 2000 bytes`,
			`shop/web-0 spec.initContainers{setup} Warning NotTeleported ×1 Image "r.test/big:2" was not teleported: NoStreamingArtifact: there's nothing. Convert it: sluice artifact-streaming create IMAGE`,
		)
		for _, e := range b.memory.Events() {
			if e.Event.Component != "teleportd" {
				t.Errorf("an Event is from %q", e.Event.Component)
			}
		}
		if c, n := b.condition(p); n != 0 {
			t.Errorf("the pod has the condition %+v", c)
		}
		if labels := b.memory.Node(node); labels["kubernetes.azure.com/enable-acr-teleport-plugin"] != "true" {
			t.Errorf("the node's labels are %v", labels)
		}
	})
}

// A pod's condition is that of its worst container, and changes when they do.
func TestConditionOfSeveralContainers(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		p := b.pod("web-0")
		var since time.Time
		for _, step := range []struct {
			event  happening.Event
			status string
			reason string
			moved  bool // the time of the status
			sets   int
		}{
			{streamed(p, "setup"), "False", "Streamed", true, 1},
			{ordinary(p, "main", "ConversionPending"), "True", "ConversionPending", true, 2},
			{ordinary(p, "debug", "Unauthorized"), "True", "Unauthorized", false, 3},
			{ordinary(p, "debug", "Unauthorized"), "True", "Unauthorized", false, 3},
			{ordinary(p, "setup", "ReasonOfANewerDaemon"), "True", "ReasonOfANewerDaemon", false, 4},
			{streamed(p, "setup"), "True", "Unauthorized", false, 5},
			{streamed(p, "debug"), "True", "ConversionPending", false, 6},
			{streamed(p, "main"), "False", "Streamed", true, 7},
		} {
			b.daemon.add(step.event)
			b.wait(2 * time.Minute)
			c, n := b.condition(p)
			if c.Status != step.status || c.Reason != step.reason || n != step.sets || c.Since.Equal(since) == step.moved {
				t.Errorf("after %+v the condition is %+v, set %d times (before: since %v)", step.event, c, n, since)
			}
			since = c.Since
		}
	})
}

// The API server is away, and nothing is lost, nothing told twice.
func TestOutage(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		begun := time.Now()
		b.cluster.set(func(string, kube.PodRef) error {
			switch {
			case time.Since(begun) < 20*time.Minute:
				return &kube.Unavailable{Err: errors.New("connection refused")}
			case time.Since(begun) < 30*time.Minute:
				return &kube.Unavailable{Err: errors.New("etcd is away"), Answered: true}
			case time.Since(begun) < 31*time.Minute:
				return &kube.Unavailable{Err: errors.New("too many requests"), Answered: true, After: 10 * time.Second}
			}
			return nil
		}, nil)
		var want []string
		for i := range 400 {
			p := b.pod(fmt.Sprintf("web-%03d", i))
			b.daemon.add(streamed(p, "main"))
			want = append(want, fmt.Sprintf(`shop/web-%03d spec.containers{main} Normal Pulled ×1 Successfully pulled image "r.test/app:1" (streamed) in 412ms: 100 of 2000 bytes`, i))
		}
		b.wait(30 * time.Minute)
		if b.Ready() == nil {
			t.Error("ready while the API server doesn't answer")
		}
		if n := b.cluster.count(""); n > 400 {
			t.Errorf("%d requests to an API server that doesn't answer, in half an hour", n)
		}
		b.wait(5 * time.Minute)
		b.want(want...)
		if err := b.Ready(); err != nil {
			t.Errorf("afterwards: %v", err)
		}
		if n := b.log.count("level=WARN"); n != 1 {
			t.Errorf("%d warnings, want one for the outage", n)
		}
	})
}

// The API server does what it's asked, and its answers don't arrive.
func TestAnswersGetLost(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		n := 0
		b.cluster.set(nil, func(string, kube.PodRef) error {
			if n++; n%3 != 0 {
				return &kube.Unavailable{Err: errors.New("connection reset")}
			}
			return nil
		})
		p := b.pod("web-0")
		for range 3 {
			b.daemon.add(pulling(p), streamed(p, "main"))
			b.wait(time.Minute)
		}
		b.want(
			`shop/web-0  Normal Pulling ×3 Pulling image "r.test/app:1" with artifact streaming`,
			`shop/web-0 spec.containers{main} Normal Pulled ×3 Successfully pulled image "r.test/app:1" (streamed) in 412ms: 100 of 2000 bytes`,
		)
	})
}

// What fell out of the daemon's memory meanwhile is told as lost.
func TestLost(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		b.daemon.add(streamed(b.pod("first"), "main"))
		b.wait(time.Minute)
		b.stop()
		p := b.pod("web-0")
		for range happening.Capacity + 40 {
			b.daemon.add(streamed(p, "main"))
		}
		b.run()
		b.wait(time.Minute)
		if n := b.log.count("lost=40"); n != 1 {
			t.Errorf("it was told %d times that 40 events are lost", n)
		}
	})
}

// A reporter that is restarted goes on where it was, whether it had the time to
// save that or not; so it does when the daemon was restarted, too.
func TestRestart(t *testing.T) {
	for _, how := range []string{"ended", "killed", "without a file", "with a damaged file"} {
		t.Run(how, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bed) {
				p, q := b.pod("web-0"), b.pod("web-1")
				if how == "without a file" {
					b.stop()
					b.opts.State = ""
					b.run()
				}
				b.daemon.add(ordinary(p, "setup", "Unauthorized"))
				b.wait(time.Minute)
				saved, _ := os.ReadFile(b.opts.State)
				b.daemon.add(streamed(p, "main"), streamed(q, "main"))
				b.wait(11 * time.Second)
				b.daemon.add(streamed(q, "main"))
				b.wait(11 * time.Second)
				before, _ := b.condition(p)
				b.stop()
				switch how {
				case "killed":
					b.write(saved)
				case "with a damaged file":
					b.write(saved[:len(saved)/2])
				}
				b.daemon.add(streamed(p, "debug"))
				b.run()
				b.wait(time.Minute)
				const streamed = `Normal Pulled ×%d Successfully pulled image "r.test/app:1" (streamed) in 412ms: 100 of 2000 bytes`
				b.want(
					`shop/web-0 spec.initContainers{setup} Warning NotStreamed ×1 Image "r.test/big:2" was not streamed: Unauthorized: there's nothing. Convert it: sluice artifact-streaming create IMAGE`,
					fmt.Sprintf(`shop/web-0 spec.containers{main} `+streamed, 1),
					fmt.Sprintf(`shop/web-0 spec.ephemeralContainers{debug} `+streamed, 1),
					fmt.Sprintf(`shop/web-1 spec.containers{main} `+streamed, 2),
				)
				if c, n := b.condition(p); c != before || n != 1 {
					t.Errorf("condition is %+v, set %d times; before %+v", c, n, before)
				}
			})
		})
	}
}

func (b *bed) write(state []byte) {
	if err := os.WriteFile(b.opts.State, state, 0o600); err != nil {
		b.t.Error(err)
	}
}

// A daemon that is restarted counts from 1 again; what a pod was is still known.
func TestDaemonRestarts(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		p := b.pod("web-0")
		b.daemon.add(ordinary(p, "setup", "Unauthorized"), streamed(p, "main"))
		b.wait(time.Minute)
		b.daemon.stop()
		b.wait(10 * time.Second)
		b.daemon.start()
		b.daemon.add(streamed(p, "main"))
		b.wait(10 * time.Second)
		if c, _ := b.condition(p); c.Reason != "Unauthorized" {
			t.Errorf("condition is %+v", c)
		}
		if got := strings.Join(b.events(), "\n"); !strings.Contains(got, "spec.containers{main} Normal Pulled ×2") {
			t.Errorf("events are\n%s", got)
		}
	})
}

// What the API server refuses is told once, and doesn't keep the rest.
func TestRefused(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		b.cluster.set(func(request string, _ kube.PodRef) error {
			if request == "condition" {
				return fmt.Errorf("%w: a policy says no", kube.ErrRefused)
			}
			return nil
		}, nil)
		const pods = 20
		for i := range pods {
			b.daemon.add(streamed(b.pod(fmt.Sprint("web-", i)), "main"))
		}
		gone := b.pod("gone")
		b.memory.RemovePod(kube.PodRef{Namespace: gone.Namespace, Name: gone.Name})
		b.daemon.add(streamed(gone, "main"))
		b.wait(time.Minute)
		if got := b.events(); len(got) != pods+1 || !strings.HasPrefix(got[0], "shop/gone  Normal Pulled") {
			t.Errorf("events are\n%s", strings.Join(got, "\n"))
		}
		if told, gone := b.log.count("a pod doesn't get its condition"), b.log.count("a pod can't be looked at"); told != 1 || gone != 1 {
			t.Errorf("told %d times that conditions are refused, %d times that a pod is gone; want once each", told, gone)
		}
	})
}

// An API server that has just begun forbids everything, and nothing is lost; one
// at which the reporter has no rights is believed in the end.
func TestForbidden(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		forbid := func(string, kube.PodRef) error { return fmt.Errorf("%w: no roles", kube.ErrForbidden) }
		b.cluster.set(forbid, nil)
		b.daemon.add(streamed(b.pod("web-0"), "main"))
		b.wait(40 * time.Second)
		b.cluster.set(nil, nil)
		b.wait(time.Minute)
		want := `shop/web-0 spec.containers{main} Normal Pulled ×1 Successfully pulled image "r.test/app:1" (streamed) in 412ms: 100 of 2000 bytes`
		b.want(want)

		b.cluster.set(forbid, nil)
		for i := range 100 {
			b.daemon.add(streamed(b.pod(fmt.Sprint("pod-", i)), "main"))
		}
		b.wait(2 * time.Minute)
		b.want(want)
		if n := b.cluster.count("create"); n < 100 {
			t.Errorf("%d events were tried after 2 minutes without rights", n)
		}
		if n := b.log.count("an Event isn't made"); n != 1 {
			t.Errorf("it's told %d times that Events are forbidden, want once", n)
		}
	})
}

// A pod whose requests fail for ever doesn't keep the others from theirs for ever.
func TestStuck(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		b.cluster.set(func(_ string, pod kube.PodRef) error {
			if pod.Name == "bad" {
				return &kube.Unavailable{Answered: true, Err: errors.New("failed calling webhook")}
			}
			return nil
		}, nil)
		b.daemon.add(streamed(b.pod("bad"), "main"), streamed(b.pod("good"), "main"))
		b.wait(6 * time.Minute)
		b.want(`shop/good spec.containers{main} Normal Pulled ×1 Successfully pulled image "r.test/app:1" (streamed) in 412ms: 100 of 2000 bytes`)
	})
}

// A container that is made again and again is one Event with a count.
func TestCrashLoop(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		p := b.pod("web-0")
		for i := range 600 { // a minute
			e := streamed(p, "main")
			e.Present, e.BytesHere, e.Attempt = true, int64(i), uint32(i)
			b.daemon.add(e)
			b.wait(100 * time.Millisecond)
		}
		b.wait(20 * time.Second)
		b.want(`shop/web-0 spec.containers{main} Normal Pulled ×600 Image "r.test/app:1" is on this node already (streamed): 599 of 2000 bytes`)
		if n := b.cluster.count("repeat"); n > 8 {
			t.Errorf("%d requests to count on, in 80 s", n)
		}
		// Expired, it's made anew.
		b.memory.RemoveEvents()
		b.daemon.add(streamed(p, "main"))
		e := streamed(p, "main")
		e.Present = true
		b.daemon.add(e)
		b.wait(time.Minute)
		b.want(
			`shop/web-0 spec.containers{main} Normal Pulled ×1 Image "r.test/app:1" is on this node already (streamed): 100 of 2000 bytes`,
			`shop/web-0 spec.containers{main} Normal Pulled ×1 Successfully pulled image "r.test/app:1" (streamed) in 412ms: 100 of 2000 bytes`,
		)
	})
}

// Many pods at once don't flood the API server.
func TestFlood(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bed) {
		const pods = 500
		for i := range pods {
			p := b.pod(fmt.Sprint("web-", i))
			b.daemon.add(pulling(p), streamed(p, "main"))
		}
		b.wait(10 * time.Second)
		if n := b.cluster.count(""); n > kube.DefaultBurst+10*kube.DefaultRate+1 {
			t.Errorf("%d requests in 10 s", n)
		}
		b.wait(5 * time.Minute)
		if got := b.events(); len(got) != 2*pods {
			t.Errorf("%d events", len(got))
		}
	})
}
