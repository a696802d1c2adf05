package report

import (
	"context"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/oci"
)

func scrape(t *testing.T, s mount.Status) string {
	t.Helper()
	w := httptest.NewRecorder()
	events := happening.NewLog(4)
	for range 6 {
		events.Add(happening.Event{Kind: happening.Started, Streamed: true})
	}
	events.Add(happening.Event{Kind: happening.Started, Reason: string(mount.Unauthorized)})
	events.Add(happening.Event{Kind: happening.Pulling})
	Metrics(func(context.Context) mount.Status { return s }, events).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func TestMetrics(t *testing.T) {
	id := oci.DigestOf([]byte("artifact"))
	s := mount.Status{
		Images: []mount.ImageStatus{{
			Reference: "host/app:1", Artifact: id, State: mount.StateStreaming, Plane: "fuse", Size: 1000, Cached: 250,
			Reads: mount.Reads{
				Faults: 3, Failures: 1, Wait: 30 * time.Second,
				Latency: []int64{0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, Bytes: map[string]int64{"fault": 7, "bootpack": 9},
			},
		}},
		NotStreaming: []mount.NotStreamed{{Reference: "host/other:1", Reason: mount.Unauthorized}},
		Counts:       []mount.PullCount{{Pulls: 2, Time: 3 * time.Second}, {Reason: mount.Unauthorized, Pulls: 4}},
		Traffic:      mount.Traffic{Requests: 11, Failures: 2, Bytes: 5000},
		Cache:        mount.CacheStatus{Bytes: 300, Layers: 2, Corrupt: 1},
	}
	text := scrape(t, s)
	image := `artifact="` + id.String() + `",image="host/app:1"`
	for _, want := range []string{
		`sluice_node_images{state="streaming"} 1`,
		`sluice_node_images{state="quarantined"} 0`,
		`sluice_node_images_not_streaming{reason="Unauthorized"} 1`,
		`sluice_node_images_not_streaming{reason="Disabled"} 0`,
		`sluice_node_pulls_total{outcome="streaming"} 2`,
		`sluice_node_pulls_total{outcome="Unauthorized"} 4`,
		`sluice_node_pull_seconds_total{outcome="streaming"} 3`,
		`sluice_node_starts_total{outcome="streaming"} 6`,
		`sluice_node_starts_total{outcome="Unauthorized"} 1`,
		`sluice_node_starts_total{outcome="Disabled"} 0`,
		`sluice_node_registry_requests_total 11`,
		`sluice_node_corrupt_chunks_total 1`,
		`sluice_node_image_info{` + image + `,plane="fuse",state="streaming"} 1`,
		`sluice_node_image_fetched_bytes_total{` + image + `,origin="bootpack"} 9`,
		`sluice_node_image_read_wait_seconds_bucket{` + image + `,le="0.001"} 0`,
		`sluice_node_image_read_wait_seconds_bucket{` + image + `,le="0.002"} 2`,
		`sluice_node_image_read_wait_seconds_bucket{` + image + `,le="20"} 2`,
		`sluice_node_image_read_wait_seconds_bucket{` + image + `,le="+Inf"} 3`,
		`sluice_node_image_read_wait_seconds_sum{` + image + `} 30`,
		`sluice_node_image_read_failures_total{` + image + `} 1`,
		`process_resident_memory_bytes `,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%s isn't there", want)
		}
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "sluice_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	if err != nil || t.Failed() {
		t.Log(err, text)
	}
}

// Images that go take their metrics along, and however many there are, a scrape
// is bounded.
func TestMetricsAreBounded(t *testing.T) {
	var s mount.Status
	if text := scrape(t, s); strings.Contains(text, "artifact=") {
		t.Errorf("no image, and metrics of one:\n%s", text)
	}
	for i := range MaxImages + 100 {
		s.Images = append(s.Images, mount.ImageStatus{Reference: "host/app:1", Artifact: oci.DigestOf([]byte{byte(i), byte(i >> 8)}), State: mount.StateComplete})
	}
	text := scrape(t, s)
	if n := strings.Count(text, "sluice_node_image_info{"); n != MaxImages {
		t.Errorf("%d images have metrics", n)
	}
	if !strings.Contains(text, `sluice_node_images{state="complete"} 600`) {
		t.Error("not all images are counted")
	}
}

// The operators' guide lists exactly these metrics, in the same words.
func TestGuideListsMetrics(t *testing.T) {
	guide, err := os.ReadFile("../../../docs/containerd.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(guide), "| metric | kind | labels | meaning |\n|---|---|---|---|\n")
	if !found {
		t.Fatal("docs/containerd.md has no table of metrics")
	}
	table, _, _ = strings.Cut(table, "\n\n")
	var want strings.Builder
	kinds := map[prometheus.ValueType]string{prometheus.GaugeValue: "gauge", prometheus.CounterValue: "counter", Histogram: "histogram"}
	for _, m := range all() {
		want.WriteString("| `" + m.Name + "` | " + kinds[m.Kind] + " | " + strings.Join(m.Labels, ", ") + " | " + m.Help + " |\n")
	}
	if got := strings.TrimSpace(table); got != strings.TrimSpace(want.String()) {
		t.Errorf("the guide's table:\n%s\nthe program's:\n%s", got, want.String())
	}
}
