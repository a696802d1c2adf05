// Package report tells machines how a node fares: Prometheus metrics of what a
// mount.Manager says of itself says of itself. For teleportd, package
// report/teleport does it.
//
// Nothing is counted here. Each scrape asks for one mount.Status and makes
// samples of it, so metrics and `sluice node status` never disagree, reading
// content costs nothing for them, and an image that leaves the node takes its
// metrics along. The labels image (its reference) and artifact (what tells two
// images of one reference apart) have as many values as the node has images,
// of which MaxImages have metrics.
//
// docs/containerd.md and docs/teleport.md have tables of all metrics, for which a
// test takes the names and texts in this package.
package report

import (
	"context"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"sluice/internal/node/cache"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
)

// MaxImages is how many images have metrics of their own, the first by
// reference. sluice_node_images counts all.
const MaxImages = 500

// Metrics returns the handler of GET /metrics: what status returns, how many
// containers have started according to events, which may be nil, and the Go
// runtime's and the process's own metrics. It asks for no credentials.
func Metrics(status func(context.Context) mount.Status, events *happening.Log) http.Handler {
	return Handler(func(ctx context.Context) prometheus.Collector {
		return &samples{s: status(ctx), starts: Starts(events)}
	})
}

// Handler answers with what now collects, and the metrics of this process. It asks for
// no credentials.
func Handler(now func(context.Context) prometheus.Collector) http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		// A registry of its own for each scrape: the status belongs to the
		// request, whose end ends looking it up.
		scrape := prometheus.NewRegistry()
		scrape.MustRegister(now(req.Context()))
		promhttp.HandlerFor(prometheus.Gatherers{r, scrape}, promhttp.HandlerOpts{}).ServeHTTP(w, req)
	})
}

// Starts returns how many containers have started, by reason; events may be
// nil.
func Starts(events *happening.Log) map[string]int64 {
	if events == nil {
		return nil
	}
	return events.Starts()
}

// Metric is a metric of the node.
type Metric struct {
	Name, Help string
	Kind       prometheus.ValueType // or Histogram
	Labels     []string
}

// Gauge returns a metric that goes up and down, Counter one that only grows, and
// Waiting one of how many waited and how long.
func Gauge(name, help string, labels ...string) Metric {
	return Metric{name, help, prometheus.GaugeValue, labels}
}

// Counter is like Gauge.
func Counter(name, help string, labels ...string) Metric {
	return Metric{name, help, prometheus.CounterValue, labels}
}

// Waiting is like Gauge.
func Waiting(name, help string, labels ...string) Metric {
	return Metric{name, help, Histogram, labels}
}

// Desc describes the metric to Prometheus.
func (m Metric) Desc() *prometheus.Desc { return prometheus.NewDesc(m.Name, m.Help, m.Labels, nil) }

// Histogram marks a metric that isn't of a simple kind.
const Histogram prometheus.ValueType = -1

// ofImage are the labels of an image's metrics.
var ofImage = []string{"image", "artifact"}

// The metrics.
var (
	images        = Metric{"sluice_node_images", "Images on the node, by state.", prometheus.GaugeValue, []string{"state"}}
	notStreaming  = Metric{"sluice_node_images_not_streaming", "Images whose last pull went the ordinary way, of the last 256 pulls, by reason.", prometheus.GaugeValue, []string{"reason"}}
	pulls         = Metric{"sluice_node_pulls_total", "Pulls that asked for streaming, by outcome: streaming, or the reason why not.", prometheus.CounterValue, []string{"outcome"}}
	pullSeconds   = Metric{"sluice_node_pull_seconds_total", "Time that these pulls took until it was known whether they stream, and the image was mounted.", prometheus.CounterValue, []string{"outcome"}}
	starts        = Metric{"sluice_node_starts_total", "Containers that started on images of which this node tells (sluice node events), by outcome: streaming, or the reason why not.", prometheus.CounterValue, []string{"outcome"}}
	requests      = Metric{"sluice_node_registry_requests_total", "Requests to registries for blobs and parts of them.", prometheus.CounterValue, nil}
	failures      = Metric{"sluice_node_registry_failures_total", "Those that failed, each attempt by itself.", prometheus.CounterValue, nil}
	received      = Metric{"sluice_node_registry_received_bytes_total", "Bytes of blobs that came.", prometheus.CounterValue, nil}
	cacheBytes    = Metric{"sluice_node_cache_bytes", "Disk that content takes.", prometheus.GaugeValue, nil}
	cacheQuota    = Metric{"sluice_node_cache_limit_bytes", "Above it layers that nobody uses are evicted; 0: no limit.", prometheus.GaugeValue, nil}
	cacheLayers   = Metric{"sluice_node_cache_layers", "Layers with content on the disk.", prometheus.GaugeValue, nil}
	corrupt       = Metric{"sluice_node_corrupt_chunks_total", "Chunks that arrived damaged. They were asked for again.", prometheus.CounterValue, nil}
	imageInfo     = Metric{"sluice_node_image_info", "1, for each image: its state, and the plane that serves it.", prometheus.GaugeValue, []string{"image", "artifact", "state", "plane"}}
	imageSize     = Metric{"sluice_node_image_size_bytes", "Content of an image, decoded.", prometheus.GaugeValue, ofImage}
	imagePresent  = Metric{"sluice_node_image_present_bytes", "Content of an image that is here, about.", prometheus.GaugeValue, ofImage}
	imageFetched  = Metric{"sluice_node_image_fetched_bytes_total", "Compressed content of an image that came, by origin: a reader waited (fault), would want it next (readahead), boot pack (bootpack), background fill (background).", prometheus.CounterValue, []string{"image", "artifact", "origin"}}
	imageWait     = Metric{"sluice_node_image_read_wait_seconds", "Reads that had to wait for content (faults): how many, and how long.", Histogram, ofImage}
	imageFailures = Metric{"sluice_node_image_read_failures_total", "Reads of an image that failed, so that a program got an I/O error.", prometheus.CounterValue, ofImage}
)

// all lists the metrics, as the documentation does.
func all() []Metric {
	return []Metric{
		images, notStreaming, pulls, pullSeconds, starts, requests, failures, received, cacheBytes, cacheQuota, cacheLayers, corrupt,
		imageInfo, imageSize, imagePresent, imageFetched, imageWait, imageFailures,
	}
}

// samples are the metrics of one scrape.
type samples struct {
	s      mount.Status
	starts map[string]int64 // of containers, by reason
}

// Describe implements prometheus.Collector.
func (*samples) Describe(to chan<- *prometheus.Desc) {
	for _, m := range all() {
		to <- m.Desc()
	}
}

// Collect implements prometheus.Collector.
func (c *samples) Collect(to chan<- prometheus.Metric) {
	put := func(m Metric, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(m.Desc(), m.Kind, v, labels...)
	}
	states := map[mount.State]int{mount.StateStreaming: 0, mount.StateComplete: 0, mount.StateQuarantined: 0, mount.StateBroken: 0}
	for _, i := range c.s.Images {
		states[i.State]++
	}
	for state, n := range states {
		put(images, float64(n), string(state))
	}
	reasons := make(map[mount.Reason]int)
	for _, n := range c.s.NotStreaming {
		reasons[n.Reason]++
	}
	counts := make(map[mount.Reason]mount.PullCount)
	for _, n := range c.s.Counts {
		counts[n.Reason] = n
	}
	for _, r := range append(mount.Reasons(), "") {
		outcome := string(r)
		if r == "" {
			outcome = "streaming"
		} else {
			put(notStreaming, float64(reasons[r]), outcome)
		}
		put(pulls, float64(counts[r].Pulls), outcome)
		put(starts, float64(c.starts[string(r)]), outcome)
		put(pullSeconds, counts[r].Time.Seconds(), outcome)
	}
	put(requests, float64(c.s.Traffic.Requests))
	put(failures, float64(c.s.Traffic.Failures))
	put(received, float64(c.s.Traffic.Bytes))
	put(cacheBytes, float64(c.s.Cache.Bytes))
	put(cacheQuota, float64(c.s.Cache.Quota))
	put(cacheLayers, float64(c.s.Cache.Layers))
	put(corrupt, float64(c.s.Cache.Corrupt))
	for _, i := range c.s.Images[:min(len(c.s.Images), MaxImages)] {
		c.collectImage(to, put, i)
	}
}

func (c *samples) collectImage(to chan<- prometheus.Metric, put func(Metric, float64, ...string), i mount.ImageStatus) {
	ref, artifact := i.Reference, i.Artifact.String()
	put(imageInfo, 1, ref, artifact, string(i.State), i.Plane)
	put(imageSize, float64(i.Size), ref, artifact)
	put(imagePresent, float64(i.Cached), ref, artifact)
	put(imageFailures, float64(i.Reads.Failures), ref, artifact)
	for origin, n := range i.Reads.Bytes {
		put(imageFetched, float64(n), ref, artifact, origin)
	}
	to <- Waits(imageWait, i.Reads.Latency, i.Reads.Wait, ref, artifact)
}

// Waits makes a histogram of counts by cache.LatencyBounds, and their sum.
func Waits(m Metric, latency []int64, sum time.Duration, labels ...string) prometheus.Metric {
	buckets := make(map[float64]uint64)
	var total uint64
	bounds := cache.LatencyBounds()
	for k, n := range latency {
		total += uint64(n)
		if k < len(bounds) {
			buckets[bounds[k].Seconds()] = total
		}
	}
	return prometheus.MustNewConstHistogram(m.Desc(), total, sum.Seconds(), buckets, labels...)
}
