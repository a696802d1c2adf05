package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"

	"github.com/spf13/pflag"

	"sluice/internal/node/mount/control"
	"sluice/internal/node/report"
)

// reportConfig is the flags of what the daemon tells of itself.
type reportConfig struct {
	metrics   string // address
	traces    string // URL
	logFormat string
	verbose   bool
}

func (c *reportConfig) register(f *pflag.FlagSet) {
	f.StringVar(&c.metrics, "metrics-listen", "", "serve Prometheus metrics at `ADDRESS`, such as\n127.0.0.1:9797, to whoever asks (default: on the\ncontrol socket only)")
	f.StringVar(&c.traces, "traces-endpoint", "", "send traces of pulls and starts to OTLP/HTTP at `URL`\n(default: keep the last ones, for sluice node trace)")
	f.StringVar(&c.logFormat, "log-format", "text", "log in `FORMAT`: text or json")
	f.BoolVar(&c.verbose, "verbose", false, "log what goes well, too")
}

// newLog returns the daemon's log.
func (c *reportConfig) newLog(w io.Writer) (*slog.Logger, error) {
	opts := &slog.HandlerOptions{Level: slog.LevelInfo}
	if c.verbose {
		opts.Level = slog.LevelDebug
	}
	switch c.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, fmt.Errorf("--log-format %q: use text or json", c.logFormat)
}

// controlHandler answers at the control socket.
func (d *daemon) controlHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", control.Handler(d.images, &d.recorder, d.info, d.log))
	mux.Handle("GET /metrics", report.Metrics(d.images.Status, d.info.Events))
	return mux
}

// metricsHandler answers where anybody may ask.
func (d *daemon) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", report.Metrics(d.images.Status, d.info.Events))
	return mux
}
