package faults

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/oci"
	"sluice/test/bed"
)

// stage is what all tests share: it is set up by the first that asks.
type stage struct {
	*bed.Stage
	app   *image // converted
	other *image // converted, with other content
	plain *image // not converted
}

var shared struct {
	once  sync.Once
	stage *stage
	err   error
}

func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", "10"); err != nil { // most of them wait, most of the time
		panic(err)
	}
	code := m.Run()
	if s := shared.stage; s != nil {
		code = s.CloseAfter(code)
	}
	os.Exit(code)
}

// everything says that the whole cross product is wanted.
func everything() bool { return os.Getenv("SLUICE_FAULTS") == "all" }

func theStage(t *testing.T) *stage {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting images and running containers needs root")
	}
	shared.once.Do(func() { shared.stage, shared.err = setUp(t) })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.stage
}

func setUp(t *testing.T) (s *stage, err error) {
	ctx := context.Background() // the stage outlives the test that set it up
	s = &stage{}
	if s.Stage, err = bed.NewStage(ctx, "faults", func(s string) { t.Log(s) }); err != nil {
		return s, err
	}
	bin := filepath.Join(s.Work, "probe")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, "./probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return s, fmt.Errorf("%w\n%s", err, out)
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		return s, err
	}
	if s.app, err = s.pushImage(ctx, program, "faults/app:v1", 1, true); err != nil {
		return s, err
	}
	if s.other, err = s.pushImage(ctx, program, "faults/other:v1", 2, true); err != nil {
		return s, err
	}
	s.plain, err = s.pushImage(ctx, program, "faults/plain:v1", 3, false)
	return s, err
}

// with is the stage with another program under test.
func (s *stage) with(sluice string) *stage {
	base, other := *s.Stage, *s
	base.Sluice, other.Stage = sluice, &base
	return &other
}

// The patience of the nodes here: short, or every fault would take minutes, but
// longer than what a machine stops for on which many nodes start at once: they would
// take that for a fault.
const (
	decideTimeout = 5 * time.Second
	fetchTimeout  = 6 * time.Second
	readTimeout   = 5 * time.Second
	recheck       = 300 * time.Millisecond

	// slack is what such a machine may add to a bound. Who doesn't keep to one hangs
	// until the fault is over, and no fault is before that.
	slack = 30 * time.Second

	// A mount may look for the image's manifest, look for the artifact, and
	// fetch its metadata.
	mountBound = 2*decideTimeout + fetchTimeout + slack

	// What is read at once here may lie in two pieces of what the kernel reads.
	readBound = 2*readTimeout + slack
)

// node is a node of one test and the proxy to its registry.
type node struct {
	*bed.Node
	proxy *Proxy
	http  http.Client
}

// node starts `sluice node`, without containerd.
func (s *stage) node(t *testing.T, flags ...string) *node {
	t.Helper()
	n := s.prepare(t, flags...)
	if err := n.StartSluice(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

// allKinds is what the blobs of all images are.
func (s *stage) allKinds() map[oci.Digest]Kind {
	kinds := make(map[oci.Digest]Kind)
	for _, img := range []*image{s.app, s.other, s.plain} {
		maps.Copy(kinds, img.kinds)
	}
	return kinds
}

// prepare makes a node of which nothing runs yet, and takes it down at the end
// of the test.
func (s *stage) prepare(t *testing.T, flags ...string) *node {
	t.Helper()
	dir, err := os.MkdirTemp(s.Work, "n-")
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewProxy(t.Context(), s.Registry.Addr, s.allKinds())
	if err != nil {
		t.Fatal(err)
	}
	flags = append([]string{
		"--decide-timeout", decideTimeout.String(), "--fetch-timeout", fetchTimeout.String(),
		"--read-timeout", readTimeout.String(), "--recheck", recheck.String(), "--verbose",
	}, flags...)
	b, err := bed.NewNode(s.Tools, s.Sluice, dir, flags...)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Node: b, proxy: p, http: http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", filepath.Join(dir, "run", "control.sock"))
		},
	}}}
	t.Cleanup(func() {
		p.Disarm()
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
		p.Close()
		n.checkProcesses(t)
		if t.Failed() {
			n.printLogs(t)
		}
		os.RemoveAll(dir)
	})
	return n
}

func (n *node) printLogs(t *testing.T) {
	for _, log := range []string{"sluice.log", "containerd.log"} {
		if b, err := os.ReadFile(filepath.Join(n.Dir, log)); err == nil {
			t.Logf("%s:\n%s", log, b[max(0, len(b)-3000):])
		}
	}
}

// checkProcesses fails the test if a process of the node outlives it.
func (n *node) checkProcesses(t *testing.T) {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(slack); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if left = processes(n.Dir); len(left) == 0 {
			return
		}
	}
	t.Errorf("processes that outlive the node: %q", left)
}

// processes lists the command lines that have dir in them.
func processes(dir string) []string {
	var all []string
	names, _ := filepath.Glob("/proc/[0-9]*")
	for _, name := range names {
		pid := filepath.Base(name)
		if line := bed.CommandLine(pid); strings.Contains(line, dir+"/") {
			all = append(all, pid+" "+strings.ReplaceAll(line, "\x00", " "))
		}
	}
	return all
}

// ref is an image's name by way of the proxy.
func (n *node) ref(img *image) string { return n.proxy.Addr() + "/" + img.name }

// call calls the control socket, as sluice mount, umount and node status do.
func (n *node) call(ctx context.Context, method, path string, body, answer any) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://node"+path, bytes.NewReader(b))
	if err != nil {
		return err
	}
	resp, err := n.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if b, err = io.ReadAll(resp.Body); err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		var r refusal
		if err := json.Unmarshal(b, &r); err != nil || r.Message == "" {
			return fmt.Errorf("control socket: %s: %s", resp.Status, b)
		}
		return &r
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(b, answer)
}

// refusal is the control socket's error.
type refusal struct{ Reason, Message string }

func (r *refusal) Error() string { return r.Reason + ": " + r.Message }

// mount mounts an image on a directory.
func (n *node) mount(t *testing.T, img *image, dir string) error {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), mountBound, errHangs)
	defer cancel()
	err := n.call(ctx, http.MethodPost, "/v1/mounts", map[string]any{"reference": n.ref(img), "dir": dir}, nil)
	if errors.Is(err, context.DeadlineExceeded) {
		err = context.Cause(ctx)
	}
	return err
}

// umount undoes it.
func (n *node) umount(t *testing.T, dir string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*slack)
	defer cancel()
	return n.call(ctx, http.MethodDelete, "/v1/mounts?name="+dir, nil, nil)
}

// status is what the tests need of `sluice node status --output json`.
type nodeStatus struct {
	Images []struct {
		Reference, Problem string
		Complete           bool
		Size, Cached       int64
		Holders            int
	}
	Pulls []struct{ Reference, Reason, Message string }
	Cache struct{ Bytes, Corrupt int64 }
}

func (n *node) status(t *testing.T) nodeStatus {
	t.Helper()
	out, err := n.Command(t.Context(), "node", "status", "--output", "json").CombinedOutput()
	if err != nil {
		t.Fatalf("sluice node status: %v\n%s", err, out)
	}
	var s nodeStatus
	if err := json.Unmarshal(out, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// whyNot returns the reason and message of the last pull of an image.
func (s nodeStatus) whyNot(ref string) (reason, message string) {
	for _, p := range s.Pulls {
		if p.Reference == ref {
			reason, message = p.Reason, p.Message
		}
	}
	return reason, message
}

// eventually waits until ok says nil, and fails the test with what it says
// instead.
func eventually(t *testing.T, within time.Duration, what string, ok func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(within); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	t.Errorf("%s: not within %v: %v", what, within, err)
}
