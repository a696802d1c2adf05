package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"sluice/internal/durable"
	"sluice/internal/node/happening"
)

// maxPods is how many pods are remembered, those of which was heard last. A
// node has 110 by default.
const maxPods = 512

// maxContainers bounds what is remembered of a pod, against a daemon that tells
// nonsense. An API server takes no pod that has as many.
const maxContainers = 1024

// state is what the reporter remembers. It's owned by one goroutine.
type state struct {
	// Epoch and Seq are the cursor of the last event that was dealt with.
	Epoch string          `json:"epoch"`
	Seq   uint64          `json:"seq"`
	Pods  map[string]*pod `json:"pods"` // by UID
	Clock uint64          `json:"clock"`
}

// pod is what is remembered of a pod.
type pod struct {
	Ref  PodRef `json:"ref"`
	Used uint64 `json:"used"` // the state's Clock when it was last heard of
	// Containers are those that are ours to judge, by name.
	Containers map[string]verdict `json:"containers,omitempty"`
	// Known: Fields and Condition are what the API server said last.
	Known     bool              `json:"known,omitempty"`
	Fields    map[string]string `json:"fields,omitempty"`
	Condition Condition         `json:"condition,omitzero"`
	// Tellings are the Events of the pod, by what they tell.
	Tellings map[string]*telling `json:"tellings,omitempty"`
}

// telling is an Event that may be repeated.
type telling struct {
	Name string `json:"name"`
	// Count is how often it happened, Told of that is what the Event says.
	Count int32     `json:"count"`
	Told  int32     `json:"told"`
	At    time.Time `json:"at"` // when the API server was last told
	// Last is what happened last.
	Last happening.Event `json:"last"`
}

func newState() *state { return &state{Pods: map[string]*pod{}} }

func (s *state) cursor() happening.Cursor { return happening.Cursor{Epoch: s.Epoch, Seq: s.Seq} }

// pod returns what is remembered of a pod, of a new one nothing. The one that
// was longest not heard of is forgotten.
func (s *state) pod(ref PodRef) *pod {
	s.Clock++
	p := s.Pods[ref.UID]
	if p == nil {
		p = &pod{Ref: ref, Containers: map[string]verdict{}, Tellings: map[string]*telling{}}
		s.Pods[ref.UID] = p
	}
	p.Used = s.Clock
	for len(s.Pods) > maxPods {
		var oldest string
		for uid, other := range s.Pods {
			if oldest == "" || other.Used < s.Pods[oldest].Used {
				oldest = uid
			}
		}
		delete(s.Pods, oldest)
	}
	return p
}

// loadState reads what an earlier reporter saved. Without a file there's nothing
// to remember. A file that can't be read is an error besides.
func loadState(name string) (*state, error) {
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return newState(), nil
	}
	if err != nil {
		return newState(), err
	}
	s := newState()
	if err := json.Unmarshal(b, s); err != nil {
		return newState(), fmt.Errorf("%s: %w", name, err)
	}
	for uid, p := range s.Pods {
		if p == nil || p.Ref.UID != uid {
			return newState(), fmt.Errorf("%s: pod %q isn't one", name, uid)
		}
		if p.Containers == nil {
			p.Containers = map[string]verdict{}
		}
		if p.Tellings == nil {
			p.Tellings = map[string]*telling{}
		}
		for what, t := range p.Tellings {
			if t == nil {
				return newState(), fmt.Errorf("%s: event %q of pod %q isn't one", name, what, uid)
			}
		}
	}
	return s, nil
}

// save writes the state, whole or not at all.
func (s *state) save(name string) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	temp, err := os.CreateTemp(filepath.Dir(name), durable.TempPrefix)
	if err != nil {
		return err
	}
	// It needn't survive a loss of power: nor do the daemon's events.
	_, err = temp.Write(b)
	if err = errors.Join(err, temp.Close()); err == nil {
		err = os.Rename(temp.Name(), name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp.Name()))
	}
	return nil
}
