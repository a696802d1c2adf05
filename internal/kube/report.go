package kube

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"sluice/internal/node/happening"
)

const (
	// repeatEvery is how often an Event is changed at most because what it tells
	// happened again.
	repeatEvery = 10 * time.Second

	// saveAfter is how long what is remembered isn't saved. What a killed
	// reporter hadn't saved is told again, to the same effect.
	saveAfter = 5 * time.Second
)

// line is what the daemon's stream brings.
type line struct {
	event happening.Event
	lost  uint64 // that many events before it will never come
}

// reporter tells the API server of events, one after the other. One goroutine
// owns it.
type reporter struct {
	ask     *asker
	feature Feature
	node    string
	file    string // for the state; "": it isn't saved
	log     *slog.Logger
	state   *state
	dirty   time.Time // since when the state isn't saved; zero: it is
}

// run tells of what comes by lines until ctx ends. It's in order, and each is
// told, or refused for good, before the next is looked at: what waits, waits in
// the daemon.
func (r *reporter) run(ctx context.Context, lines <-chan line) error {
	defer r.save()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case l := <-lines:
			if l.lost > 0 {
				r.log.Warn("events were lost: the API server couldn't be told soon enough, and the node daemon keeps the last only", "lost", l.lost)
			}
			if err := r.event(ctx, l.event); err != nil {
				return err
			}
			r.state.Epoch, r.state.Seq = l.event.Epoch, l.event.Seq
			r.changed()
		case <-timer.C:
			if err := r.flush(ctx); err != nil {
				return err
			}
			if time.Since(r.dirty) >= saveAfter {
				r.save()
			}
		case <-ctx.Done():
			return ctx.Err()
		}
		if next, ok := r.next(); ok {
			timer.Reset(next)
		} else {
			timer.Stop()
		}
	}
}

// next returns when there's something to do without an event.
func (r *reporter) next() (after time.Duration, ok bool) {
	if !r.dirty.IsZero() {
		after, ok = max(time.Until(r.dirty.Add(saveAfter)), 0), true
	}
	for _, p := range r.state.Pods {
		for _, t := range p.Tellings {
			if t.Told < t.Count {
				if d := max(time.Until(t.At.Add(repeatEvery)), 0); !ok || d < after {
					after, ok = d, true
				}
			}
		}
	}
	return after, ok
}

// changed is called when the state has changed.
func (r *reporter) changed() {
	if r.dirty.IsZero() {
		r.dirty = time.Now()
	}
}

// save saves the state, if it has changed.
func (r *reporter) save() {
	if r.dirty.IsZero() {
		return
	}
	r.dirty = time.Time{}
	if r.file == "" {
		return
	}
	if err := r.state.save(r.file); err != nil {
		r.ask.refuse("what was reported isn't remembered for a restart, after which it's told anew, to the same effect", err)
	}
}

// event tells of one event. Its error is that of ctx.
func (r *reporter) event(ctx context.Context, e happening.Event) error {
	reason := r.feature.eventReason(e)
	if reason == "" || e.Pod.UID == "" || e.Pod.Name == "" || e.Pod.Namespace == "" {
		return nil // of no pod, or of a kind that a newer daemon knows
	}
	p := r.state.pod(PodRef{Namespace: e.Pod.Namespace, Name: e.Pod.Name, UID: e.Pod.UID})
	if e.Kind == happening.Started && e.Container != "" {
		if err := r.condition(ctx, p, e); err != nil {
			return err
		}
	}
	key := strings.Join([]string{reason, e.Container, e.Image, e.Reason}, " ")
	if e.Present {
		key += " present"
	}
	t := p.Tellings[key]
	if t == nil && len(p.Tellings) < maxContainers {
		t = &telling{}
		p.Tellings[key] = t
	}
	switch {
	case t == nil:
		return r.create(ctx, p, &telling{}, e)
	case t.Count == 0:
		return r.create(ctx, p, t, e)
	case t.Last.Epoch == e.Epoch && t.Last.Seq >= e.Seq:
		return nil // was counted before the reporter was killed
	}
	t.Count++
	t.Last = e
	if time.Since(t.At) < repeatEvery {
		return nil // flush tells it
	}
	return r.repeat(ctx, p, t)
}

// flush tells of what happened again, where that was left for later.
func (r *reporter) flush(ctx context.Context) error {
	for _, p := range r.state.Pods {
		for _, t := range p.Tellings {
			if t.Told < t.Count && time.Since(t.At) >= repeatEvery {
				if err := r.repeat(ctx, p, t); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// create makes the Event of e.
func (r *reporter) create(ctx context.Context, p *pod, t *telling, e happening.Event) error {
	object := Event{
		Component: r.feature.Component, Name: eventName(e), Pod: p.Ref, Field: p.Fields[e.Container], Node: r.node, Warning: !e.Streamed,
		Reason: r.feature.eventReason(e), Message: r.feature.eventMessage(e), Time: e.Time,
	}
	err := r.ask.do(ctx, func(ctx context.Context) error { return r.ask.cluster.CreateEvent(ctx, object) })
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil && !errors.Is(err, ErrExists):
		r.ask.refuse("an Event isn't made", err, "pod", p.Ref, "reason", object.Reason)
	}
	*t = telling{Name: object.Name, Count: 1, Told: 1, At: time.Now(), Last: e}
	r.changed()
	return nil
}

// repeat says in the Event of t that it happened again.
func (r *reporter) repeat(ctx context.Context, p *pod, t *telling) error {
	repeat := Repeat{Namespace: p.Ref.Namespace, Name: t.Name, Count: t.Count, Last: t.Last.Time, Message: r.feature.eventMessage(t.Last)}
	err := r.ask.do(ctx, func(ctx context.Context) error { return r.ask.cluster.RepeatEvent(ctx, repeat) })
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, ErrNotFound): // expired, or was refused when it was to be made
		return r.create(ctx, p, t, t.Last)
	case err != nil:
		r.ask.refuse("an Event isn't counted on", err, "pod", p.Ref, "reason", r.feature.eventReason(t.Last))
	}
	t.Told, t.At = t.Count, time.Now()
	r.changed()
	return nil
}

// condition sets the pod's condition, if it's to have one, to what it's now that e
// has happened. Its error is that of ctx.
func (r *reporter) condition(ctx context.Context, p *pod, e happening.Event) error {
	if len(p.Containers) >= maxContainers {
		return nil
	}
	v := verdict{Image: e.Image}
	if !e.Streamed {
		v = verdict{Image: e.Image, Reason: e.Reason, Message: e.Message, Remedy: e.Remedy}
		if v.Reason == "" {
			v.Reason = "Unknown"
		}
	}
	p.Containers[e.Container] = v
	r.changed()
	if _, ok := p.Fields[e.Container]; !ok {
		// A new pod, or a new ephemeral container of an old one.
		var found Pod
		err := r.ask.do(ctx, func(ctx context.Context) (err error) { found, err = r.ask.cluster.Pod(ctx, p.Ref); return err })
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			r.ask.refuse("a pod can't be looked at: it gets no condition, and its Events don't say which container it was", err, "pod", p.Ref)
			return nil
		}
		p.Fields, p.Condition = found.Fields, found.Condition
	}
	if !r.feature.Condition {
		return nil
	}
	next := judge(p.Containers)
	if next.Status == p.Condition.Status && next.Reason == p.Condition.Reason && next.Message == p.Condition.Message {
		return nil
	}
	next.Since = e.Time.UTC().Truncate(time.Second)
	if next.Status == p.Condition.Status {
		next.Since = p.Condition.Since
	}
	err := r.ask.do(ctx, func(ctx context.Context) error { return r.ask.cluster.SetCondition(ctx, p.Ref, next) })
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		r.ask.refuse("a pod doesn't get its condition", err, "pod", p.Ref, "condition", next.Status, "reason", next.Reason)
		return nil
	}
	p.Condition = next
	return nil
}
