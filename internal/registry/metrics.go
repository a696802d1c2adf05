package registry

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Metrics counts what happens, for Prometheus. Labels have few values whatever
// clients send: repositories and accounts are never among them. A nil *Metrics
// counts nothing. Use NewMetrics.
type Metrics struct {
	registry *prometheus.Registry

	inFlight       prometheus.Gauge
	requests       *prometheus.CounterVec   // by kind and class of status
	seconds        *prometheus.HistogramVec // by kind
	received, sent prometheus.Counter       // bytes of bodies
	limited        *prometheus.CounterVec   // by limit
	authFailures   prometheus.Counter
	redirects      prometheus.Counter
}

// NewMetrics returns metrics of their own registry, with those of the Go
// runtime and of the process.
func NewMetrics() *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "sluice_http_requests_in_flight", Help: "Requests being served."}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_http_requests_total", Help: "Requests served, by what they asked for and the class of the answer's status."}, []string{"kind", "status"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "sluice_http_request_duration_seconds", Help: "Time from a request's header to the end of its answer.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}}, []string{"kind"}),
		received: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_http_received_bytes_total", Help: "Bytes of requests' bodies."}),
		sent: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_http_sent_bytes_total", Help: "Bytes of answers' bodies."}),
		limited: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_http_rate_limited_total", Help: "Requests refused with 429, by the limit that was reached."}, []string{"limit"}),
		authFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_auth_failures_total", Help: "Requests with credentials that were not good."}),
		redirects: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_blob_redirects_total", Help: "Reads of blobs that were sent to the object store."}),
	}
	m.registry.MustRegister(
		m.inFlight, m.requests, m.seconds, m.received, m.sent, m.limited, m.authFailures, m.redirects,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return m
}

// Handler returns the handler of /metrics. It asks for no credentials: it
// belongs on an address of its own.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry})
}

// Gauge adds a number that is asked for whenever metrics are read, such as the
// length of a queue. The name begins with "sluice_", and is added once.
func (m *Metrics) Gauge(name, help string, value func() float64) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
}

// Counter is Gauge for a number that only rises. Its name ends with "_total".
func (m *Metrics) Counter(name, help string, value func() float64) {
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, value))
}

func (m *Metrics) begin() {
	if m != nil {
		m.inFlight.Inc()
	}
}

// end counts a request that is over.
func (m *Metrics) end(c *conversation, took time.Duration) {
	if m == nil {
		return
	}
	kind := c.kind
	if kind == "" {
		kind = "other" // refused before a handler knew what it is
	}
	m.inFlight.Dec()
	m.requests.WithLabelValues(kind, statusClass(c.status)).Inc()
	m.seconds.WithLabelValues(kind).Observe(took.Seconds())
	m.received.Add(float64(c.received))
	m.sent.Add(float64(c.sent))
	switch {
	case c.redirected:
		m.redirects.Inc()
	case c.kind != kindOAuth2 || c.err != nil:
	case c.status == http.StatusUnauthorized:
		m.authFailed()
	case c.status == http.StatusTooManyRequests:
		m.limitedBy("authentication")
	}
}

func (m *Metrics) limitedBy(limit string) {
	if m != nil {
		m.limited.WithLabelValues(limit).Inc()
	}
}

func (m *Metrics) authFailed() {
	if m != nil {
		m.authFailures.Inc()
	}
}

// statusClass returns the class of a status, such as "2xx".
func statusClass(status int) string {
	switch status / 100 {
	case 2:
		return "2xx"
	case 3:
		return "3xx"
	case 4:
		return "4xx"
	case 5:
		return "5xx"
	}
	return "none"
}
