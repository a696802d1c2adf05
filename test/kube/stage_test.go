package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"sluice/internal/node/mount/control"
	"sluice/test/bed"
)

// stage is what all tests share: it is set up by the first that asks.
type stage struct {
	*bed.Stage
	*bed.Cluster
	host string // the registry, as the node names it
	link *bed.Link
	app  bed.Toolbox
	late bed.Toolbox  // not in the registry at first
	cri  *bed.Kubelet // containerd, asked from outside
}

var shared struct {
	once  sync.Once
	stage *stage
	err   error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if s := shared.stage; s != nil {
		code = s.closeAfter(code)
	}
	os.Exit(code)
}

// closeAfter ends the cluster, then what it stood on.
func (s *stage) closeAfter(code int) int {
	if s.cri != nil {
		s.cri.Close()
	}
	if s.Cluster != nil {
		if err := s.Cluster.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, "the cluster doesn't end:", err)
			code = 1
		}
	}
	if s.link != nil {
		s.link.Close()
	}
	return s.Stage.CloseAfter(code)
}

// theStage returns the shared stage, and has the cluster shown if t fails.
func theStage(t *testing.T) *stage {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a cluster needs root")
	}
	shared.once.Do(func() { shared.stage, shared.err = setUp(t) })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(shared.stage.Diagnosis(context.Background()))
		}
	})
	return shared.stage
}

// The link between node and registry.
const (
	linkRate = 200e6 // bits per second
	linkRTT  = 10 * time.Millisecond
)

// lowDisk is how many bytes of the node's disk kubelet wants free: otherwise it
// removes images that aren't used, and then pods.
const lowDisk = 300 << 20

// plainRuntime lets the pulls for a pod of runtime class "plain" use overlayfs.
const plainRuntime = `io.containerd.cri.runtime-handler: plain`

const plainClass = `apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: plain}
handler: plain
`

func setUp(t *testing.T) (*stage, error) {
	ctx := context.Background() // the stage outlives the test that set it up
	say := func(s string) { t.Log(s) }
	base, err := bed.NewStage(ctx, "kube", say)
	s := &stage{Stage: base}
	if err != nil {
		return s, err
	}
	var tools bed.KubernetesTools
	for _, step := range []func() error{
		func() (err error) { tools, err = bed.BuildKubernetes(ctx, s.Src, say); return },
		func() (err error) {
			s.app, err = bed.NewToolbox(ctx, filepath.Join(s.Work, "app"), 5, 3_000_000, 500_000)
			return
		},
		func() (err error) {
			s.late, err = bed.NewToolbox(ctx, filepath.Join(s.Work, "late"), 6, 2_000_000)
			return
		},
		func() error { return s.Push(ctx, s.app.Layout, "app:1") },
		func() error { return s.Convert(ctx, s.Stage.Ref("app:1")) },
		func() (err error) {
			begin := time.Now()
			s.Cluster, err = bed.StartCluster(ctx, bed.ClusterConfig{
				Src: s.Src, Dir: filepath.Join(s.Work, "c"), Tools: s.Tools, Kubernetes: tools, Sluice: s.Stage.Sluice,
				Sandbox: s.pushSleeper(t),
				Kubelet: fmt.Sprintf("evictionHard: {nodefs.available: \"%[1]d\", imagefs.available: \"%[1]d\", memory.available: 10Mi}\nevictionPressureTransitionPeriod: 1s\nimageMinimumGCAge: 1s", lowDisk),
				// Kubelet is who removes images. The rest of an image comes slowly, so that a
				// pod is ready long before it's here, also on a slow machine.
				NodeFlags: []string{"--cache-free", "0", "--fill-bandwidth", "10000000"},

				CredentialProvider: credentialProvider, ProviderRegistry: providerRegistry,
			})
			if err != nil && s.Cluster != nil {
				return fmt.Errorf("%w\n%s", err, s.Diagnosis(ctx))
			}
			t.Logf("FIGURE a cluster started in %.1f s", time.Since(begin).Seconds())
			return err
		},
		func() (err error) {
			s.link, s.host, err = s.Serve(ctx, "registry.test", s.Registry.Addr, linkRate, linkRTT)
			return
		},
		func() (err error) { s.cri, err = s.Cluster.CRI(); return },
		func() error { return s.cri.Pull(ctx, s.ref("sleeper:1"), nil) }, // whatever tests do with the link
		func() error { return s.API.Apply(ctx, "", plainClass) },
	} {
		if err := step(); err != nil {
			return s, err
		}
	}
	return s, nil
}

// must fails the test, with the last words of a program that failed.
func must(t *testing.T, err error) {
	t.Helper()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		t.Fatalf("%v: %s", err, exit.Stderr)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits for something that happens by itself.
func eventually(t *testing.T, bound time.Duration, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(bound); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if is() {
			return
		}
	}
	if !is() {
		t.Fatalf("after %v still not: %s", bound, what)
	}
}

// ref is how pods call an image of the registry.
func (s *stage) ref(name string) string { return s.host + "/" + name }

// status asks the node daemon.
func (s *stage) status(t *testing.T) control.Status {
	t.Helper()
	var st control.Status
	out, err := s.Output(t.Context(), s.Stage.Sluice, "node", "status", "--output", "json")
	if err == nil {
		err = json.Unmarshal(out, &st)
	}
	if err != nil {
		t.Fatalf("node status: %v\n%s", err, out)
	}
	return st
}

// streams fails the test unless an image is streamed to containers.
func (s *stage) streams(t *testing.T, ref string) {
	t.Helper()
	st := s.status(t)
	for _, image := range st.Images {
		if image.Reference == ref && image.Holders > 0 {
			return
		}
	}
	t.Errorf("%s doesn't stream; images that do: %+v; pulls: %+v", ref, st.Images, st.Pulls)
}

// newToolbox pushes and converts an image of one file, and returns how pods
// call it.
func (s *stage) newToolbox(t *testing.T, name string, seed uint64, size int) string {
	t.Helper()
	ref := s.newOrdinary(t, name, seed, size)
	must(t, s.Convert(t.Context(), s.Stage.Ref(name)))
	return ref
}

// newOrdinary is newToolbox without an artifact.
func (s *stage) newOrdinary(t *testing.T, name string, seed uint64, size int) string {
	t.Helper()
	box, err := bed.NewToolbox(t.Context(), filepath.Join(t.TempDir(), "box"), seed, size)
	must(t, err)
	must(t, s.Push(t.Context(), box.Layout, name))
	return s.ref(name)
}
