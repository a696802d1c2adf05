package teleport

import (
	"context"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"sluice/internal/node/disks"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/internal/node/report"
	"sluice/internal/node/smb"
	"sluice/oci"
)

func scrape(t *testing.T, s disks.Status) string {
	t.Helper()
	w := httptest.NewRecorder()
	events := happening.NewLog(4)
	for range 6 {
		events.Add(happening.Event{Kind: happening.Started, Streamed: true})
	}
	events.Add(happening.Event{Kind: happening.Started, Reason: string(mount.Unauthorized)})
	connections := new(smb.Tally)
	connections.Made.Store(3)
	connections.Broken.Store(2)
	Metrics(func(context.Context) disks.Status { return s }, connections, events).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func TestMetrics(t *testing.T) {
	id := oci.DigestOf([]byte("disk"))
	s := disks.Status{
		Images: []disks.ImageStatus{{}, {}},
		Disks: []disks.DiskStatus{
			{Digest: id, Size: 1000, Cached: 250, Path: "/m/1", Faults: 3, Failures: 1, Wait: 30 * time.Second, Latency: []int64{0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, Bytes: 300},
			{Digest: oci.DigestOf([]byte("another"))},
		},
		Shares:   []disks.ShareStatus{{Registry: "r.test", Repository: "a"}, {Registry: "r.test", Repository: "b", Problem: "it is away"}},
		Counts:   []mount.PullCount{{Pulls: 2, Time: 3 * time.Second}, {Reason: mount.ConversionPending, Pulls: 4}},
		Attaches: disks.Attaches{Count: 2, Time: time.Second, Latency: []int64{1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0}},
		Traffic:  mount.Traffic{Requests: 11, Failures: 2, Bytes: 5000},
		Cache:    mount.CacheStatus{Bytes: 300, Faults: 3, Corrupt: 1},
	}
	text := scrape(t, s)
	disk := `disk="` + id.String() + `"`
	for _, want := range []string{
		`teleportd_images 2`,
		`teleportd_layers{state="mounted"} 1`,
		`teleportd_layers{state="unmounted"} 1`,
		`teleportd_pulls_total{outcome="teleported"} 2`,
		`teleportd_pulls_total{outcome="ConversionPending"} 4`,
		`teleportd_pull_seconds_total{outcome="teleported"} 3`,
		`teleportd_starts_total{outcome="teleported"} 6`,
		`teleportd_starts_total{outcome="Unauthorized"} 1`,
		`teleportd_attach_seconds_bucket{le="0.001"} 1`,
		`teleportd_attach_seconds_bucket{le="1"} 2`,
		`teleportd_attach_seconds_count 2`,
		`teleportd_share_requests_total 11`,
		`teleportd_share_failures_total 2`,
		`teleportd_share_received_bytes_total 5000`,
		`teleportd_share_connections_total{event="made"} 3`,
		`teleportd_share_connections_total{event="failed"} 0`,
		`teleportd_share_connections_total{event="broken"} 2`,
		`teleportd_share_up{registry="r.test",repository="a"} 1`,
		`teleportd_share_up{registry="r.test",repository="b"} 0`,
		`teleportd_faults_total 3`,
		`teleportd_corrupt_blocks_total 1`,
		`teleportd_disk_fetched_bytes_total{` + disk + `} 300`,
		`teleportd_disk_present_bytes{` + disk + `} 250`,
		`teleportd_disk_read_wait_seconds_bucket{` + disk + `,le="0.002"} 2`,
		`teleportd_disk_read_wait_seconds_bucket{` + disk + `,le="+Inf"} 3`,
		`teleportd_disk_read_wait_seconds_sum{` + disk + `} 30`,
		`teleportd_disk_read_failures_total{` + disk + `} 1`,
		`process_resident_memory_bytes `,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%s isn't there", want)
		}
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "teleportd_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	if err != nil || t.Failed() {
		t.Log(err, text)
	}
}

// However many disks there are, a scrape is bounded.
func TestMetricsAreBounded(t *testing.T) {
	var s disks.Status
	for i := range MaxDisks + 100 {
		s.Disks = append(s.Disks, disks.DiskStatus{Digest: oci.DigestOf([]byte{byte(i), byte(i >> 8)})})
	}
	text := scrape(t, s)
	if n := strings.Count(text, "\nteleportd_disk_present_bytes{"); n != MaxDisks {
		t.Errorf("%d disks have metrics", n)
	}
	if !strings.Contains(text, `teleportd_layers{state="unmounted"} 600`) {
		t.Error("not all layers are counted")
	}
}

// The guide lists exactly these metrics and reasons, in the same words.
func TestGuide(t *testing.T) {
	guide, err := os.ReadFile("../../../../docs/teleport.md")
	if err != nil {
		t.Fatal(err)
	}
	table := func(head string) string {
		_, table, found := strings.Cut(string(guide), head)
		if !found {
			t.Fatalf("docs/teleport.md has no table %s", head)
		}
		table, _, _ = strings.Cut(table, "\n\n")
		return strings.TrimSpace(table)
	}
	var metrics, reasons strings.Builder
	kinds := map[prometheus.ValueType]string{prometheus.GaugeValue: "gauge", prometheus.CounterValue: "counter", report.Histogram: "histogram"}
	for _, m := range all() {
		metrics.WriteString("| `" + m.Name + "` | " + kinds[m.Kind] + " | " + strings.Join(m.Labels, ", ") + " | " + m.Help + " |\n")
	}
	for _, r := range mount.Reasons() {
		reasons.WriteString("| `" + string(r) + "` | " + disks.Meaning(r) + " | " + disks.Remedy(r) + " |\n")
	}
	for head, want := range map[string]string{
		"| metric | kind | labels | meaning |\n|---|---|---|---|\n": metrics.String(),
		"| reason | | what to do |\n|---|---|---|\n":                reasons.String(),
	} {
		if got := table(head); got != strings.TrimSpace(want) {
			t.Errorf("the guide's table:\n%s\nthe program's:\n%s", got, want)
		}
	}
}
