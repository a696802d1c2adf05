// Package teleport is package report for teleportd: what a disks.Manager says of
// itself, as Prometheus metrics. It's apart because the disks bring a client of SMB
// along, which sluice node doesn't need.
package teleport

import (
	"context"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"

	"sluice/internal/node/disks"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/internal/node/report"
	"sluice/internal/node/smb"
)

// MaxDisks is how many disks have metrics of their own, the first by digest.
// teleportd_layers counts all.
const MaxDisks = 500

// ofDisk are the labels of a disk's metrics.
var ofDisk = []string{"disk"}

// The metrics of teleportd.
var (
	images        = report.Gauge("teleportd_images", "Images on the node whose layers can be mounted.")
	layers        = report.Gauge("teleportd_layers", "Their layers' disks, each once, by state.", "state")
	pulls         = report.Counter("teleportd_pulls_total", "Pulls that asked for Teleport, by outcome: teleported, or the reason why not.", "outcome")
	pullSeconds   = report.Counter("teleportd_pull_seconds_total", "Time that these pulls took until it was known whether the layers can be mounted, and they were.", "outcome")
	starts        = report.Counter("teleportd_starts_total", "Containers that started on images of which this node tells, by outcome: teleported, or the reason why not.", "outcome")
	attach        = report.Waiting("teleportd_attach_seconds", "How long mounting a layer took, what was fetched for it included.")
	shareRequests = report.Counter("teleportd_share_requests_total", "Requests to file servers for parts of disks.")
	shareFailures = report.Counter("teleportd_share_failures_total", "Those that failed, each attempt by itself.")
	shareReceived = report.Counter("teleportd_share_received_bytes_total", "Bytes of disks that came.")
	shareLinks    = report.Counter("teleportd_share_connections_total", "Connections with file servers, by what became of them: made, failed to be made, broken after that.", "event")
	shareUp       = report.Gauge("teleportd_share_up", "1 for each share that is used and that worked when it was asked last, or else 0.", "registry", "repository")
	cacheBytes    = report.Gauge("teleportd_cache_bytes", "Disk that content takes.")
	cacheLimit    = report.Gauge("teleportd_cache_limit_bytes", "Above it content that nobody uses is evicted; 0: no limit.")
	faults        = report.Counter("teleportd_faults_total", "Reads that had to wait for content.")
	corrupt       = report.Counter("teleportd_corrupt_blocks_total", "Blocks that arrived damaged. They were asked for again.")
	diskFetched   = report.Counter("teleportd_disk_fetched_bytes_total", "Bytes of a disk that came.", ofDisk...)
	diskPresent   = report.Gauge("teleportd_disk_present_bytes", "Bytes of a disk that are here, about.", ofDisk...)
	diskWait      = report.Waiting("teleportd_disk_read_wait_seconds", "Reads of a disk that had to wait for content (faults): how many, and how long.", ofDisk...)
	diskFailures  = report.Counter("teleportd_disk_read_failures_total", "Reads of a disk that failed, so that a program got an I/O error.", ofDisk...)
)

// all lists teleportd's metrics, as the documentation does.
func all() []report.Metric {
	return []report.Metric{
		images, layers, pulls, pullSeconds, starts, attach, shareRequests, shareFailures, shareReceived, shareLinks, shareUp,
		cacheBytes, cacheLimit, faults, corrupt, diskFetched, diskPresent, diskWait, diskFailures,
	}
}

// Metrics returns the handler of GET /metrics, as report.Metrics does; connections
// counts those with file servers.
func Metrics(status func(context.Context) disks.Status, connections *smb.Tally, events *happening.Log) http.Handler {
	return report.Handler(func(ctx context.Context) prometheus.Collector {
		return &teleported{s: status(ctx), connections: connections, starts: report.Starts(events)}
	})
}

// teleported are teleportd's metrics of one scrape.
type teleported struct {
	s           disks.Status
	connections *smb.Tally
	starts      map[string]int64 // of containers, by reason
}

// Describe implements prometheus.Collector.
func (*teleported) Describe(to chan<- *prometheus.Desc) {
	for _, m := range all() {
		to <- m.Desc()
	}
}

// Collect implements prometheus.Collector.
func (c *teleported) Collect(to chan<- prometheus.Metric) {
	put := func(m report.Metric, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(m.Desc(), m.Kind, v, labels...)
	}
	counts := make(map[mount.Reason]mount.PullCount)
	for _, n := range c.s.Counts {
		counts[n.Reason] = n
	}
	for _, r := range append(mount.Reasons(), "") {
		outcome := string(r)
		if r == "" {
			outcome = "teleported"
		}
		put(pulls, float64(counts[r].Pulls), outcome)
		put(pullSeconds, counts[r].Time.Seconds(), outcome)
		put(starts, float64(c.starts[string(r)]), outcome)
	}
	mounted := 0
	for i, d := range c.s.Disks {
		if d.Path != "" {
			mounted++
		}
		if i < MaxDisks {
			c.collectDisk(to, put, d)
		}
	}
	put(images, float64(len(c.s.Images)))
	put(layers, float64(mounted), "mounted")
	put(layers, float64(len(c.s.Disks)-mounted), "unmounted")
	for _, s := range c.s.Shares {
		up := 1.0
		if s.Problem != "" {
			up = 0
		}
		put(shareUp, up, s.Registry, s.Repository)
	}
	put(shareLinks, float64(c.connections.Made.Load()), "made")
	put(shareLinks, float64(c.connections.Failed.Load()), "failed")
	put(shareLinks, float64(c.connections.Broken.Load()), "broken")
	put(shareRequests, float64(c.s.Traffic.Requests))
	put(shareFailures, float64(c.s.Traffic.Failures))
	put(shareReceived, float64(c.s.Traffic.Bytes))
	put(cacheBytes, float64(c.s.Cache.Bytes))
	put(cacheLimit, float64(c.s.Cache.Quota))
	put(faults, float64(c.s.Cache.Faults))
	put(corrupt, float64(c.s.Cache.Corrupt))
	to <- report.Waits(attach, c.s.Attaches.Latency, c.s.Attaches.Time)
}

func (c *teleported) collectDisk(to chan<- prometheus.Metric, put func(report.Metric, float64, ...string), d disks.DiskStatus) {
	disk := d.Digest.String()
	put(diskFetched, float64(d.Bytes), disk)
	put(diskPresent, float64(d.Cached), disk)
	put(diskFailures, float64(d.Failures), disk)
	to <- report.Waits(diskWait, d.Latency, d.Wait, disk)
}
