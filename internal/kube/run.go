package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
)

// Defaults of Options.
const (
	DefaultOptOutLabel = "sluice.dev/artifact-streaming"
	DefaultGrace       = time.Minute
	DefaultRate        = 10
	DefaultBurst       = 100
)

// Options say what a Reporter reports, of what, to whom.
type Options struct {
	Cluster Cluster
	Daemon  Daemon
	Feature Feature // what the daemon does; required
	Node    string  // its name in the cluster

	// State is a file for what is remembered over a restart; "": nothing is, and
	// it's told anew, mostly to the same effect.
	State string

	// Label is the node's label that is "true" while the daemon does that, in
	// general the Feature's own; "": none.
	Label string
	// OptOutLabel is the node's label that, if it's "false", switches streaming
	// off; "": none does.
	OptOutLabel string
	// Grace is how long the daemon may be away without the node losing its Label.
	Grace time.Duration

	// Rate is how many requests are made in a second, Burst how many at once
	// after a pause. Both must be positive.
	Rate  float64
	Burst int

	Log *slog.Logger
}

// Reporter reports what happens on a node to an API server.
type Reporter struct {
	opts   Options
	ask    *asker
	state  *latest[daemonState]
	labels *latest[nodeLabels]
}

// New returns a Reporter that does nothing until Run.
func New(opts Options) *Reporter {
	return &Reporter{
		opts: opts,
		ask: &asker{
			cluster: opts.Cluster, node: opts.Node, limit: rate.NewLimiter(rate.Limit(opts.Rate), opts.Burst), log: opts.Log,
		},
		state:  newLatest[daemonState](),
		labels: newLatest[nodeLabels](),
	}
}

// Run reports until ctx ends, and then returns nil. The node keeps its label
// then: the next reporter finds it right, or changes it.
func (r *Reporter) Run(ctx context.Context) error {
	remembered := newState()
	if r.opts.State != "" {
		var err error
		if remembered, err = loadState(r.opts.State); err != nil {
			r.opts.Log.Warn("what was reported earlier isn't known, and is told anew, to the same effect", "error", err)
		}
	}
	r.state.set(daemonState{since: time.Now()})
	lines := make(chan line)
	report := &reporter{ask: r.ask, feature: r.opts.Feature, node: r.opts.Node, file: r.opts.State, log: r.opts.Log, state: remembered}
	follow := &follower{daemon: r.opts.Daemon, cursor: remembered.cursor(), state: r.state, log: r.opts.Log}
	stew := &steward{ask: r.ask, daemon: r.opts.Daemon, opts: r.opts, log: r.opts.Log, state: r.state, labels: r.labels}
	group, gctx := errgroup.WithContext(ctx)
	group.Go(func() error { return report.run(gctx, lines) })
	group.Go(func() error { return follow.run(gctx, lines) })
	group.Go(func() error { return watchNode(gctx, r.ask, r.opts.Node, r.labels) })
	group.Go(func() error { return stew.run(gctx) })
	if err := group.Wait(); ctx.Err() == nil || !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// Ready returns nil if the daemon and the API server answer, or else who doesn't.
func (r *Reporter) Ready() error {
	if s := r.state.get(); !s.up {
		return fmt.Errorf("the node daemon doesn't answer since %s", s.since.Format(time.RFC3339))
	}
	if r.labels.get().told == 0 {
		return fmt.Errorf("the API server hasn't said what labels node %s has", r.opts.Node)
	}
	if why := r.ask.Failing(); why != "" {
		return errors.New(why)
	}
	return nil
}
