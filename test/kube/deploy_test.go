package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sluice/test/bed"
)

// TestInstallUpgradeUninstall does on an ordinary node, with containerd as it
// is, what docs/kubernetes.md tells an administrator to do.
func TestInstallUpgradeUninstall(t *testing.T) {
	begin := time.Now()
	phase := func(what string) {
		t.Logf("FIGURE %s: %.1f s", what, time.Since(begin).Seconds())
		begin = time.Now()
	}
	s := theStage(t).ordinary(t)
	phase("clusters")
	first, second := s.pushPrograms(t, "1"), s.pushPrograms(t, "2")
	restart := s.restarts(t)
	must(t, s.API.Apply(t.Context(), "default", withImage(s.manifest(t, "sluice-node.yaml"), first, restart)))
	s.awaitDaemonSet(t, "sluice-node")
	eventually(t, patience, "the node has the label", func() bool { return s.nodeLabels(t)[artifactLabel] == "true" })

	phase("installed on a node")
	n := s.newNamespace(t)
	n.apply(t, pod1("app", s.ref("app:1")))
	app := n.await(t, "app", 1)[0]
	s.readsRight(t, app)
	s.toldStreamed(t, n, "app")
	if told := n.told(t, "app", "Pulling"); !strings.HasSuffix(told, "with artifact streaming") {
		t.Errorf("before it was pulled: %q", told)
	}

	phase("streamed a pod")
	must(t, s.API.Apply(t.Context(), "default", withImage(s.manifest(t, "sluice-node.yaml"), second, restart)))
	s.awaitDaemonSet(t, "sluice-node")
	after := n.await(t, "app", 1)[0]
	if after.Status.ContainerStatuses[0].ContainerID != app.Status.ContainerStatuses[0].ContainerID {
		t.Errorf("the upgrade restarted a pod: %+v", after.Status)
	}
	s.readsRight(t, after)
	n.apply(t, pod1("later", s.ref("app:1")))
	s.readsRight(t, n.await(t, "later", 1)[0])
	s.toldStreamed(t, n, "later")
	n.end(t, "app")
	n.end(t, "later")

	phase("upgraded and pods ended")
	must(t, s.API.Delete(t.Context(), "default", s.manifest(t, "sluice-node.yaml", "DaemonSet")))
	must(t, s.API.Apply(t.Context(), "default", withImage(s.manifest(t, "uninstall.yaml"), second, restart)))
	s.awaitDaemonSet(t, "sluice-uninstall")
	phase("uninstalled")
	if _, ok := s.nodeLabels(t)[artifactLabel]; ok {
		t.Error("the node has its label still")
	}
	for _, name := range []string{"/usr/local/bin/sluice", "/var/lib/sluice", "/etc/containerd/conf.d"} {
		left, err := filepath.Glob(s.Path(name + "*"))
		must(t, err)
		for _, f := range left {
			if entries, err := os.ReadDir(f); err != nil || len(entries) > 0 {
				t.Errorf("%s is left: %v", f, entries)
			}
		}
	}
	must(t, s.API.Delete(t.Context(), "default", s.manifest(t, "uninstall.yaml")))
	n.apply(t, pod1("plain", s.ref("app:1")))
	s.readsRight(t, n.await(t, "plain", 1)[0])
}

// end deletes a pod and what the runtime has of it, for which kubelet takes a
// minute.
func (n namespace) end(t *testing.T, name string) {
	t.Helper()
	must(t, n.API.Do(t.Context(), http.MethodDelete, n.path("pods/"+name+"?gracePeriodSeconds=0"), nil, nil))
	eventually(t, patience, name+" is gone", func() bool {
		list, err := n.cri.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
			LabelSelector: map[string]string{"io.kubernetes.pod.namespace": n.name, "io.kubernetes.pod.name": name},
		}})
		if err != nil {
			return false
		}
		for _, sandbox := range list.Items {
			if sandbox.State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
				// Kubelet may have been quicker.
				_, _ = n.cri.Runtime.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sandbox.Id})
			}
		}
		return len(list.Items) == 0
	})
}

// artifactLabel is what a node has that streams.
const artifactLabel = "kubernetes.azure.com/artifactstreaming-enabled"

// ordinary returns a stage with a cluster of its own, whose node knows nothing of
// Sluice.
func (s *stage) ordinary(t *testing.T) *stage {
	t.Helper()
	o := &stage{Stage: s.Stage, app: s.app}
	tools, err := bed.BuildKubernetes(t.Context(), s.Src, func(text string) { t.Log(text) })
	must(t, err)
	o.Cluster, err = bed.StartCluster(t.Context(), bed.ClusterConfig{
		Src: s.Src, Dir: filepath.Join(s.Work, "o"), Tools: s.Tools, Kubernetes: tools, Sandbox: s.pushSleeper(t),
	})
	if o.Cluster != nil {
		t.Cleanup(func() {
			if t.Failed() {
				t.Log(o.Diagnosis(context.Background()), o.podLogs(t))
			}
			if err := o.Cluster.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
	must(t, err)
	must(t, os.Symlink(s.Tools.Containerd(), o.Path("/usr/local/bin/containerd"))) // where nodes have it
	o.link, o.host, err = o.Serve(t.Context(), "registry.test", s.Registry.Addr, linkRate, linkRTT)
	must(t, err)
	t.Cleanup(func() { o.link.Close() })
	o.cri, err = o.Cluster.CRI()
	must(t, err)
	t.Cleanup(o.cri.Close)
	return o
}

// pushSleeper pushes an image that only sleeps, and has no layer in common with
// another: what was on a node before Sluice stays there as it is. It returns how
// the node names it.
func (s *stage) pushSleeper(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	program, err := os.ReadFile("/bin/busybox")
	must(t, err)
	must(t, os.MkdirAll(filepath.Join(dir, "files/bin"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "files/bin/sleep"), program, 0o755))
	layer := filepath.Join(dir, "layer.tar")
	if out, err := exec.CommandContext(t.Context(), "tar", "-C", filepath.Join(dir, "files"), "-cf", layer, "bin").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	layout := filepath.Join(dir, "layout")
	must(t, bed.WriteLayout(layout, []string{"/bin/sleep", "1000000"}, []string{layer}))
	must(t, s.Push(t.Context(), layout, "sleeper:1"))
	return "registry.test:5000/sleeper:1"
}

// podLogs is what the pods of Sluice have said.
func (s *stage) podLogs(t *testing.T) string {
	t.Helper()
	files, err := filepath.Glob(s.Path("/var/log/pods/sluice_*/*/*.log"))
	must(t, err)
	var all strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		fmt.Fprintf(&all, "\n%s (%v)\n%s", f, err, b)
	}
	return all.String()
}

// pushPrograms pushes an image of the programs as deploy/Dockerfile makes it. Its
// programs differ between versions, by what is written behind their ends.
func (s *stage) pushPrograms(t *testing.T, version string) string {
	t.Helper()
	dir, built := t.TempDir(), filepath.Join(s.Work, "programs")
	if _, err := os.Stat(built); err != nil { // the first call's affair
		build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s", "-o", built+"/", "./cmd/sluice", "./cmd/sluice-reporter")
		build.Dir, build.Env = s.Src, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	must(t, os.CopyFS(dir, os.DirFS(built)))
	programs := []string{filepath.Join(dir, "sluice"), filepath.Join(dir, "sluice-reporter")}
	for _, p := range programs {
		f, err := os.OpenFile(p, os.O_APPEND|os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteString(version)
		must(t, err)
		must(t, f.Close())
	}
	layout, err := bed.WriteProgramsImage(filepath.Join(dir, "image"), programs...)
	must(t, err)
	must(t, s.Push(t.Context(), layout, "sluice:"+version))
	return s.ref("sluice:" + version)
}

// withImage is a manifest with an image in the place of the example's, and further
// flags where a node is changed.
func withImage(manifest, image string, flags ...string) string {
	const host = "            - --host=/host\n"
	more := host
	for _, f := range flags {
		more += fmt.Sprintf("            - %q\n", f)
	}
	return strings.NewReplacer("registry.example.com/sluice:0.1.0", image, host, more).Replace(manifest)
}

// restarts does what systemd would on other nodes, until the end of the test: it
// restarts containerd when somebody on the node wants it, and kubelet when its
// drop-in comes or goes. It returns the flag by which Sluice restarts containerd.
func (s *stage) restarts(t *testing.T) (flag string) {
	t.Helper()
	const wanted = "/run/restart-containerd"
	there := func(name string) bool { _, err := os.Stat(s.Path(name)); return err == nil }
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	wg.Go(func() {
		for proxied := false; ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
			if there(wanted) {
				s.Containerd.Stop()
				if err := errors.Join(s.StartContainerd(ctx), os.Remove(s.Path(wanted))); err != nil {
					t.Error(err)
				}
			}
			if now := there(bed.KubeletDropIns + "/90-sluice.conf"); now != proxied {
				proxied = now
				s.Cluster.Kubelet.Stop()
				if err := s.StartKubelet(ctx); err != nil {
					t.Error(err)
				}
			}
		}
	})
	return "--restart-command=touch " + wanted + "; while [ -e " + wanted + " ]; do sleep 0.1; done"
}

// awaitDaemonSet waits until all pods of a DaemonSet of Sluice are ready and as
// it says.
func (s *stage) awaitDaemonSet(t *testing.T, name string) {
	t.Helper()
	eventually(t, patience, name+" is rolled out", func() bool {
		var d struct {
			Metadata struct{ Generation int }
			Status   struct{ ObservedGeneration, DesiredNumberScheduled, UpdatedNumberScheduled, NumberReady int }
		}
		err := s.API.Do(t.Context(), http.MethodGet, "/apis/apps/v1/namespaces/sluice/daemonsets/"+name, nil, &d)
		return err == nil && d.Status.ObservedGeneration == d.Metadata.Generation &&
			d.Status.DesiredNumberScheduled == 1 && d.Status.UpdatedNumberScheduled == 1 && d.Status.NumberReady == 1
	})
}

func (s *stage) nodeLabels(t *testing.T) map[string]string {
	t.Helper()
	var node struct {
		Metadata struct{ Labels map[string]string }
	}
	must(t, s.API.Do(t.Context(), http.MethodGet, "/api/v1/nodes/"+bed.ClusterNode, nil, &node))
	return node.Metadata.Labels
}

// toldStreamed waits until a pod says that its image was streamed.
func (s *stage) toldStreamed(t *testing.T, n namespace, name string) {
	t.Helper()
	eventually(t, patience, "the pod has its condition", func() bool {
		c := n.pods(t, name)[0].condition("UpgradeIfStreamableDisabled")
		return c.Status == "False" && c.Reason == "Streamed"
	})
	eventually(t, patience, "the pod has its event", func() bool {
		return strings.Contains(n.told(t, name, "Pulled"), "(streamed)")
	})
}

// told returns the message of an event of Sluice on a pod, "" if there's none.
func (n namespace) told(t *testing.T, name, reason string) string {
	t.Helper()
	for _, e := range n.events(t, name) {
		if e.Source.Component == "sluice" && e.Reason == reason {
			return e.Message
		}
	}
	return ""
}

// TestRegistryDeployment runs the registry of registry-pvc.yaml on a volume of
// the node.
func TestRegistryDeployment(t *testing.T) {
	s := theStage(t)
	image := s.pushPrograms(t, "1")
	dir := filepath.Join(s.Work, "volume")
	must(t, os.Mkdir(dir, 0o700))
	must(t, os.Chown(dir, 65532, 65532)) // volumes that aren't of the host get that from fsGroup
	s.applyFor(t, `apiVersion: v1
kind: PersistentVolume
metadata: {name: images}
spec: {capacity: {storage: 100Gi}, accessModes: [ReadWriteOnce], hostPath: {path: `+dir+`}, claimRef: {namespace: sluice-registry, name: sluice-registry}}
`)
	s.applyFor(t, s.manifest(t, "registry-pvc.yaml", "Namespace"))
	s.applyFor(t, withImage(s.manifest(t, "registry-pvc.yaml", "ServiceAccount", "PersistentVolumeClaim", "Service", "Deployment"), image))
	s.applyFor(t, "apiVersion: v1\nkind: Secret\nmetadata: {name: sluice-registry, namespace: sluice-registry}\nstringData: {admin-password: secret}\n")
	var slices struct {
		Endpoints []struct {
			Addresses  []string
			Conditions struct{ Ready bool }
		}
	}
	eventually(t, patience, "the registry is ready", func() bool {
		var list struct{ Items []json.RawMessage }
		err := s.API.Do(t.Context(), http.MethodGet, "/apis/discovery.k8s.io/v1/namespaces/sluice-registry/endpointslices", nil, &list)
		return err == nil && len(list.Items) == 1 && json.Unmarshal(list.Items[0], &slices) == nil &&
			len(slices.Endpoints) == 1 && slices.Endpoints[0].Conditions.Ready
	})
	conn, err := s.Dial(t.Context(), "tcp", slices.Endpoints[0].Addresses[0]+":5000")
	must(t, err)
	defer conn.Close()
	_, err = conn.Write([]byte("GET /v2/ HTTP/1.0\r\nAuthorization: Basic YWRtaW46c2VjcmV0\r\n\r\n"))
	must(t, err)
	var answer bytes.Buffer
	_, err = answer.ReadFrom(conn)
	must(t, err)
	if !strings.Contains(answer.String(), " 200 OK\r\n") {
		t.Errorf("the registry answers\n%s", answer.String())
	}
}
