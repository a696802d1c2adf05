package attribution

import (
	"cmp"
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"sluice/internal/node/cri"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/oci"
)

// kubernetes is the namespace of containerd that its CRI has.
const kubernetes = "k8s.io"

// start is a container that was given a snapshot.
type start struct {
	namespace string // containerd's
	id        string
	artifact  oci.Digest // of the image, if it's streamed
	at        time.Time
}

// Created is for a snapshot that was made for a container to write into. key is
// the snapshot's, as containerd's metadata store names it: NAMESPACE/NUMBER/KEY,
// where the CRI's key is the container's ID. artifact is that of the image
// beneath, "" if it isn't streamed. It's quick.
func (a *Attributor) Created(key string, artifact oci.Digest) {
	namespace, rest, _ := strings.Cut(key, "/")
	if a.opts.Namespace != "" && namespace != a.opts.Namespace {
		return
	}
	s := start{namespace: namespace, id: rest[strings.LastIndex(rest, "/")+1:], artifact: artifact, at: time.Now()}
	if artifact == "" && !a.asks(s) {
		return // nobody says which image it is
	}
	select {
	case a.starts <- s:
	default:
		a.log.Warn("too many containers start at once: one isn't told of", "container", s.id)
	}
}

// asks reports whether somebody may know whose a container is.
func (a *Attributor) asks(s start) bool {
	return a.opts.Containers != nil && s.namespace == kubernetes
}

// Run tells of the containers that start, until ctx ends.
func (a *Attributor) Run(ctx context.Context) {
	var asking sync.WaitGroup
	defer asking.Wait()
	tokens := make(chan struct{}, maxAsking)
	for {
		var s start
		select {
		case s = <-a.starts:
		case <-ctx.Done():
			return
		}
		select {
		case tokens <- struct{}{}:
		case <-ctx.Done():
			return
		}
		asking.Go(func() {
			defer func() { <-tokens }()
			a.started(ctx, s)
		})
	}
}

// started tells of one start.
func (a *Attributor) started(ctx context.Context, s start) {
	var c cri.Container
	if a.asks(s) {
		var err error
		c, err = a.find(ctx, s.id)
		switch {
		case ctx.Err() != nil, errors.Is(err, cri.ErrUnknown), c.Sandbox:
			return // it never came to be, or is nobody's to watch
		case err != nil:
			a.log.Warn("it isn't known which pod a container belongs to", "container", s.id, "error", err)
		}
	}
	if e, ok := a.describe(ctx, s, c); ok {
		a.opts.Events.Add(e)
	}
}

// How soon after its snapshot was made a container is asked for, how much longer
// each pause is than the one before, and how long all may take: the CRI knows of
// a container when it's made, which takes some milliseconds, and of a pod when its
// network is there.
const (
	firstPause  = 20 * time.Millisecond
	longerPause = 1.6
	lastPause   = 2 * time.Second
	askingTime  = 30 * time.Second
)

// find asks whose a container is that is being made. Errors: cri.ErrUnknown, if
// it isn't made after all.
func (a *Attributor) find(ctx context.Context, id string) (cri.Container, error) {
	ctx, cancel := context.WithTimeout(ctx, askingTime)
	defer cancel()
	pause := firstPause
	timer := time.NewTimer(pause)
	defer timer.Stop()
	last := cri.ErrUnknown
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return cri.Container{}, last
		}
		c, err := a.opts.Containers.Find(ctx, id)
		if err == nil {
			return c, nil
		}
		if ctx.Err() == nil {
			last = err
		}
		pause = min(time.Duration(float64(pause)*longerPause), lastPause)
		timer.Reset(pause)
	}
}

// describe makes the Event of a start, if it's to be told.
func (a *Attributor) describe(ctx context.Context, s start, c cri.Container) (happening.Event, bool) {
	e := happening.Event{
		Kind: happening.Started, Pod: c.Pod, Container: c.Name, ContainerID: s.id, Attempt: c.Attempt,
		Image: c.Image, Streamed: s.artifact != "",
	}
	if e.Streamed {
		image, here, size, err := a.opts.Images.Arrived(ctx, s.artifact)
		if err != nil {
			a.log.Debug("how much of an image is here isn't known", "artifact", s.artifact, "error", err)
		}
		e.Digest, e.BytesHere, e.BytesTotal = image.Manifest, here, size
		e.Image = cmp.Or(e.Image, image.Reference)
	}
	name, registry := canonical(e.Image)
	p := a.claim(c.Pod, name, s.at)
	if !a.opts.Images.Judges(registry, e.Streamed) {
		return e, false
	}
	e.Present = p == nil || !p.asked
	if !e.Present {
		e.Duration = p.took(s.at)
	}
	if !e.Streamed {
		a.explain(ctx, &e, p)
	}
	return e, true
}

// took is how long a pull took for a container that started at a time.
func (p *pull) took(at time.Time) time.Duration {
	if p.seen {
		return at.Sub(p.began)
	}
	return p.ended.Sub(p.began)
}

// explain says in e why its image isn't streamed: what became of the pull for
// this container, or of the last one of that image, or would of one now.
func (a *Attributor) explain(ctx context.Context, e *happening.Event, p *pull) {
	o, ok := a.opts.Images.LastPull(e.Image)
	if ok {
		e.Digest = o.Manifest
	}
	var why error
	switch {
	case p != nil && p.asked && p.why != nil:
		why = p.why
	case ok && o.Reason != "":
		why = &mount.NotStreaming{Reason: o.Reason, Err: errors.New(o.What())}
	default:
		why = a.opts.Images.WhyPresent(ctx, e.Image)
	}
	reason := mount.ReasonOf(why)
	if reason == "" { // of this node's own
		reason = mount.PlaneUnavailable
	}
	e.Reason, e.Remedy = string(reason), a.opts.Remedy(reason)
	e.Message = strings.TrimPrefix(why.Error(), e.Reason+": ")
}
