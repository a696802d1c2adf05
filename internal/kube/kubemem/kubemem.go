// Package kubemem is a kube.Cluster in memory: pods that were put there, and
// what the reporter made of them. Tests that want a cluster to fail wrap it.
package kubemem

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"

	"sluice/internal/kube"
)

// Cluster is the cluster. The zero value has nothing. It may be used
// concurrently.
type Cluster struct {
	mu     sync.Mutex
	pods   map[string]*pod // by namespace/name
	events map[string]Event
	nodes  map[string]map[string]string // labels
	change chan struct{}                // closed when a node has changed
}

type pod struct {
	ref kube.PodRef
	kube.Pod
	changed int
}

// Event is an Event object as it is now.
type Event struct {
	kube.Event
	kube.Repeat // Count is 1 if it happened once
}

var _ kube.Cluster = (*Cluster)(nil)

// AddPod puts a pod there, or another one in its place. Fields are those of kube.Pod.
func (c *Cluster) AddPod(ref kube.PodRef, fields map[string]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pods == nil {
		c.pods = map[string]*pod{}
	}
	c.pods[ref.String()] = &pod{ref: ref, Pod: kube.Pod{Fields: maps.Clone(fields)}}
}

// RemovePod takes a pod away.
func (c *Cluster) RemovePod(ref kube.PodRef) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pods, ref.String())
}

// AddNode puts a node there, or changes all labels of the one that is.
func (c *Cluster) AddNode(name string, labels map[string]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setNode(name, maps.Clone(labels))
}

// setNode is called with mu held.
func (c *Cluster) setNode(name string, labels map[string]string) {
	if c.nodes == nil {
		c.nodes = map[string]map[string]string{}
	}
	c.nodes[name] = labels
	if c.change != nil {
		close(c.change)
		c.change = nil
	}
}

// Node returns a node's labels.
func (c *Cluster) Node(name string) map[string]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.nodes[name])
}

// Events returns all Events, by NAMESPACE/NAME.
func (c *Cluster) Events() map[string]Event {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.events)
}

// RemoveEvents lets all Events expire.
func (c *Cluster) RemoveEvents() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events = nil
}

// Condition returns a pod's condition, and how often it was set.
func (c *Cluster) Condition(ref kube.PodRef) (kube.Condition, int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.pods[ref.String()]; p != nil {
		return p.Condition, p.changed
	}
	return kube.Condition{}, 0
}

// CreateEvent implements kube.Cluster.
func (c *Cluster) CreateEvent(ctx context.Context, e kube.Event) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	name := e.Pod.Namespace + "/" + e.Name
	if _, ok := c.events[name]; ok {
		return fmt.Errorf("event %s %w", name, kube.ErrExists)
	}
	if e.Name == "" || strings.ContainsAny(e.Name, "/%") {
		return fmt.Errorf("%w: %q is no name of an event", kube.ErrRefused, e.Name)
	}
	if c.events == nil {
		c.events = map[string]Event{}
	}
	c.events[name] = Event{e, kube.Repeat{Namespace: e.Pod.Namespace, Name: e.Name, Count: 1, Last: e.Time, Message: e.Message}}
	return nil
}

// RepeatEvent implements kube.Cluster.
func (c *Cluster) RepeatEvent(ctx context.Context, r kube.Repeat) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	name := r.Namespace + "/" + r.Name
	e, ok := c.events[name]
	if !ok {
		return fmt.Errorf("event %s %w", name, kube.ErrNotFound)
	}
	e.Repeat = r
	c.events[name] = e
	return nil
}

// pod returns a pod. It's called with mu held.
func (c *Cluster) pod(ref kube.PodRef) (*pod, error) {
	p := c.pods[ref.String()]
	if p == nil {
		return nil, fmt.Errorf("pod %s %w", ref, kube.ErrNotFound)
	}
	if p.ref.UID != ref.UID {
		return nil, fmt.Errorf("pod %s %w", ref, kube.ErrConflict)
	}
	return p, nil
}

// Pod implements kube.Cluster.
func (c *Cluster) Pod(ctx context.Context, ref kube.PodRef) (kube.Pod, error) {
	if err := ctx.Err(); err != nil {
		return kube.Pod{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p, err := c.pod(ref)
	if err != nil {
		return kube.Pod{}, err
	}
	return kube.Pod{Fields: maps.Clone(p.Fields), Condition: p.Condition}, nil
}

// SetCondition implements kube.Cluster.
func (c *Cluster) SetCondition(ctx context.Context, ref kube.PodRef, cond kube.Condition) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p, err := c.pod(ref)
	if err != nil {
		return err
	}
	p.Condition = cond
	p.changed++
	return nil
}

// SetNodeLabel implements kube.Cluster.
func (c *Cluster) SetNodeLabel(ctx context.Context, node, key string, value *string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old, ok := c.nodes[node]
	if !ok {
		return fmt.Errorf("node %s %w", node, kube.ErrNotFound)
	}
	labels := map[string]string{}
	maps.Copy(labels, old)
	delete(labels, key)
	if value != nil {
		labels[key] = *value
	}
	if !maps.Equal(old, labels) {
		c.setNode(node, labels)
	}
	return nil
}

// WatchNode implements kube.Cluster.
func (c *Cluster) WatchNode(ctx context.Context, node string, labels func(map[string]string)) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		c.mu.Lock()
		now, ok := c.nodes[node]
		if c.change == nil {
			c.change = make(chan struct{})
		}
		change := c.change
		c.mu.Unlock()
		if ok {
			labels(maps.Clone(now))
		}
		select {
		case <-change:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Works implements kube.Cluster.
func (c *Cluster) Works(ctx context.Context, _ string) error { return ctx.Err() }
