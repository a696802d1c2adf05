package kube

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"time"
)

// stewardRetry is how long the steward waits before it tries again what failed.
const stewardRetry = 5 * time.Second

// nodeLabels is what is known of the node's labels.
type nodeLabels struct {
	told   int // how often the watch has told; 0: they aren't known
	labels map[string]string
}

// watchNode brings the node's labels, until ctx ends.
func watchNode(ctx context.Context, ask *asker, node string, labels *latest[nodeLabels]) error {
	told := 0
	for pause := minBackoff; ; pause = min(2*pause, maxBackoff) {
		began := time.Now()
		err := ask.cluster.WatchNode(ctx, node, func(l map[string]string) { told++; labels.set(nodeLabels{told, l}) })
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if permanent(err) && pause > maxBackoff/4 { // not at an API server's start
			ask.refuse("the node's labels can't be watched: the node gets none, and can't opt out", err, "node", node)
		} else if err != nil {
			ask.log.Debug("the watch of the node broke off", "error", err)
		}
		if time.Since(began) > maxBackoff {
			pause = minBackoff
		}
		if err := sleep(ctx, pause/2+rand.N(pause/2+1)); err != nil {
			return err
		}
	}
}

// steward keeps the node's label true, and the daemon's switch as the node's
// other label wants it. One goroutine owns it.
type steward struct {
	ask    *asker
	daemon Daemon
	opts   Options
	log    *slog.Logger

	state  *latest[daemonState]
	labels *latest[nodeLabels]

	// said is the connection on which the daemon was told off, the last thing
	// that it was told; it then said why it doesn't stream, "" if it does.
	said uint64
	off  bool
	why  string
}

// run works until ctx ends.
func (s *steward) run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-s.state.news:
		case <-s.labels.news:
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		again, err := s.look(ctx)
		if err != nil {
			return err
		}
		if again > 0 {
			timer.Reset(again)
		} else {
			timer.Stop()
		}
	}
}

// look does what there is to do, and returns after which time it wants to look
// again, whatever happens; 0: never. Its error is that of ctx.
func (s *steward) look(ctx context.Context) (again time.Duration, err error) {
	daemon, node := s.state.get(), s.labels.get()
	if node.told == 0 {
		return 0, nil
	}
	off := s.opts.OptOutLabel != "" && node.labels[s.opts.OptOutLabel] == "false"
	if daemon.up && (s.said != daemon.start || s.off != off) {
		err := s.tell(ctx, off)
		switch {
		case ctx.Err() != nil:
			return 0, ctx.Err()
		case err != nil:
			s.log.Warn("the node daemon wasn't told whether this node streams", "error", err)
			again = stewardRetry
		default:
			s.said, s.off = daemon.start, off
			s.log.Info("the node daemon answers", "streams", s.why == "", "reason", s.why)
		}
	}
	if s.opts.Label == "" {
		return again, nil
	}
	want := "true"
	switch {
	case !daemon.up:
		if left := time.Until(daemon.since.Add(s.opts.Grace)); left > 0 {
			return left, nil
		}
		want = ""
	case again > 0:
		return again, nil // it isn't known what it does
	case s.why != "":
		want = ""
	}
	if has, ok := node.labels[s.opts.Label]; ok == (want != "") && has == want {
		return again, nil
	}
	return s.label(ctx, node, want, again)
}

// tell tells the daemon whether to stream, and asks whether it does.
func (s *steward) tell(ctx context.Context, off bool) error {
	why := ""
	if off {
		why = fmt.Sprintf("node %s has the label %s=false", s.opts.Node, s.opts.OptOutLabel)
	}
	ctx, cancel := context.WithTimeout(ctx, daemonTimeout)
	defer cancel()
	if err := s.daemon.SetStreaming(ctx, !off, why); err != nil {
		return err
	}
	var err error
	s.why, err = s.daemon.Streams(ctx)
	return err
}

// label gives the node with these labels its label, or takes it away.
func (s *steward) label(ctx context.Context, node nodeLabels, want string, again time.Duration) (time.Duration, error) {
	var value *string
	if want != "" {
		value = &want
	}
	err := s.ask.do(ctx, func(ctx context.Context) error {
		return s.ask.cluster.SetNodeLabel(ctx, s.opts.Node, s.opts.Label, value)
	})
	switch {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case err != nil:
		s.ask.refuse("the node's label isn't changed", err, "node", s.opts.Node, "label", s.opts.Label)
		return max(again, maxAfter), nil
	}
	s.labels.edit(func(now nodeLabels) nodeLabels { // until the watch says so
		if now.told != node.told {
			return now // it has, or that somebody has changed it since
		}
		labels := map[string]string{}
		maps.Copy(labels, now.labels)
		delete(labels, s.opts.Label)
		if want != "" {
			labels[s.opts.Label] = want
		}
		return nodeLabels{now.told, labels}
	})
	s.log.Info("the node's label is changed", "label", s.opts.Label, "value", want)
	return again, nil
}
