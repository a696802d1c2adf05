package kube

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/kube"
	"sluice/oci"
	"sluice/test/bed"
)

// TestConversionPending starts a pod from an image that waits in the queue of a
// registry which is busy with a large one: it runs, and the condition says so.
func TestConversionPending(t *testing.T) {
	n := newReported(t)
	reg, err := bed.StartRegistry(t.Context(), n.Stage.Sluice, t.TempDir(), "SLUICE_REGISTRY_STREAMING_WORKERS=1", "SLUICE_REGISTRY_STREAMING_LAYERS=1")
	must(t, err)
	t.Cleanup(reg.Kill)
	images, err := bed.Debian(t.Context(), func(text string) { t.Log(text) })
	must(t, err)
	must(t, reg.Push(t.Context(), n.Tools, images.OneLayer, "large:1"))
	box, err := bed.NewToolbox(t.Context(), filepath.Join(t.TempDir(), "box"), 16, 50_000)
	must(t, err)
	must(t, reg.Push(t.Context(), n.Tools, box.Layout, "app:1"))
	link, host, err := n.Serve(t.Context(), "busy.test", reg.Addr, linkRate, linkRTT)
	must(t, err)
	t.Cleanup(func() { link.Close() })
	for _, name := range []string{"large:1", "app:1"} {
		must(t, n.Convert(t.Context(), reg.Addr+"/"+name, "--no-wait"))
	}
	n.apply(t, pod1("early", host+"/app:1"))
	n.await(t, "early", 1)
	n.told(t, "early", "True", "ConversionPending")
}

// TestNotConvertible starts a pod from an image that can't be converted, as it
// has a layer that may not be distributed: it runs.
func TestNotConvertible(t *testing.T) {
	n := newReported(t)
	n.newOrdinary(t, "odd/app:0", 15, 50_000)
	manifest, err := exec.CommandContext(t.Context(), n.Tools.Crane, "manifest", "--insecure", n.Stage.Ref("odd/app:0")).Output()
	must(t, err)
	odd := bytes.ReplaceAll(manifest, []byte(oci.MediaTypeLayerGzip), []byte("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+n.Registry.Addr+"/v2/odd/app/manifests/1", bytes.NewReader(odd))
	must(t, err)
	req.Header.Set("Content-Type", oci.MediaTypeImageManifest)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	answer, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("pushing the manifest: %s: %s", resp.Status, answer)
	}
	if err := n.Convert(t.Context(), n.Stage.Ref("odd/app:1")); err == nil {
		t.Fatal("the image was converted, so it's no test of one that can't be")
	}
	n.apply(t, pod1("odd", n.ref("odd/app:1")))
	n.await(t, "odd", 1)
	n.told(t, "odd", "True", "NoStreamingArtifact")
}

// TestOptOut starts a pod that says that it isn't to be streamed.
func TestOptOut(t *testing.T) {
	n := newReported(t)
	image := n.newToolbox(t, "optout:1", 9, 100_000)
	n.apply(t, strings.Replace(pod1("optout", image), "metadata: {", `metadata: {annotations: {sluice.dev/artifact-streaming: "false"}, `, 1))
	n.await(t, "optout", 1)
	n.told(t, "optout", "True", "Disabled")
}

// TestContainerKinds tells of an init, an ordinary and an ephemeral container, on
// each what happened to its image.
func TestContainerKinds(t *testing.T) {
	n := newReported(t)
	streams, ordinary := n.newToolbox(t, "kinds:1", 11, 50_000), n.newOrdinary(t, "plain/kinds:1", 14, 50_000)
	n.apply(t, pod1("kinds", streams)+fmt.Sprintf("  initContainers: [{name: first, image: %q, command: [/bin/sh, -c, exit 0]}]\n", ordinary))
	n.await(t, "kinds", 1)
	must(t, n.API.Patch(t.Context(), n.path("pods/kinds/ephemeralcontainers"), map[string]any{"spec": map[string]any{
		"ephemeralContainers": []any{map[string]any{"name": "look", "image": streams, "command": []string{"/bin/sleep", "100000"}}},
	}}))
	for field, reason := range map[string]string{
		"spec.initContainers{first}": "NotStreamed", "spec.containers{main}": "Pulled", "spec.ephemeralContainers{look}": "Pulled",
	} {
		eventually(t, patience, reason+" is told of "+field, func() bool {
			var told []string
			for _, e := range n.events(t, "kinds") {
				if e.Source.Component == "sluice" && e.InvolvedObject.FieldPath == field {
					told = append(told, e.Reason)
				}
			}
			return len(told) == 1 && told[0] == reason
		})
	}
	n.told(t, "kinds", "True", "NoStreamingArtifact")
}

// reported is a namespace whose pods sluice-reporter tells of, with the rights of
// deploy/manifests.
type reported struct{ namespace }

func newReported(t *testing.T) reported {
	t.Helper()
	r := newReporting(t, bed.ClusterNode, policy()...)
	r.socket = bed.ControlSocket
	r.report(t)
	eventually(t, patience, "the node has its label", func() bool { return r.label(t) == "true" })
	n := reported{r.namespace}
	// A registry is the daemon's affair once it has had an image that streams.
	n.apply(t, pod1("streams", n.ref("app:1")))
	n.await(t, "streams", 1)
	n.told(t, "streams", "False", "Streamed")
	return n
}

// told waits for the condition of a pod.
func (n reported) told(t *testing.T, name, status, reason string) {
	t.Helper()
	eventually(t, patience, fmt.Sprintf("pod %s has the condition %s %s", name, status, reason), func() bool {
		var p pod
		must(t, n.API.Do(t.Context(), http.MethodGet, n.path("pods/"+name), nil, &p))
		c := p.condition(kube.ConditionType)
		return c.Status == status && c.Reason == reason
	})
}
