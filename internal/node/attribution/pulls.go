package attribution

import (
	"slices"
	"time"

	"sluice/internal/node/cri"
	"sluice/internal/node/happening"
	"sluice/oci"
)

// pull is one that goes on, or that no container has started after yet.
type pull struct {
	name  string // in full
	image string // as it was said
	pod   happening.Pod

	// seen: the snapshotter has seen it, and nobody else. It ends whenever.
	seen bool

	began, ended time.Time // ended is zero while it goes on
	asked        bool      // for a layer: the image isn't here
	told         bool      // that it streams
	why          error     // it doesn't stream, or some layer of it; nil: it does
}

const (
	maxPulls = 1024

	// pullLife is how long after a pull its container may start; kubelet starts
	// it at once, but a node may be slow.
	pullLife = time.Hour

	// seenLife is that of pulls which only the snapshotter has seen, after it has
	// last been asked for a layer. An image that streams is there then, of others
	// the layers still have to come.
	seenLife, seenOrdinaryLife = 15 * time.Second, 10 * time.Minute
)

// begin notes a pull of kubelet's; the result notes its end.
func (a *Attributor) begin(p cri.Pull) (end func(error)) {
	name, _ := canonical(p.Image)
	q := &pull{name: name, image: p.Image, pod: p.Pod, began: time.Now()}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.add(q)
	return func(err error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		q.ended = time.Now()
		if err != nil || q.pod.UID == "" { // nobody will start after it, or say so
			a.remove(q)
		}
	}
}

// add adds a pull, and forgets those that nothing will come of. The caller has
// a.mu.
func (a *Attributor) add(p *pull) {
	a.pulls = slices.DeleteFunc(a.pulls, func(old *pull) bool { return old.over(p.began) })
	if len(a.pulls) >= maxPulls {
		a.pulls = slices.Delete(a.pulls, 0, 1)
	}
	a.pulls = append(a.pulls, p)
}

func (a *Attributor) remove(p *pull) {
	if i := slices.Index(a.pulls, p); i >= 0 {
		a.pulls = slices.Delete(a.pulls, i, i+1)
	}
}

// over reports whether no container can start after a pull any more.
func (p *pull) over(now time.Time) bool {
	life := pullLife
	switch {
	case p.ended.IsZero():
		return false
	case p.seen && p.why == nil:
		life = seenLife
	case p.seen:
		life = seenOrdinaryLife
	}
	return now.Sub(p.ended) > life
}

// Asked is for a layer of an image, by the name ref, that containerd asked the
// snapshotter for; manifest is the digest of its manifest, where that is known,
// and err why the layer isn't streamed. It's quick.
func (a *Attributor) Asked(ref string, manifest oci.Digest, err error) {
	name, registry := canonical(ref)
	now := time.Now()
	var tell []*pull
	a.mu.Lock()
	found := false
	for _, p := range a.pulls {
		if p.name != name || !(p.ended.IsZero() || p.seen && !p.over(now)) {
			continue
		}
		found = true
		p.asked = true
		if p.seen {
			p.ended = now
		}
		if err != nil {
			p.why = err
		} else if !p.told {
			p.told = true
			tell = append(tell, p)
		}
	}
	if !found {
		p := &pull{name: name, image: ref, seen: true, began: now, ended: now, asked: true, told: err == nil, why: err}
		a.add(p)
		if p.told {
			tell = append(tell, p)
		}
	}
	a.mu.Unlock()
	if len(tell) == 0 || !a.opts.Images.Judges(registry, true) {
		return
	}
	for _, p := range tell {
		a.opts.Events.Add(happening.Event{Kind: happening.Pulling, Time: now, Pod: p.pod, Image: p.image, Digest: manifest, Streamed: true})
	}
}

// claim returns the pull after which a container of a pod started at a time, on
// an image of that name, and forgets it: nil if there was none.
func (a *Attributor) claim(pod happening.Pod, name string, at time.Time) *pull {
	a.mu.Lock()
	defer a.mu.Unlock()
	var mine *pull
	for _, p := range a.pulls {
		switch {
		case p.name != name || p.ended.IsZero() || p.over(at):
		case !p.seen && p.pod.UID == pod.UID:
			mine = p
		case p.seen && (mine == nil || mine.seen):
			mine = p
		}
	}
	if mine != nil {
		a.remove(mine)
	}
	return mine
}
