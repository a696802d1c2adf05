package kube

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/kube"
	"sluice/internal/node/cache"
	"sluice/internal/node/endpoint"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/plane"
	"sluice/internal/node/timeline"
	"sluice/test/bed"
)

// reporting is a sluice-reporter with the rights of deploy/manifests, and a node
// daemon's control socket at which the test says what happens to pods. They are
// on a node of their own, which nobody else is interested in.
type reporting struct {
	namespace
	node   string
	events *happening.Log
	socket string
	config string // the reporter's kubeconfig
	state  string
	token  string
	api    *bed.KubeAPI // as the reporter
	*bed.Process
	runs int
}

// newReporting gives the reporter its rights on a node, a new one if it's "", and
// starts nothing. kinds are further ones of the manifest's objects; with an
// admission policy the reporter may write what is its own only.
func newReporting(t *testing.T, node string, kinds ...string) *reporting {
	t.Helper()
	s := theStage(t)
	r := &reporting{namespace: s.newNamespace(t), node: node}
	s.applyFor(t, s.manifest(t, "sluice-node.yaml", "Namespace"))
	s.applyFor(t, s.manifest(t, "sluice-node.yaml", append(kinds, "ServiceAccount", "ClusterRole", "ClusterRoleBinding")...))
	if node == "" {
		r.node = r.name + "-node"
		s.applyFor(t, fmt.Sprintf("apiVersion: v1\nkind: Node\nmetadata: {name: %s}\nspec: {unschedulable: true}\n", r.node))
	}
	r.token = s.reporterToken(t, r.node)
	r.api = s.API.As(r.token)
	dir := t.TempDir()
	r.state, r.config = filepath.Join(dir, "reporter.json"), filepath.Join(dir, "kubeconfig")
	must(t, writeKubeconfig(r.config, "https://10.96.0.1", r.token))
	return r
}

// policy are the kinds of objects by which the reporter may write no more than
// what is its own.
func policy() []string {
	return []string{"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
}

func writeKubeconfig(name, server, token string) error {
	return os.WriteFile(name, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, insecure-skip-tls-verify: true}}]
users: [{name: u, user: {token: %q}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, server, token), 0o600)
}

// daemon serves the control socket of a daemon that says it can stream, until
// stop is called.
func (r *reporting) daemon(t *testing.T) (stop func()) {
	t.Helper()
	dir := t.TempDir()
	c, err := cache.Open(t.Context(), cache.Options{Dir: filepath.Join(dir, "cache")})
	must(t, err)
	m, err := mount.Open(t.Context(), mount.Options{
		Root: filepath.Join(dir, "node"), Cache: c, Plane: mount.NoPlane(&plane.UnsupportedError{}),
		Registry: func(_, _ string) (mount.Registry, error) { return nil, errors.New("no network") },
	})
	must(t, err)
	r.events = happening.NewLog(happening.Capacity)
	if r.socket == "" {
		r.socket = filepath.Join(t.TempDir(), "c.sock")
	}
	l, err := endpoint.Listen(r.socket)
	must(t, err)
	info := control.Info{Root: dir, Events: r.events, Plane: control.Plane{Name: "fuse"}}
	server := &http.Server{Handler: control.Handler(m, &timeline.Recorder{}, info, slog.New(slog.DiscardHandler))}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	return sync.OnceFunc(func() {
		r.events.Close()
		if err := errors.Join(server.Close(), m.Close(), c.Close()); err != nil {
			t.Error(err)
		}
		<-done
	})
}

// report starts a reporter, which the end of the test ends.
func (r *reporting) report(t *testing.T) {
	t.Helper()
	bin := filepath.Join(r.Work, "sluice-reporter")
	if _, err := os.Stat(bin); err != nil {
		build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, "./cmd/sluice-reporter")
		build.Dir, build.Env = r.Src, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	r.runs++
	p, err := r.Start(fmt.Sprintf("%s-reporter-%d", r.name, r.runs), []string{"NODE_NAME=" + r.node}, bin,
		"--kubeconfig", r.config, "--control-socket", r.socket, "--state", r.state)
	must(t, err)
	r.Process = p
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			b, _ := os.ReadFile(p.Log)
			t.Logf("the reporter said\n%s", b)
		}
	})
}

// told counts lines of the reporter's log with a text.
func (r *reporting) told(t *testing.T, text string) int {
	t.Helper()
	b, err := os.ReadFile(r.Log)
	must(t, err)
	return strings.Count(string(b), text)
}

// label returns the node's label.
func (r *reporting) label(t *testing.T) string {
	t.Helper()
	var node struct {
		Metadata struct{ Labels map[string]string }
	}
	must(t, r.API.Do(t.Context(), http.MethodGet, "/api/v1/nodes/"+r.node, nil, &node))
	return node.Metadata.Labels[kube.Streaming().Label]
}

// makePod makes a pod on the node, where nobody runs it, with an init, an
// ordinary and an ephemeral container.
func (r *reporting) makePod(t *testing.T, namespace, name, initial, ordinary, ephemeral string) kube.PodRef {
	t.Helper()
	must(t, r.API.Apply(t.Context(), namespace, fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: %s
  automountServiceAccountToken: false
  initContainers: [{name: %s, image: i}]
  containers: [{name: %s, image: i}]
`, name, r.node, initial, ordinary)))
	path := "/api/v1/namespaces/" + namespace + "/pods/" + name
	must(t, r.API.Patch(t.Context(), path+"/ephemeralcontainers", map[string]any{
		"spec": map[string]any{"ephemeralContainers": []any{map[string]any{"name": ephemeral, "image": "i", "terminationMessagePolicy": "File"}}},
	}))
	var p pod
	must(t, r.API.Do(t.Context(), http.MethodGet, path, nil, &p))
	return kube.PodRef{Namespace: namespace, Name: name, UID: p.Metadata.UID}
}

// pod makes a pod with containers setup, main and debug.
func (r *reporting) pod(t *testing.T, name string) happening.Pod {
	t.Helper()
	ref := r.makePod(t, r.name, name, "setup", "main", "debug")
	return happening.Pod{Namespace: ref.Namespace, Name: ref.Name, UID: ref.UID}
}

// started says that a container was made on a streamed image.
func (r *reporting) started(p happening.Pod, container string) {
	r.events.Add(happening.Event{
		Kind: happening.Started, Pod: p, Container: container, Image: "r.test/app:1", Streamed: true,
		Duration: 412 * time.Millisecond, BytesHere: 100, BytesTotal: 2000,
	})
}

// condition returns a pod's condition.
func (r *reporting) condition(t *testing.T, name string) condition {
	t.Helper()
	var p pod
	must(t, r.API.Do(t.Context(), http.MethodGet, r.path("pods/"+name), nil, &p))
	return p.condition(kube.ConditionType)
}

// ours returns the events of the namespace that are from sluice.
func (r *reporting) ours(t *testing.T) []event {
	t.Helper()
	var list struct{ Items []event }
	must(t, r.API.Do(t.Context(), http.MethodGet, r.path("events"), nil, &list))
	return slices.DeleteFunc(list.Items, func(e event) bool { return e.Source.Component != "sluice" })
}

// serveRelay connects who comes with another address, until l is closed.
func serveRelay(l net.Listener, dial func() (net.Conn, error)) {
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		out, err := dial()
		if err != nil {
			in.Close()
			continue
		}
		for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
			go func() { // ends with the connection
				io.Copy(pair[0], pair[1])
				in.Close()
				out.Close()
			}()
		}
	}
}

// readEvent reads an Event object as kubetest wants it.
func (r *reporting) readEvent(t *testing.T, namespace, name string) (kube.Event, kube.Repeat) {
	t.Helper()
	var e struct {
		InvolvedObject struct{ Kind, Namespace, Name, UID, FieldPath string }
		Source         struct{ Component, Host string }

		Type, Reason, Message         string
		FirstTimestamp, LastTimestamp time.Time
		Count                         int32
	}
	must(t, r.API.Do(t.Context(), http.MethodGet, "/api/v1/namespaces/"+namespace+"/events/"+name, nil, &e))
	o := e.InvolvedObject
	if o.Kind != "Pod" {
		t.Errorf("the event is %+v", e)
	}
	return kube.Event{
			Component: e.Source.Component, Name: name, Pod: kube.PodRef{Namespace: o.Namespace, Name: o.Name, UID: o.UID}, Field: o.FieldPath, Node: e.Source.Host,
			Warning: e.Type == "Warning", Reason: e.Reason, Message: e.Message, Time: e.FirstTimestamp.UTC(),
		}, kube.Repeat{
			Namespace: namespace, Name: name, Count: e.Count, Last: e.LastTimestamp.UTC(), Message: e.Message,
		}
}

// usage prints what a process takes, and fails the test if that's too much
// memory.
func usage(t *testing.T, when string, pid int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kb, err := strconv.Atoi(strings.Fields(rest)[0])
	must(t, err)
	before := ticks(t, pid)
	const span = 5 * time.Second
	time.Sleep(span)
	t.Logf("FIGURE sluice-reporter, %s: %.1f MB resident, %.2f %% of a CPU for %v", when, float64(kb)/1024, float64(ticks(t, pid)-before)/span.Seconds(), span)
	if kb > 40<<10 {
		t.Errorf("%s the reporter has %d kB resident, more than 40 MB", when, kb)
	}
}

// ticks returns the processor time of a process, in hundredths of a second.
func ticks(t *testing.T, pid int) int {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	_, rest, _ := strings.Cut(string(stat), ") ")
	f := strings.Fields(rest)
	user, err := strconv.Atoi(f[11])
	must(t, err)
	system, err := strconv.Atoi(f[12])
	must(t, err)
	return user + system
}
