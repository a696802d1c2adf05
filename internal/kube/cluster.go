package kube

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Cluster is what the reporter does at a Kubernetes API server. It may be used
// concurrently. Implementations don't retry: the reporter does.
//
// An error is ErrExists, ErrNotFound, ErrConflict, ErrRefused or ErrForbidden
// where the API server says so; a context's error; or else an *Unavailable.
type Cluster interface {
	// CreateEvent makes an Event. Its error is ErrExists if there's one of that
	// name in that namespace, as there is after an answer that got lost.
	CreateEvent(ctx context.Context, e Event) error

	// RepeatEvent says that what an Event tells happened again. Its error is
	// ErrNotFound if the Event has expired.
	RepeatEvent(ctx context.Context, r Repeat) error

	// Pod returns what the reporter has to know of a pod. Its error is
	// ErrNotFound or ErrConflict as for SetCondition.
	Pod(ctx context.Context, ref PodRef) (Pod, error)

	// SetCondition adds a condition to the pod's status, or changes the one of
	// its type; it leaves the others alone. Its error is ErrNotFound if there's
	// no pod of that name any more, ErrConflict if there's another, with
	// another UID.
	SetCondition(ctx context.Context, ref PodRef, c Condition) error

	// SetNodeLabel gives a node a label, or takes it away if value is nil.
	SetNodeLabel(ctx context.Context, node, key string, value *string) error

	// WatchNode calls labels with a node's labels, at once and whenever the node
	// has changed, one call after the other, until ctx ends or the connection
	// does. It returns why; nil if the API server ended it as it does from time
	// to time.
	WatchNode(ctx context.Context, node string, labels func(map[string]string)) error

	// Works asks the API server for something else that it must know, the node,
	// and returns why it can't answer: then it isn't the fault of one request
	// that it failed.
	Works(ctx context.Context, node string) error
}

// The answers that asking again doesn't change, but for ErrForbidden.
var (
	ErrExists   = errors.New("exists already")
	ErrNotFound = errors.New("not found")
	ErrConflict = errors.New("is another one, of the same name")
	// ErrRefused: the API server holds it to be invalid, or doesn't permit it.
	ErrRefused = errors.New("the API server refuses")
	// ErrForbidden is an ErrRefused: it isn't permitted. An API server that has
	// just begun forbids everything, until it has read its roles.
	ErrForbidden = fmt.Errorf("%w: not permitted", ErrRefused)
)

// Unavailable is the error of a request that may succeed later.
type Unavailable struct {
	// After is how long the API server wants not to be asked; 0: it doesn't say.
	After time.Duration
	// Answered: the API server did answer, though with a failure. Otherwise
	// nobody did.
	Answered bool
	Err      error
}

// Error tells the cause.
func (e *Unavailable) Error() string {
	if e.Answered {
		return fmt.Sprintf("the API server fails: %v", e.Err)
	}
	return fmt.Sprintf("the API server doesn't answer: %v", e.Err)
}

// Unwrap returns the cause.
func (e *Unavailable) Unwrap() error { return e.Err }

// PodRef is which pod: one of another UID is another pod.
type PodRef struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
}

// String returns NAMESPACE/NAME.
func (r PodRef) String() string { return r.Namespace + "/" + r.Name }

// Pod is what the reporter has to know of a pod.
type Pod struct {
	// Fields says where in the pod's specification a container of that name is,
	// such as spec.initContainers{setup}.
	Fields map[string]string
	// Condition is the one of type ConditionType; zero if there's none.
	Condition Condition
}

// ConditionType is the type of the condition that the reporter sets on pods:
// True if an image of the pod that should have been streamed wasn't.
const ConditionType = "UpgradeIfStreamableDisabled"

// Condition is a condition of type ConditionType.
type Condition struct {
	Status  string    `json:"status"` // True or False
	Reason  string    `json:"reason"`
	Message string    `json:"message"`
	Since   time.Time `json:"since"` // when Status became what it is, in whole seconds
}

// Event is an Event object about a pod.
type Event struct {
	Component string // who tells
	Name      string // in the pod's namespace
	Pod       PodRef
	Field     string // which part of the pod, as in Pod.Fields; "": the whole pod
	Node      string // that tells
	Warning   bool   // otherwise it's Normal
	Reason    string
	Message   string // at most MaxMessage bytes
	Time      time.Time
}

// MaxMessage is how long an Event's message may be, in bytes: that an API server
// takes a longer one isn't promised.
const MaxMessage = 1024

// Repeat changes an Event: what it tells happened Count times by now, the last
// time with that message.
type Repeat struct {
	Namespace, Name string
	Count           int32
	Last            time.Time
	Message         string
}
