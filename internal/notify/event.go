package notify

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"sluice/oci"
)

// Queue is the index's queue of events; a job's key is the repository.
const Queue = "events"

// maxEvent bounds an event's JSON, in bytes.
const maxEvent = 64 << 10

// Event is one thing that happened: the payload of a job of Queue.
type Event struct {
	ID         string     `json:"id"` // tells repetitions
	Time       time.Time  `json:"time"`
	Action     string     `json:"action"` // such as "push" and "delete"
	Repository string     `json:"repository"`
	Tag        string     `json:"tag,omitempty"`
	Digest     oci.Digest `json:"digest,omitempty"` // of a manifest
	MediaType  string     `json:"mediaType,omitempty"`
	Size       int64      `json:"size,omitempty"` // of the manifest, in bytes

	// Who did it, by which request: see oci.Actor.
	Actor     string `json:"actor,omitempty"`
	Remote    string `json:"remote,omitempty"`
	Agent     string `json:"agent,omitempty"`
	RequestID string `json:"requestID,omitempty"`
}

// methods are the HTTP methods by which actions happen, for consumers of
// distribution's notifications that look at them.
var methods = map[string]string{"push": http.MethodPut, "convert": http.MethodPut, "delete": http.MethodDelete}

// parseEvent parses what came from the queue. Fields that it doesn't know are
// of a newer version's.
func parseEvent(payload []byte) (Event, error) {
	var e Event
	if len(payload) > maxEvent {
		return e, fmt.Errorf("an event of %d bytes is longer than %d", len(payload), maxEvent)
	}
	if err := json.Unmarshal(payload, &e); err != nil {
		return e, fmt.Errorf("parsing an event: %w", err)
	}
	if e.ID == "" || e.Action == "" || e.Repository == "" {
		return e, fmt.Errorf("an event without id, action or repository: %q %q %q", e.ID, e.Action, e.Repository)
	}
	return e, nil
}
