package kube

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"sluice/test/bed"
)

// TestTimeToReady measures what streaming is for: how long after a pod was made
// it is ready, and says its first word, beside overlayfs on the same node and
// over the same link. Both pull 600 MB of Debian from nothing.
func TestTimeToReady(t *testing.T) {
	s := theStage(t)
	images, err := bed.Debian(t.Context(), func(text string) { t.Log(text) })
	must(t, err)
	for _, name := range []string{"plain/debian:1", "debian:1"} {
		must(t, s.Push(t.Context(), images.OneLayer, name))
	}
	must(t, s.Convert(t.Context(), s.Stage.Ref("debian:1")))
	n := s.newNamespace(t)
	n.apply(t, pod1("warm", s.ref("app:1"))) // pods' own container is pulled once
	n.await(t, "warm", 1)

	const command = `command: [/usr/bin/python3, -uc, "import time; print('hi'); time.sleep(1e6)"]`
	plain := n.timePod(t, "plain", strings.Replace(
		pod1("plain", s.ref("plain/debian:1"), command), "metadata: {", "metadata: {annotations: {"+plainRuntime+"}, ", 1)+"  runtimeClassName: plain\n")
	n.remove(t, "plain")
	streamed := n.timePod(t, "streamed", pod1("streamed", s.ref("debian:1"), command))
	s.streams(t, s.ref("debian:1"))
	t.Logf("FIGURE pod made to ready: %.2f s with overlayfs, %.2f s streamed: %.1f times as fast; to its first word: %.2f s and %.2f s: %.1f times; MB over the link by then: %.1f and %.1f",
		plain.ready.Seconds(), streamed.ready.Seconds(), plain.ready.Seconds()/streamed.ready.Seconds(),
		plain.spoke.Seconds(), streamed.spoke.Seconds(), plain.spoke.Seconds()/streamed.spoke.Seconds(),
		float64(plain.bytes)/1e6, float64(streamed.bytes)/1e6)
	if streamed.bytes >= plain.bytes/2 {
		t.Errorf("the streamed pod was ready after %d bytes, the other after %d: that isn't streaming", streamed.bytes, plain.bytes)
	}
}

// timed is how a pod's start went.
type timed struct {
	ready, spoke time.Duration // since it was made
	bytes        int64         // from the registry, until it spoke
}

// timePod makes a pod and waits until it is ready and has said something.
func (n namespace) timePod(t *testing.T, name, text string) timed {
	t.Helper()
	var r timed
	before, begin := n.link.Stats().Down, time.Now()
	n.apply(t, text)
	n.await(t, name, 1)
	r.ready = time.Since(begin)
	var log string
	eventually(t, patience, "the pod has said something", func() bool {
		return n.API.Do(t.Context(), http.MethodGet, n.path("pods/"+name+"/log?timestamps=true"), nil, &log) == nil && log != ""
	})
	r.bytes = n.link.Stats().Down - before
	stamp, _, _ := strings.Cut(log, " ")
	at, err := time.Parse(time.RFC3339Nano, stamp)
	must(t, err)
	r.spoke = at.Sub(begin)
	return r
}

// patience is how long the tests wait for what should take a second or two.
const patience = 2 * time.Minute

// pod1 is a pod with the label app=name and one container, with further lines of
// the container's specification.
func pod1(name, image string, container ...string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {app: %[1]s}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: %[2]q
    %[3]s
`, name, image, strings.Join(container, "\n    "))
}
