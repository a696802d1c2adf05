// Package happening keeps what happened to pods' images on this node, for
// programs that tell others of it: sluice-reporter, which makes Kubernetes
// Events and pod conditions of it, and `sluice node events`.
//
// Event is the type, as it goes over the control socket in JSON. Log is the last
// Events in memory, a bounded number. Each has a Cursor, and a reader goes on
// after the last one it has seen, also after it was restarted; a reader that was
// away for too long is told how many it has missed. The Log begins anew with the
// daemon, and its cursors with an epoch by which readers notice.
//
// Who makes Events is package attribution. Nothing here asks anybody anything.
package happening

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"sluice/oci"
)

// Kind says what happened. It is a closed list; readers skip kinds of newer
// daemons.
type Kind string

// The kinds.
const (
	// Pulling: an image is being pulled, and it's decided that it streams.
	Pulling Kind = "pulling"
	// Started: a container was created on the image, and can start.
	Started Kind = "started"
)

// Pod is which pod it happened to. The zero value: it isn't known, or it's no pod.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// Event is one thing that happened.
type Event struct {
	Epoch string    `json:"epoch"` // of the Log: another with each start of the daemon
	Seq   uint64    `json:"seq"`   // 1, 2, 3 … within the epoch
	Time  time.Time `json:"time"`
	Kind  Kind      `json:"kind"`

	Pod Pod `json:"pod,omitzero"`
	// Container is the name in the pod, of init and ephemeral containers, too;
	// "" where it isn't known, as always when pulling.
	Container   string `json:"container,omitempty"`
	ContainerID string `json:"containerID,omitempty"`
	Attempt     uint32 `json:"attempt,omitempty"` // how often the container was restarted

	Image  string     `json:"image"`            // as the pod names it
	Digest oci.Digest `json:"digest,omitempty"` // of its manifest, where it's known

	Streamed bool `json:"streamed"`
	// Reason is a mount.Reason, Message what happened, and Remedy what to do
	// about it, for people: why the image doesn't stream, if it doesn't.
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
	Remedy  string `json:"remedy,omitempty"`

	// Duration is how long the pull for this container took until the container
	// could be made, in nanoseconds; 0 if Present.
	Duration time.Duration `json:"duration,omitempty"`
	// Present: the image was here already, nothing was pulled for this container.
	Present bool `json:"present,omitempty"`

	// BytesHere of BytesTotal of a streamed image's content were on the node at
	// Time, about.
	BytesHere  int64 `json:"bytesHere,omitempty"`
	BytesTotal int64 `json:"bytesTotal,omitempty"`
}

// Cursor returns the position right after the Event.
func (e Event) Cursor() Cursor { return Cursor{e.Epoch, e.Seq} }

// Bounds of an Event's texts, in bytes. What is longer is cut.
const (
	maxName = 512  // names have at most 253, references little more than 255
	maxText = 1024 // what Kubernetes takes of an Event's message
)

// clip returns e with texts of bounded length, on one line.
func (e Event) clip() Event {
	for _, s := range []*string{&e.Pod.Namespace, &e.Pod.Name, &e.Pod.UID, &e.Container, &e.ContainerID, &e.Image, &e.Reason} {
		*s = clip(*s, maxName)
	}
	e.Message, e.Remedy = clip(e.Message, maxText), clip(e.Remedy, maxText)
	return e
}

func clip(s string, n int) string {
	if strings.ContainsAny(s, "\r\n") {
		s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
	}
	if len(s) <= n {
		return s
	}
	const more = "…"
	n -= len(more)
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + more
}

// Cursor is a position in a Log. The zero value is before its oldest Event.
type Cursor struct {
	Epoch string
	Seq   uint64 // of the last Event that was seen
}

// String returns the cursor as ParseCursor reads it: EPOCH:SEQ, "" for zero.
func (c Cursor) String() string {
	if c == (Cursor{}) {
		return ""
	}
	return c.Epoch + ":" + strconv.FormatUint(c.Seq, 10)
}

// maxEpoch bounds an epoch, in bytes; ours have 16.
const maxEpoch = 64

// ParseCursor reads a cursor. It need not be one of this Log.
func ParseCursor(s string) (Cursor, error) {
	if s == "" {
		return Cursor{}, nil
	}
	epoch, seq, ok := strings.Cut(s, ":")
	n, err := strconv.ParseUint(seq, 10, 64)
	if !ok || err != nil || epoch == "" || len(epoch) > maxEpoch {
		return Cursor{}, fmt.Errorf("cursor %.80q isn't EPOCH:NUMBER", s)
	}
	return Cursor{epoch, n}, nil
}
